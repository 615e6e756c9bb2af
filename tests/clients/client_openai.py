"""openai: chat, stream, tools, JSON schema, log-probabilities, responses, embeddings."""

import os

import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=os.environ["URL"] + "/v1", api_key="none", max_retries=0)
QUESTION = [{"role": "user", "content": "What is 17+25?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


class Parity(BaseModel):
    is_even: bool


(model,) = client.models.list().data
assert model.id == "demo", model
answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2)
assert answer.choices[0].message.content == "42", answer
assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens, answer
stream = client.chat.completions.create(
    model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "42", chunks
assert chunks[-1].usage.completion_tokens > 0, chunks[-1]
forced = client.chat.completions.create(
    model="demo", messages=QUESTION, tools=[ADD], tool_choice={"type": "function", "function": {"name": "add"}}
)
assert forced.choices[0].message.tool_calls[0].function.name == "add", forced
parsed = client.chat.completions.parse(model="demo", messages=QUESTION, response_format=Parity, seed=1, max_tokens=60)
assert isinstance(parsed.choices[0].message.parsed, Parity), parsed
text = client.completions.create(model="demo", prompt=["What is", "The king"], max_tokens=4, logprobs=1, echo=True)
assert text.choices[0].logprobs.token_logprobs[0] is None and text.choices[0].text.startswith("What is"), text
response = client.responses.create(model="demo", input="What is 17+25?", temperature=0)
assert response.output_text == "42", response
with client.responses.stream(model="demo", input="What is 17+25?", temperature=0) as events:
    assert events.get_final_response().output_text == "42"
assert len(client.embeddings.create(model="demo", input=["a", "b"]).data) == 2
try:
    client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "why? " * 4000}])
except openai.BadRequestError as error:
    assert error.code == "context_length_exceeded", error
else:
    raise AssertionError("a prompt that is too long was answered")
