import hashlib
import json
import time

import pytest
import yaml

from loraseg.errors import ConfigError, ServiceError
from loraseg.serving import tokens as tokens_module
from loraseg.serving.tokens import TokenStore, new_token
from tests.unit.serving.api_client import NIGHT, ApiClient, status_and_code
from tests.unit.tiny import DOMAINS


def entry(token, **more):
    return {
        "name": more.pop("name", token),
        "sha256": hashlib.sha256(token.encode()).hexdigest(),
        **more,
    }


def write(path, *entries):
    path.write_text(yaml.safe_dump({"tokens": list(entries)}))
    return str(path)


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def file(tmp_path):
    return write(
        tmp_path / "tokens.yaml",
        entry("all-seeing", roles=["segment", "admin"]),
        entry("night-only", adapters=["night*"]),
        entry("nothing", adapters=["zzz"]),
        entry("admin-only", roles=["admin"]),
    )


@pytest.fixture
def guarded(engine, world, file):
    return ApiClient(engine, world, tokens=TokenStore.open(file))


@pytest.fixture
def always_due(monkeypatch):
    monkeypatch.setattr(tokens_module, "_RELOAD_INTERVAL_S", -1.0)


class TestTokenStore:
    def test_new_token_is_found_by_its_digest_only(self, tmp_path):
        token, digest = new_token()
        path = write(tmp_path / "t", {"name": "a", "sha256": digest})
        assert TokenStore.open(path).authenticate(token).name == "a"
        assert token not in (tmp_path / "t").read_text()
        with pytest.raises(ServiceError, match="not known"):
            TokenStore.open(path).authenticate(digest)

    def test_json_file_and_store_uri_are_read_too(self, tmp_path):
        (tmp_path / "tokens.json").write_text(json.dumps({"tokens": [entry("a")]}))
        assert TokenStore.open(f"file://{tmp_path}/tokens.json").authenticate("a").name == "a"

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "tokens: []",
            "[1]",
            "tokens: [{name: a, sha256: secret-token}]",
            "tokens: [{name: a, sha256: [secret-token]}]",
            "tokens: [{name: a, sha256: '%s', role: admin}]" % ("0" * 64),
            "tokens: [{name: a, sha256: '%s', roles: [root]}]" % ("0" * 64),
            "tokens: [{name: a, sha256: '%s', roles: []}]" % ("0" * 64),
            "tokens: [{name: a, sha256: '%s', concurrent: 0}]" % ("0" * 64),
            "tokens: [{name: a, sha256: &d '%s'}, {name: b, sha256: *d}]" % ("0" * 64),
            f"tokens: [{{name: a, sha256: '{'0' * 64}'}}, {{name: a, sha256: '{'1' * 64}'}}]",
            "tokens: [secret-token",
            "!!python/object/apply:os.system ['secret-token']",
        ],
    )
    def test_wrong_file_is_refused_and_not_repeated(self, tmp_path, content):
        (tmp_path / "t").write_text(content)
        with pytest.raises(ConfigError) as caught:
            TokenStore.open(str(tmp_path / "t"))
        assert "secret-token" not in str(caught.value)

    def test_absent_file_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="token file"):
            TokenStore.open(str(tmp_path / "none"))

    def test_change_takes_effect_and_a_broken_file_does_not(self, tmp_path, always_due):
        path = write(tmp_path / "t", entry("a"))
        book = TokenStore.open(path)
        write(tmp_path / "t", entry("b"))
        book.reload()
        assert book.authenticate("b").name == "b"
        with pytest.raises(ServiceError, match="not known"):
            book.authenticate("a")
        for content in ("tokens: [", ""):
            (tmp_path / "t").write_text(content)
            book.reload()
            assert book.authenticate("b").name == "b"
        (tmp_path / "t").unlink()
        book.reload()
        assert book.authenticate("b").name == "b"


class TestProtectedRoutes:
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer "},
            {"Authorization": "Basic YWxsLXNlZWluZzo="},
            {"Authorization": "all-seeing"},
            {"Authorization": "Bearer all-seeing "},
            {"Authorization": "Bearer all-seeing, Bearer wrong"},
            {"Authorization": "Bearer " + "x" * 10_000},
            {"Cookie": "token=all-seeing"},
        ],
    )
    def test_without_a_valid_token_nothing_is_told(self, guarded, headers):
        for method, path in [
            ("GET", "/v1/adapters"),
            ("GET", "/v1/adapters/fog"),
            ("GET", "/v1/library?libary=x"),
            ("GET", "/v1/base"),
            ("POST", "/v1/library/refresh"),
        ]:
            answer = guarded(method, path, headers=headers)
            assert status_and_code(answer) == (401, "unauthorized")
            assert answer.headers["www-authenticate"].startswith("Bearer")
        assert status_and_code(guarded.segment(headers=headers)) == (401, "unauthorized")

    def test_token_in_the_query_is_no_token(self, guarded):
        assert guarded("GET", "/v1/base?access_token=all-seeing").status_code == 401

    def test_page_health_and_examples_are_open(self, guarded):
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v1/examples"):
            assert guarded("GET", path).status_code == 200

    def test_scheme_is_written_in_any_case(self, guarded):
        headers = {"Authorization": "bearer all-seeing"}
        assert guarded("GET", "/v1/base", headers=headers).status_code == 200

    def test_roles_are_kept_apart(self, guarded):
        refresh = guarded("POST", "/v1/library/refresh", headers=bearer("all-seeing"))
        assert refresh.json()["adapters"] == len(DOMAINS)
        refused = guarded("POST", "/v1/library/refresh", headers=bearer("night-only"))
        assert status_and_code(refused) == (403, "forbidden")
        assert status_and_code(guarded.segment(headers=bearer("admin-only"))) == (403, "forbidden")

    def test_only_visible_adapters_are_used_and_told_of(self, guarded):
        headers = bearer("night-only")
        reply = guarded.segment(NIGHT, headers=headers).json()
        assert [a["name"] for a in reply["adapters"]] == ["night"]
        told = guarded("GET", "/v1/adapters", headers=headers).json()
        assert [a["name"] for a in told["adapters"]] == ["night"]
        assert guarded("GET", "/v1/library", headers=headers).json()["adapters"] == 1
        nothing = guarded.segment(NIGHT, headers=bearer("nothing")).json()
        assert nothing["adapters"] == []
        assert nothing["fallback"]
        uniform = guarded.segment(NIGHT, headers=headers, mode="uniform").json()
        assert [a["name"] for a in uniform["adapters"]] == ["night"]

    def test_hidden_adapter_cannot_be_told_from_an_absent_one(self, guarded):
        headers = bearer("night-only")
        answers = [guarded("GET", f"/v1/adapters/{n}", headers=headers) for n in ("fog", "fox")]
        assert answers[0].json()["detail"] == answers[1].json()["detail"]
        forced = [guarded.segment(headers=headers, adapters=n) for n in ("fog", "fox")]
        details = [a.json()["detail"].replace("fox", "fog") for a in forced]
        assert details[0] == details[1]
        assert "fog" not in guarded.segment(headers=headers, adapters="fo").json()["detail"]

    def test_removed_token_is_refused_within_moments(self, guarded, file, tmp_path, always_due):
        assert guarded("GET", "/v1/base", headers=bearer("night-only")).status_code == 200
        write(tmp_path / "tokens.yaml", entry("all-seeing"))
        assert guarded("GET", "/v1/base", headers=bearer("night-only")).status_code == 401

    def test_log_names_the_token_but_never_shows_it(self, guarded, caplog):
        caplog.set_level("INFO")
        guarded.segment(headers=bearer("all-seeing"))
        guarded.segment(headers=bearer("not-to-be-seen"))
        assert guarded.contexts[0].token == "all-seeing"
        assert guarded.contexts[1].token is None
        assert "not-to-be-seen" not in caplog.text
        assert "not-to-be-seen" not in str([vars(record) for record in caplog.records])


def test_slow_token_store_does_not_hold_up_requests(engine, world, always_due):
    contents = json.dumps({"tokens": [entry("a")]}).encode()
    reads = []

    def read():
        reads.append(time.monotonic())
        if len(reads) > 1:
            time.sleep(1.5)
        return contents

    talk = ApiClient(engine, world, tokens=TokenStore(read))
    assert talk("GET", "/v1/base", headers=bearer("a")).status_code == 200
