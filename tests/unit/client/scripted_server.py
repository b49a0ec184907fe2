"""A TCP server that answers each request with the next act of a script, byte for byte."""

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass

_TIMEOUT_S = 30.0


@dataclass
class ReceivedRequest:
    """One request as it came over the wire."""

    line: str
    headers: dict[str, str]
    body: bytes
    received_at: float


class ScriptedServer:
    """Plays ``handlers`` in order, one a request; further requests get the last one again.

    An act is a function of the connection. Connections are closed after each answer.
    """

    def __init__(self, handlers):
        self.handlers = list(handlers)
        self.requests = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = []

    @contextlib.contextmanager
    def running(self):
        accepting = threading.Thread(target=self._accept)
        accepting.start()
        try:
            yield self
        finally:
            self._stopped.set()
            # Closing a listener does not wake a thread that waits on it.
            with contextlib.suppress(OSError):
                socket.create_connection(self._listener.getsockname(), 1).close()
            accepting.join()
            self._listener.close()
            for thread in self._threads:
                thread.join()

    def _accept(self):
        while True:
            connection, _ = self._listener.accept()
            if self._stopped.is_set():
                connection.close()
                return
            thread = threading.Thread(target=self._handle, args=(connection,))
            thread.start()
            self._threads.append(thread)

    def _handle(self, connection):
        connection.settimeout(_TIMEOUT_S)
        with connection, contextlib.suppress(OSError):
            request = _read_request(connection)
            if request is None:
                return
            with self._lock:
                act = self.handlers[min(len(self.requests), len(self.handlers) - 1)]
                self.requests.append(request)
            act(ScriptedConnection(connection, self._stopped))


class ScriptedConnection:
    """What an act may do."""

    def __init__(self, connection, stopped):
        self._connection = connection
        self._stopped = stopped

    def send(self, data):
        self._connection.sendall(data)

    def send_repeatedly(self, chunk, pause_s=0.0):
        """Send the same bytes until the client leaves or the test ends."""
        while not self._stopped.is_set():
            self.send(chunk)
            self._stopped.wait(pause_s)

    def wait(self):
        self._stopped.wait(_TIMEOUT_S)


def answer(status, body, **headers):
    """Answer with a complete HTTP response; names of headers are written with underscores."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return lambda stage: stage.send("\r\n".join([*lines, "", ""]).encode() + data)


def problem(status, code, detail="no reason", **headers):
    """Answer with problem details as the API words them."""
    content = {"status": status, "code": code, "detail": detail, "request_id": "r1"}
    return answer(status, content, Content_Type="application/problem+json", **headers)


def raw(data):
    """Send bytes that need not be HTTP, and close."""
    return lambda stage: stage.send(data)


def drop(stage):
    """Close without an answer."""


def silence(stage):
    """Keep the connection and say nothing."""
    stage.wait()


def trickle(head, chunk, pause_s=0.02):
    """Send something, then a little again and again, for ever."""

    def act(stage):
        stage.send(head)
        stage.send_repeatedly(chunk, pause_s)

    return act


def _read_request(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return None
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    line, *rest = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in rest)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return ReceivedRequest(line, headers, body, time.monotonic())
