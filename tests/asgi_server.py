"""Serve an ASGI app on a TCP port from a thread of this process."""

import contextlib
import socket
import threading

import uvicorn


@contextlib.contextmanager
def serve_on_free_port(app, tls=None):
    """Serve an app, with TLS if ``tls`` is (certificate, key); yield the port."""
    files = {} if tls is None else {"ssl_certfile": tls[0], "ssl_keyfile": tls[1]}
    options = {"log_config": None, "lifespan": "off", "ws": "none", "timeout_graceful_shutdown": 5}
    server = uvicorn.Server(uvicorn.Config(app, **options, **files))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
