"""A real endpoint in this process: the API over a local engine, served by uvicorn."""

import contextlib
import hashlib
import socket
import threading

import uvicorn
import yaml

from loraseg.serving.api import build_api
from loraseg.serving.build import build_local
from loraseg.serving.config import ServiceConfig
from loraseg.serving.tokens import TokenBook

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
    """Serve an ASGI app on a free port, with TLS if (certificate, key) are named."""
    files = {} if tls is None else {"ssl_certfile": tls[0], "ssl_keyfile": tls[1]}
    options = {"log_config": None, "lifespan": "off", "ws": "none", "timeout_graceful_shutdown": 5}
    server = uvicorn.Server(uvicorn.Config(app, **options, **files))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"{'http' if tls is None else 'https'}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
