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


# Threads of the application may draw random numbers while Hypothesis generates a case.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_every_response_matches_the_document(engine, config):
    schema = schemathesis.openapi.from_asgi("/openapi.json", build_api(engine, config))
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 8
    for operation in operations:
        _test_operation(operation)


def _test_operation(operation):
    @given(case=operation.as_strategy())
    @BOUNDED
    def check(case):
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        if response.status_code != 200:
            detail, sent = response.json()["detail"], unquote_plus(str(case.as_curl_command()))
            assert not [leak for leak in LEAKS if leak in detail and leak not in sent]

    check()


def test_document_and_routes_have_the_same_operations(engine, config):
    api = build_api(engine, config)
    described = {
        (method.upper(), path)
        for path, operations in api.openapi()["paths"].items()
        for method in operations
    }
    routes = {(m, r.path) for r in api.routes for m in r.methods if m != "HEAD"}
    pages = {("GET", path) for path in ("/", "/docs", "/openapi.json")}
    assert described == routes - pages


def test_every_problem_is_in_the_document(engine, config):
    text = json.dumps(build_api(engine, config).openapi())
    # Only for paths and methods that are not in the document.
    assert [code for code in PROBLEM_TYPES if f"`{code}`" not in text] == ["method_not_allowed"]


def test_real_responses_match_their_schemas(engine, config):
    jsonschema = pytest.importorskip("jsonschema")
    api = ApiClient(engine, config)
    schemas = json.loads(json.dumps(api.api.openapi()["components"]["schemas"]))
    for name, content in {
        "Reply": api.segment(
            **{"return": "mask,confidence,entropy,overlay,rle,polygons,explanation"}
        ),
        "AdapterList": api("GET", "/v1/adapters"),
        "Library": api("GET", "/v1/library"),
        "Problem": api.segment(mode="x"),
        "Examples": api("GET", "/v1/examples"),
    }.items():
        whole = {"components": {"schemas": schemas}, "$ref": f"#/components/schemas/{name}"}
        jsonschema.validate(content.json(), whole)
        extra = set(content.json()) - set(schemas[name]["properties"])
        assert not extra


def test_docs_page_lists_routes_and_problems_and_runs_no_script(engine, config):
    response = ApiClient(engine, config)("GET", "/docs")
    for text in ("/v1/segment/batch", "temperature", "too_many_requests", "segmentation_mask"):
        assert text in response.text
    policy = response.headers["content-security-policy"]
    assert "script-src 'none'" in policy
    assert "unsafe-inline" not in policy
