"""Parse request bodies: raw images and multipart forms, without copies of the files.

There is no form library here: bodies are limited and in memory, so that one search per part finds
its end, in linear time for any content.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import parse_qsl

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from loraseg.errors import ServiceError

__all__ = ["BodyBudget", "FormSubmission", "UploadedFile", "query_fields", "read_submission"]

RAW_TYPES = ("image/png", "image/jpeg", "application/octet-stream")
_MAX_FIELDS = 600
# Enough for 255 class names of 100 characters, each written as two JSON escapes.
_MAX_TEXT_BYTES = 512 * 1024
_MAX_HEADER_BYTES = 4096
_BOUNDARY_LENGTHS = range(1, 71)  # RFC 2046, section 5.1.1


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """An uploaded file; its name is untrusted and never used as a path."""

    name: str
    data: memoryview


@dataclass(frozen=True, slots=True)
class FormSubmission:
    """Parameters of the query followed by those of the form, in order; and the files."""

    fields: Sequence[tuple[str, str]]
    files: Sequence[UploadedFile]


class BodyBudget:
    """Limits the bytes of all bodies in memory. Used from one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self._free = limit_bytes

    @contextmanager
    def reserve(self) -> Generator[Callable[[int], None], None, None]:
        """Yield a function that counts received bytes; they are released at exit.

        The function raises ServiceError ``overloaded`` beyond the limit.
        """
        held = 0

        def consume(length: int) -> None:
            nonlocal held
            held += length
            self._free -= length
            if self._free < 0:
                raise ServiceError(
                    "overloaded", "Too many bodies are in memory.", retry_after_s=2.0
                )

        try:
            yield consume
        finally:
            self._free += held


async def read_submission(
    request: Request, consume: Callable[[int], None], file_field: str, *, max_files: int
) -> FormSubmission:
    """Read a request's parameters and files.

    Args:
        request: Its body has not been read.
        consume: From :meth:`BodyBudget.reserve`.
        file_field: Name of the form field with the files.
        max_files: Maximum number of files.

    Raises:
        ServiceError: ``unsupported_media_type``; ``bad_request`` for a malformed form;
            ``invalid`` for too many files or none; ``overloaded``.
    """
    query = query_fields(request)
    media_type_bytes, options = parse_options_header(request.headers.get("content-type"))
    media_type = media_type_bytes.decode("latin-1")
    if media_type == "multipart/form-data":
        boundary = options.get(b"boundary", b"")
        if len(boundary) not in _BOUNDARY_LENGTHS:
            raise ServiceError("bad_request", "multipart/form-data without a valid boundary.")
        form, files = _parse_form(
            await _read_body(request, consume), boundary, file_field, max_files
        )
        if not files:
            raise ServiceError("invalid", f"The form has no field {file_field!r} with a file.")
        return FormSubmission([*query, *form], files)
    if media_type in RAW_TYPES and file_field == "image":
        return FormSubmission(
            query, [UploadedFile("", memoryview(await _read_body(request, consume)))]
        )
    expected = ["multipart/form-data", *(RAW_TYPES if file_field == "image" else ())]
    raise ServiceError(
        "unsupported_media_type",
        f"Content-Type {media_type[:80]!a}: expected {', '.join(expected)}.",
    )


def query_fields(request: Request) -> list[tuple[str, str]]:
    """Return the query's parameters in order.

    Raises:
        ServiceError: ``bad_request``: there are too many, or they are not UTF-8.
    """
    try:
        text = request.scope["query_string"].decode("ascii")
        return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS)
    except ValueError as error:
        raise ServiceError(
            "bad_request", f"The query is not UTF-8, or has over {_MAX_FIELDS} parameters."
        ) from error


async def _read_body(request: Request, consume: Callable[[int], None]) -> bytes:
    chunks: list[bytes] = []
    more = True
    while more:
        message = await request.receive()
        chunks.append(message.get("body", b""))
        consume(len(chunks[-1]))
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _parse_form(
    body: bytes, boundary: bytes, file_field: str, max_files: int
) -> tuple[list[tuple[str, str]], list[UploadedFile]]:
    """Split a multipart body (RFC 7578) into fields and files."""
    fields: list[tuple[str, str]] = []
    files: list[UploadedFile] = []
    room = _MAX_TEXT_BYTES
    for header, data in _split_parts(body, b"--" + boundary):
        name, file_name = _parse_disposition(header)
        if name == file_field:
            files.append(UploadedFile(file_name[:255], data))
            if len(files) > max_files:
                raise ServiceError("invalid", f"{file_field}: at most {max_files} file(s).")
            continue
        room -= len(data)
        if room < 0 or len(fields) >= _MAX_FIELDS:
            raise ServiceError(
                "bad_request",
                f"Over {_MAX_FIELDS} parameters, or over {_MAX_TEXT_BYTES} bytes of parameters.",
            )
        fields.append((name, _decode_text(bytes(data))))
    return fields, files


def _split_parts(body: bytes, delimiter: bytes) -> list[tuple[bytes, memoryview]]:
    """Return header block and content of each part."""
    view = memoryview(body)
    parts: list[tuple[bytes, memoryview]] = []
    # A delimiter includes the line break before it, except at the start of the body.
    start = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if start == 1:
        raise ServiceError("bad_request", "The form does not contain its boundary.")
    while True:
        start += len(delimiter)
        if body.startswith(b"--", start):
            return parts
        line_end = body.find(b"\r\n", start, start + 128)
        header_end = body.find(b"\r\n\r\n", line_end, line_end + _MAX_HEADER_BYTES)
        if line_end < 0 or body[start:line_end].strip(b" \t") or header_end < 0:
            raise ServiceError("bad_request", "A part of the form has no valid header.")
        end = body.find(b"\r\n" + delimiter, header_end + 2)
        if end < 0:
            raise ServiceError("bad_request", "The form is cut off.")
        parts.append(
            (body[line_end + 2 : header_end], view[header_end + 4 : max(end, header_end + 4)])
        )
        if len(parts) > 2 * _MAX_FIELDS:
            raise ServiceError("bad_request", "The form has too many parts.")
        start = end + 2


def _parse_disposition(header: bytes) -> tuple[str, str]:
    """Return field name and file name of a part."""
    for line in header.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            disposition, options = parse_options_header(value.strip())
            if disposition == b"form-data" and b"name" in options:
                return _decode_text(options[b"name"]), _decode_text(options.get(b"filename", b""))
    raise ServiceError("bad_request", "A part of the form has no name.")


def _decode_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ServiceError("bad_request", "A field of the form is not UTF-8.") from error
