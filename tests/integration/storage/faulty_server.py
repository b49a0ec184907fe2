"""A tiny S3 server whose answers can be made to fail, one scripted fault a request."""

import base64
import contextlib
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_CODES = {400: "InvalidArgument", 409: "ConditionalRequestConflict", 429: "TooManyRequests"}


class FaultyServer:
    """Keeps objects in ``objects`` (path -> (bytes, metadata)); takes a fault from ``faults``.

    Faults: a status code is answered before anything is done; "drop" closes the connection before,
    "lose" after the work was done, so that only the answer is lost; "fail" answers 500 although the
    work was done; "cut" sends half a body, "delay" everything, but late.
    """

    delay_s = 1.0

    def __init__(self):
        self.objects = {}
        self.faults = []
        self.seen = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

            def do_GET(self):
                owner._serve(self)

            do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def _serve(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self._next_fault(request)
        if fault == "delay":
            time.sleep(self.delay_s)
        if fault == "drop":
            request.close_connection = True
            return
        if isinstance(fault, int):
            status, answer, headers = fault, _error(_CODES.get(fault, "SlowDown")), {}
        else:
            status, answer, headers = self._handle(request, body)
        if fault == "lose":
            request.close_connection = True
            return
        if fault == "fail":
            status, answer, headers = 500, _error("InternalError"), {}
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        if fault == "cut":
            request.wfile.write(answer[: len(answer) // 2])
            request.close_connection = True
        elif request.command != "HEAD":
            request.wfile.write(answer)

    def _next_fault(self, request):
        self.seen.append(request)
        return self.faults.pop(0) if self.faults else None

    def _handle(self, request, body):
        data, metadata = self.objects.get(request.path, (None, {}))
        if request.command == "PUT":
            return self._put(request, body, data)
        if data is None:
            return 404, _error("NoSuchKey"), {}
        if request.command == "DELETE":
            del self.objects[request.path]
            return 204, b"", {}
        return 200, data, {"ETag": _etag(data), **metadata}

    def _put(self, request, body, data):
        claimed = request.headers["Content-MD5"]
        if claimed != base64.b64encode(hashlib.md5(body).digest()).decode():
            return 400, _error("BadDigest"), {}
        expected = request.headers.get("If-Match")
        if request.headers.get("If-None-Match") == "*" and data is not None:
            return 412, _error("PreconditionFailed"), {}
        if expected is not None and (data is None or expected != _etag(data).strip('"')):
            return 412, _error("PreconditionFailed"), {}
        metadata = {k: v for k, v in request.headers.items() if k.lower().startswith("x-amz-meta")}
        self.objects[request.path] = (body, metadata)
        return 200, b"", {"ETag": _etag(body)}


def _etag(data):
    return f'"{hashlib.md5(data).hexdigest()}"'


def _error(code):
    return f"<Error><Code>{code}</Code><Message>scripted</Message></Error>".encode()
