"""A TCP server that handles each request with the next handler of a list, byte for byte."""

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass

_TIMEOUT_S = 30.0


@dataclass
class ReceivedRequest:
    """One request as received."""

    line: str
    headers: dict[str, str]
    body: bytes
    received_at: float


class ScriptedServer:
    """Calls ``handlers`` in order, one per request; the last one handles all further requests.

    A handler is a function of a :class:`ScriptedConnection`, which is closed afterwards.
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
            # Closing a listener does not wake a thread in accept().
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
                handler = self.handlers[min(len(self.requests), len(self.handlers) - 1)]
                self.requests.append(request)
            handler(ScriptedConnection(connection, self._stopped))


class ScriptedConnection:
    """The connection of one request, for its handler."""

    def __init__(self, connection, stopped):
        self._connection = connection
        self._stopped = stopped

    def send(self, data):
        self._connection.sendall(data)

    def send_repeatedly(self, chunk, pause_s=0.0):
        """Send the same bytes until the client disconnects or the test ends."""
        while not self._stopped.is_set():
            self.send(chunk)
            self._stopped.wait(pause_s)

    def wait(self):
        self._stopped.wait(_TIMEOUT_S)


def answer(status, body, **headers):
    """Send a complete HTTP response; underscores in header names stand for hyphens."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return lambda connection: connection.send("\r\n".join([*lines, "", ""]).encode() + data)


def problem(status, code, detail="no reason", **headers):
    """Send problem details as the API does."""
    content = {"status": status, "code": code, "detail": detail, "request_id": "r1"}
    return answer(status, content, Content_Type="application/problem+json", **headers)


def raw(data):
    """Send any bytes and close."""
    return lambda connection: connection.send(data)


def drop(connection):
    """Close without a response."""


def silence(connection):
    """Keep the connection open and send nothing."""
    connection.wait()


def trickle(head, chunk, pause_s=0.02):
    """Send ``head``, then ``chunk`` repeatedly without end."""

    def handler(connection):
        connection.send(head)
        connection.send_repeatedly(chunk, pause_s)

    return handler


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
