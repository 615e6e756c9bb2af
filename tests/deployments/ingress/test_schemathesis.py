"""Schemathesis draws requests from /openapi.json, fitting ones and wrong ones: each answer is one that it describes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks

from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.service import InferenceService

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/embeddings", "/invocations", "/tokenize", "/detokenize",
)  # fmt: skip
WRONG_SHARE = 0.25
COSTLY = "/invocations"
"""What none of its three forms allows is slow to find: few wrong ones."""


@pytest.fixture
def service(lanes, tokenizer, backend) -> InferenceService:
    """With room for the texts that are drawn."""
    return InferenceService(
        lanes=lanes, tokenizer=tokenizer, model_names=["tiny"], max_model_len=1024,
        vocab_size=backend.get_vocab_size(), system_fingerprint="fp_test",
    )  # fmt: skip


def operations(service: InferenceService) -> Iterator[APIOperation]:
    for result in schemathesis.openapi.from_asgi("/openapi.json", build_http_app(service)).get_all_operations():
        yield result.ok()


def fuzz(operation: APIOperation, mode: GenerationMode, num_examples: int) -> tuple[Counter[int], set[str]]:
    """Answers by status, and the fields that were sent. The same ones each time."""
    statuses: Counter[int] = Counter()
    fields: set[str] = set()

    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def one(case: Case) -> None:
        serve_it(case)
        if isinstance(case.body, dict):
            fields.update(case.body)
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    one()
    return statuses, fields


def serve_it(case: Case) -> None:
    """Most names that are drawn are not served, and nothing else of such a request is looked at."""
    if isinstance(case.body, dict) and isinstance(name := case.body.get("model"), str) and len(name) != 5:
        case.body["model"] = "tiny"


def fuzz_both(operation: APIOperation, num_examples: int, *, is_full: bool = False) -> Counter[int]:
    """Fitting requests and wrong ones; enough of the first are good. is_full: they have every field."""
    num_wrong = round(num_examples * WRONG_SHARE) if operation.path != COSTLY else min(num_examples // 10, 15)
    fitting, fields = fuzz(operation, GenerationMode.POSITIVE, num_examples - num_wrong)
    assert fitting[200] >= fitting.total() / 20
    assert not is_full or declared(operation) <= fields
    return fitting + fuzz(operation, GenerationMode.NEGATIVE, num_wrong)[0]


def declared(operation: APIOperation) -> set[str]:
    """The fields of its request in the document."""
    document: dict[str, Any] = operation.schema.raw_schema
    components = document["components"]["schemas"]
    content = document["paths"][operation.path]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"]
    names = [branch["$ref"].rpartition("/")[2] for branch in schema.get("anyOf", [schema])]
    return {field for name in names for field in components[name]["properties"]}


def test_every_route_with_a_body_is_fuzzed(service):
    assert {one.path for one in operations(service) if one.body} == set(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_answers_are_what_the_document_says(service, path):
    (operation,) = (one for one in operations(service) if one.path == path)
    assert fuzz_both(operation, 20).total() >= 20


def test_answers_of_routes_without_a_body_are_what_the_document_says(service):
    for operation in operations(service):
        if not operation.body:
            fuzz(operation, GenerationMode.POSITIVE, 5)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", PATHS)
def test_answers_to_many_are_what_the_document_says(service, path):
    (operation,) = (one for one in operations(service) if one.path == path)
    statuses = fuzz_both(operation, 900 if path == COSTLY else 300, is_full=True)  # it has the fields of three
    print(f"\n{path}: {statuses.total()} requests, by status {dict(statuses)}")
