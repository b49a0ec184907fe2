"""A proxy in front of a real S3 server that disturbs a share of all requests."""

import contextlib
import http.client
import threading
import urllib.parse
from collections import Counter
from http.server import ThreadingHTTPServer

from loraseg.seeding import numpy_generator
from tests.integration.storage.faulty_server import FaultyServer

FAULTS = ("drop", "lose", "fail", "cut", "delay", 500, 503, 429)
# Headers of one hop, and headers that the proxy sets.
_NOT_FORWARDED = set(
    ["connection", "keep-alive", "expect", "content-length", "transfer-encoding", "date", "server"]
)


class FlakyProxy(FaultyServer):
    """Disturbs ``share`` of the requests; the fault of request n depends on seed and n only.

    Faults in ``faults`` come first, as in the base class. Clients sign for the proxy's address.
    Their Host header is forwarded unchanged: the server checks the signature against the header,
    not against its own address.
    """

    def __init__(self, upstream, *, share=0.0, seed=0):
        super().__init__()
        self._upstream = urllib.parse.urlsplit(upstream).netloc
        self._share = share
        self._random = numpy_generator(seed, "proxy")
        self._lock = threading.Lock()
        self._idle = []
        self._is_down = False
        self.counts = Counter()

    @contextlib.contextmanager
    def running(self):
        with super().running():
            yield self
        while self._idle:
            self._idle.pop().close()

    @contextlib.contextmanager
    def outage(self):
        """Close the port and all connections while the context lasts."""
        address, handler = self._server.server_address, self._server.RequestHandlerClass
        self._is_down = True
        self._server.shutdown()
        self._server.server_close()
        try:
            yield
        finally:
            self._server = ThreadingHTTPServer(address, handler)
            self._server.daemon_threads = True
            self._is_down = False
            threading.Thread(target=self._server.serve_forever, args=(0.05,)).start()

    def _next_fault(self, request):
        with self._lock:
            fault = self.faults.pop(0) if self.faults else self._draw()
            if self._is_down:
                fault = "drop"
            self.counts["requests"] += 1
            if fault is not None:
                self.counts[f"{fault} {request.command}"] += 1
        return fault

    def _draw(self):
        value, index = self._random.random(), int(self._random.integers(len(FAULTS)))
        return FAULTS[index] if value < self._share else None

    def _handle(self, request, body):
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _NOT_FORWARDED}
        if body or request.command in ("PUT", "POST"):
            headers["Content-Length"] = str(len(body))
        try:
            status, content, response_headers = self._forward(request, body, headers)
        except (OSError, http.client.HTTPException):
            with self._lock:
                self.counts["no answer"] += 1
            return 502, b"", {}
        forwarded = {k: v for k, v in response_headers if k.lower() not in _NOT_FORWARDED}
        return status, content, forwarded

    def _forward(self, request, body, headers):
        with contextlib.ExitStack() as cleanup:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = http.client.HTTPConnection(self._upstream, timeout=60)
            cleanup.callback(connection.close)
            connection.putrequest(
                request.command, request.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            result = response.status, response.read(), response.getheaders()
            cleanup.pop_all()
            self._idle.append(connection)
            return result
