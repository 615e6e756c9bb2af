"""langchain-openai: invoke, stream, structured output, embeddings."""

import os

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

BASE = {"base_url": os.environ["URL"] + "/v1", "api_key": "none", "max_retries": 0}
QUESTION = "What is 17+25?"


class Parity(BaseModel):
    is_even: bool


model = ChatOpenAI(model="demo", temperature=0, **BASE)
assert model.invoke(QUESTION).content == "42"
assert "".join(chunk.content for chunk in model.stream(QUESTION)) == "42"
assert isinstance(model.with_structured_output(Parity, method="json_schema").invoke(QUESTION), Parity)
vectors = OpenAIEmbeddings(model="demo", check_embedding_ctx_length=False, **BASE).embed_documents(["a", "b"])
assert len(vectors) == 2
