"""litellm: chat, stream, and the error for a prompt that is too long."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

litellm.suppress_debug_info = True
BASE = {"api_base": os.environ["URL"] + "/v1", "api_key": "none", "num_retries": 0}
QUESTION = [{"role": "user", "content": "What is 17+25?"}]
for model in ("hosted_vllm/demo", "openai/demo"):
    answer = litellm.completion(model=model, messages=QUESTION, temperature=0, **BASE)
    assert answer.choices[0].message.content == "42", answer
    chunks = litellm.completion(model=model, messages=QUESTION, temperature=0, stream=True, **BASE)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "42"
    try:
        litellm.completion(model=model, messages=[{"role": "user", "content": "why? " * 4000}], **BASE)
    except litellm.ContextWindowExceededError:
        pass
    else:
        raise AssertionError("a prompt that is too long was answered")
