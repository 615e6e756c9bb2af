"""anthropic: messages, stream, tools, counting."""

import os

import anthropic

client = anthropic.Anthropic(base_url=os.environ["URL"], api_key="none", max_retries=0)
QUESTION = [{"role": "user", "content": "What is 17+25?"}]
ADD = {
    "name": "add",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}

message = client.messages.create(model="demo", max_tokens=20, messages=QUESTION, extra_body={"temperature": 0})
assert message.content[0].text == "42" and message.stop_reason == "end_turn", message
with client.messages.stream(model="demo", max_tokens=20, messages=QUESTION, extra_body={"temperature": 0}) as stream:
    assert "".join(stream.text_stream) == "42"
tool = client.messages.create(
    model="demo", max_tokens=60, messages=QUESTION, tools=[ADD], tool_choice={"type": "tool", "name": "add"}
)
assert tool.content[0].type == "tool_use" and tool.content[0].name == "add", tool
assert client.messages.count_tokens(model="demo", messages=QUESTION).input_tokens > 5
