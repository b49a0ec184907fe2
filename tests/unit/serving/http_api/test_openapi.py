import json
from urllib.parse import unquote_plus

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from loraseg.serving.http_api.app import build_api
from loraseg.serving.http_api.problems import PROBLEM_TYPES
from tests.unit.serving.api_client import LEAKS, ApiClient

CHECKS = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
)


BOUNDED = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


# Threads of the application may draw random numbers while Hypothesis makes a case.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_every_answer_is_one_that_the_document_describes(engine, world):
    schema = schemathesis.openapi.from_asgi("/openapi.json", build_api(engine, world))
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 8
    for operation in operations:
        _attack(operation)


def _attack(operation):
    @given(case=operation.as_strategy())
    @BOUNDED
    def attack(case):
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        if response.status_code != 200:
            detail, sent = response.json()["detail"], unquote_plus(str(case.as_curl_command()))
            assert not [leak for leak in LEAKS if leak in detail and leak not in sent]

    attack()


def test_document_and_routes_name_the_same(engine, world):
    api = build_api(engine, world)
    described = {
        (method.upper(), path)
        for path, operations in api.openapi()["paths"].items()
        for method in operations
    }
    routes = {(m, r.path) for r in api.routes for m in r.methods if m != "HEAD"}
    pages = {("GET", path) for path in ("/", "/docs", "/openapi.json")}
    assert described == routes - pages


def test_every_problem_is_described_somewhere(engine, world):
    text = json.dumps(build_api(engine, world).openapi())
    # What the router says of paths and methods that the document does not have.
    assert [code for code in PROBLEM_TYPES if f"`{code}`" not in text] == ["method_not_allowed"]


def test_real_answers_have_the_described_form(engine, world):
    jsonschema = pytest.importorskip("jsonschema")
    talk = ApiClient(engine, world)
    schemas = json.loads(json.dumps(talk.api.openapi()["components"]["schemas"]))
    for name, content in {
        "Reply": talk.segment(
            **{"return": "mask,confidence,entropy,overlay,rle,polygons,explanation"}
        ),
        "AdapterList": talk("GET", "/v1/adapters"),
        "Library": talk("GET", "/v1/library"),
        "Problem": talk.segment(mode="x"),
        "Examples": talk("GET", "/v1/examples"),
    }.items():
        whole = {"components": {"schemas": schemas}, "$ref": f"#/components/schemas/{name}"}
        jsonschema.validate(content.json(), whole)
        extra = set(content.json()) - set(schemas[name]["properties"])
        assert not extra


def test_docs_page_shows_routes_and_problems_and_runs_nothing(engine, world):
    answer = ApiClient(engine, world)("GET", "/docs")
    for text in ("/v1/segment/batch", "temperature", "too_many_requests", "segmentation_mask"):
        assert text in answer.text
    policy = answer.headers["content-security-policy"]
    assert "script-src 'none'" in policy
    assert "unsafe-inline" not in policy
