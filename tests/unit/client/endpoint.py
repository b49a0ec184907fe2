"""A real endpoint in this process: the API over a local engine, served by uvicorn."""

import contextlib
import hashlib

import yaml

from loraseg.serving.api import build_api
from loraseg.serving.build import build_local
from loraseg.serving.config import ServiceConfig
from loraseg.serving.tokens import TokenBook
from tests.asgi_server import listening

TOKENS = {"worker": ["segment"], "admin": ["segment", "admin"]}


def write_tokens(path):
    """Write a token file in which the names of the tokens are the tokens."""
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "roles": roles}
        for name, roles in TOKENS.items()
    ]
    path.write_text(yaml.safe_dump({"tokens": entries}))
    return str(path)


@contextlib.contextmanager
def endpoint(models, library, *, tokens=None, tls=None, **config):
    """Serve on a free port; yield the URL."""
    base, encoder = models
    settings = ServiceConfig(libraries={"main": library}, base=base, encoder=encoder, **config)
    with build_local(settings) as engine:
        assert engine.wait_until_ready(30.0)
        api = build_api(engine, settings, tokens=None if tokens is None else TokenBook.open(tokens))
        with serve(api, tls) as url:
            yield url


@contextlib.contextmanager
def serve(app, tls=None):
    """Serve an ASGI app on a free port; yield the URL."""
    with listening(app, tls) as port:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{port}"
