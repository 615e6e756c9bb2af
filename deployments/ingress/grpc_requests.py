"""Messages of `stagemesh.v1` as the fields of HTTP's requests, which have the same names and are checked there."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.proto import inference_pb2 as pb


def generate_fields(request: pb.GenerateRequest, stream: bool) -> dict[str, Any]:
    """Of a CompletionRequest."""
    fields = _sampled_fields(request, stream)
    kind = request.WhichOneof("prompt")
    if kind is not None:
        fields["prompt"] = request.text if kind == "text" else list(request.token_ids.ids)
    return fields


def chat_fields(request: pb.ChatRequest, stream: bool) -> dict[str, Any]:
    """Of a ChatRequest. Raises ConfigError."""
    fields = _sampled_fields(request, stream) | conversation_fields(request)
    if (count := fields.pop("logprobs", None)) is not None:
        fields["logprobs"], fields["top_logprobs"] = True, count
    if request.tool_choice in ("auto", "none", "required"):
        fields["tool_choice"] = request.tool_choice
    elif request.tool_choice:
        fields["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice}}
    if request.HasField("parallel_tool_calls"):
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    return fields


def conversation_fields(request: pb.ChatRequest | pb.Conversation) -> dict[str, Any]:
    """Of a ChatRequest, those that make its prompt. Raises ConfigError."""
    fields: dict[str, Any] = {"messages": [_message(message) for message in request.messages]}
    if request.tools:
        fields["tools"] = [_tool(i, tool) for i, tool in enumerate(request.tools)]
    if request.HasField("chat_template_kwargs"):
        fields["chat_template_kwargs"] = json_format.MessageToDict(request.chat_template_kwargs)
    return fields


def embedding_fields(request: pb.EmbedRequest) -> dict[str, Any]:
    """Of an EmbeddingRequest."""
    fields = _named_fields(request, "dimensions", "normalize", "add_special_tokens")
    if request.pooling:
        fields["pooling"] = request.pooling
    kind = request.WhichOneof("input")
    if kind is not None:
        is_text = kind == "texts"
        fields["input"] = list(request.texts.texts) if is_text else [list(ids.ids) for ids in request.token_ids.lists]
    return fields


def _named_fields(request: pb.GenerateRequest | pb.ChatRequest | pb.EmbedRequest, *names: str) -> dict[str, Any]:
    """What all have, and the optional ones of these names, as far as they are set."""
    fields: dict[str, Any] = {
        name: getattr(request, name) for name in ("model", "request_id") if getattr(request, name)
    }
    return fields | {name: getattr(request, name) for name in ("timeout", "priority", *names) if request.HasField(name)}


def _sampled_fields(request: pb.GenerateRequest | pb.ChatRequest, stream: bool) -> dict[str, Any]:
    fields = _named_fields(request) | {"stream": stream}
    for descriptor, value in request.sampling.ListFields():
        if descriptor.name == "logit_bias":
            fields["logit_bias"] = {str(token_id): bias for token_id, bias in value.items()}
        elif descriptor.name == "structured_outputs":
            constraint = value.WhichOneof("form")
            content = list(value.choice.texts) if constraint == "choice" else getattr(value, constraint or "json")
            fields["structured_outputs"] = {constraint: content} if constraint else {}
        else:
            fields[descriptor.name] = value if isinstance(value, (bool, int, float)) else list(value)
    return fields


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.reasoning:
        fields["reasoning"] = message.reasoning
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _tool(i: int, tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        try:
            function["parameters"] = json.loads(tool.parameters)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"tools[{i}].parameters", tool.parameters, f"is not valid JSON: {error}") from error
    return {"type": "function", "function": function}
