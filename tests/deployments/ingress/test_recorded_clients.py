"""What real clients sent once, sent again: they must not be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.harness import DEMO

from stagemesh.config.model import ModelConfig
from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.stages.text.tokenizer import Tokenizer
from tests.deployments.conftest import FakeLanes

pytestmark = pytest.mark.anyio

RECORDED = sorted((Path(__file__).parents[2] / "clients" / "recorded").glob("*.json"))
REQUESTS = [
    pytest.param(request, id=f"{path.stem}-{i}-{request['path']}")
    for path in RECORDED
    for i, request in enumerate(json.loads(path.read_text()))
]


@pytest.mark.parametrize("request_", REQUESTS)
async def test_a_request_of_a_real_client_is_answered(request_: dict[str, Any]) -> None:
    tokenizer, config = Tokenizer.from_folder(DEMO), ModelConfig.from_folder(DEMO)
    size = {"max_model_len": config.max_position_embeddings, "vocab_size": config.vocab_size}
    service = InferenceService(lanes=FakeLanes(tokenizer), tokenizer=tokenizer, model_names=["demo"], **size)
    transport = httpx.ASGITransport(build_http_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = None if request_["body"] is None else json.dumps(request_["body"])
        answer = await client.request(request_["method"], request_["path"], content=body, headers=request_["headers"])
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert '"error":{' not in answer.text and "event: error" not in answer.text and answer.text.count("data: ") > 1
