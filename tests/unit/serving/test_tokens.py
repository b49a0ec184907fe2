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
def guarded(engine, config, file):
    return ApiClient(engine, config, tokens=TokenStore.open(file))


@pytest.fixture
def reload_always(monkeypatch):
    monkeypatch.setattr(tokens_module, "_RELOAD_INTERVAL_S", -1.0)


class TestTokenStore:
    def test_only_the_digest_of_a_new_token_is_stored(self, tmp_path):
        token, digest = new_token()
        path = write(tmp_path / "t", {"name": "a", "sha256": digest})
        assert TokenStore.open(path).authenticate(token).name == "a"
        assert token not in (tmp_path / "t").read_text()
        with pytest.raises(ServiceError, match="unknown token"):
            TokenStore.open(path).authenticate(digest)

    def test_json_files_and_store_uris_are_read(self, tmp_path):
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
    def test_invalid_files_are_rejected_without_repeating_them(self, tmp_path, content):
        (tmp_path / "t").write_text(content)
        with pytest.raises(ConfigError) as caught:
            TokenStore.open(str(tmp_path / "t"))
        assert "secret-token" not in str(caught.value)

    def test_missing_files_are_rejected(self, tmp_path):
        with pytest.raises(ConfigError, match="token file"):
            TokenStore.open(str(tmp_path / "none"))

    def test_changes_are_loaded_and_broken_files_are_ignored(self, tmp_path, reload_always):
        path = write(tmp_path / "t", entry("a"))
        store = TokenStore.open(path)
        write(tmp_path / "t", entry("b"))
        store.reload()
        assert store.authenticate("b").name == "b"
        with pytest.raises(ServiceError, match="unknown token"):
            store.authenticate("a")
        for content in ("tokens: [", ""):
            (tmp_path / "t").write_text(content)
            store.reload()
            assert store.authenticate("b").name == "b"
        (tmp_path / "t").unlink()
        store.reload()
        assert store.authenticate("b").name == "b"


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
    def test_requests_without_a_valid_token_are_unauthorized(self, guarded, headers):
        for method, path in [
            ("GET", "/v1/adapters"),
            ("GET", "/v1/adapters/fog"),
            ("GET", "/v1/library?libary=x"),
            ("GET", "/v1/base"),
            ("POST", "/v1/library/refresh"),
        ]:
            response = guarded(method, path, headers=headers)
            assert status_and_code(response) == (401, "unauthorized")
            assert response.headers["www-authenticate"].startswith("Bearer")
        assert status_and_code(guarded.segment(headers=headers)) == (401, "unauthorized")

    def test_a_token_in_the_query_is_ignored(self, guarded):
        assert guarded("GET", "/v1/base?access_token=all-seeing").status_code == 401

    def test_page_health_and_examples_need_no_token(self, guarded):
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v1/examples"):
            assert guarded("GET", path).status_code == 200

    def test_the_scheme_is_case_insensitive(self, guarded):
        headers = {"Authorization": "bearer all-seeing"}
        assert guarded("GET", "/v1/base", headers=headers).status_code == 200

    def test_roles_are_separate(self, guarded):
        refresh = guarded("POST", "/v1/library/refresh", headers=bearer("all-seeing"))
        assert refresh.json()["adapters"] == len(DOMAINS)
        forbidden = guarded("POST", "/v1/library/refresh", headers=bearer("night-only"))
        assert status_and_code(forbidden) == (403, "forbidden")
        assert status_and_code(guarded.segment(headers=bearer("admin-only"))) == (403, "forbidden")

    def test_only_visible_adapters_are_used_and_listed(self, guarded):
        headers = bearer("night-only")
        reply = guarded.segment(NIGHT, headers=headers).json()
        assert [a["name"] for a in reply["adapters"]] == ["night"]
        body = guarded("GET", "/v1/adapters", headers=headers).json()
        assert [a["name"] for a in body["adapters"]] == ["night"]
        assert guarded("GET", "/v1/library", headers=headers).json()["adapters"] == 1
        nothing = guarded.segment(NIGHT, headers=bearer("nothing")).json()
        assert nothing["adapters"] == []
        assert nothing["fallback"]
        uniform = guarded.segment(NIGHT, headers=headers, mode="uniform").json()
        assert [a["name"] for a in uniform["adapters"]] == ["night"]

    def test_hidden_and_unknown_adapters_give_the_same_error(self, guarded):
        headers = bearer("night-only")
        responses = [guarded("GET", f"/v1/adapters/{n}", headers=headers) for n in ("fog", "fox")]
        assert responses[0].json()["detail"] == responses[1].json()["detail"]
        forced = [guarded.segment(headers=headers, adapters=n) for n in ("fog", "fox")]
        details = [a.json()["detail"].replace("fox", "fog") for a in forced]
        assert details[0] == details[1]
        assert "fog" not in guarded.segment(headers=headers, adapters="fo").json()["detail"]

    def test_removed_tokens_are_rejected_soon(self, guarded, file, tmp_path, reload_always):
        assert guarded("GET", "/v1/base", headers=bearer("night-only")).status_code == 200
        write(tmp_path / "tokens.yaml", entry("all-seeing"))
        assert guarded("GET", "/v1/base", headers=bearer("night-only")).status_code == 401

    def test_the_log_has_the_name_of_the_token_only(self, guarded, caplog):
        caplog.set_level("INFO")
        guarded.segment(headers=bearer("all-seeing"))
        guarded.segment(headers=bearer("not-to-be-seen"))
        assert guarded.contexts[0].token_name == "all-seeing"
        assert guarded.contexts[1].token_name is None
        assert "not-to-be-seen" not in caplog.text
        assert "not-to-be-seen" not in str([vars(record) for record in caplog.records])


def test_a_slow_token_store_does_not_delay_requests(engine, config, reload_always):
    contents = json.dumps({"tokens": [entry("a")]}).encode()
    reads = []

    def read():
        reads.append(time.monotonic())
        if len(reads) > 1:
            time.sleep(1.5)
        return contents

    api = ApiClient(engine, config, tokens=TokenStore(read))
    assert api("GET", "/v1/base", headers=bearer("a")).status_code == 200
