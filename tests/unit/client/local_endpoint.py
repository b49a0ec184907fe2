"""A real endpoint in the test process: the API over a local engine, served by uvicorn."""

import contextlib
import hashlib

import yaml

from loraseg.serving.build import build_local_engine
from loraseg.serving.config import ServiceConfig
from loraseg.serving.http_api.app import build_api
from loraseg.serving.tokens import TokenStore
from tests.asgi_server import serve_on_free_port

TOKENS = {"worker": ["segment"], "admin": ["segment", "admin"]}


def write_tokens(path):
    """Write a token file whose tokens equal their names."""
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "roles": roles}
        for name, roles in TOKENS.items()
    ]
    path.write_text(yaml.safe_dump({"tokens": entries}))
    return str(path)


@contextlib.contextmanager
def serve_endpoint(models, library, *, tokens=None, tls=None, **config):
    """Serve on a free port; yield the URL."""
    base, encoder = models
    settings = ServiceConfig(libraries={"main": library}, base=base, encoder=encoder, **config)
    with build_local_engine(settings) as engine:
        assert engine.wait_until_ready(30.0)
        api = build_api(
            engine, settings, tokens=None if tokens is None else TokenStore.open(tokens)
        )
        with serve_app(api, tls) as url:
            yield url


@contextlib.contextmanager
def serve_app(app, tls=None):
    """Serve an ASGI app on a free port; yield the URL."""
    with serve_on_free_port(app, tls) as port:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{port}"
