import asyncio
import email.parser
import email.policy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from loraseg.errors import ServiceError
from loraseg.serving.http_api.forms import BodyBudget, read_submission

BOUNDARY = "----b0undary"
# Names as browsers send them; contents of any bytes, also parts of the boundary.
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters='"\\\r\n\0'), min_size=1, max_size=12
)
PIECES = st.sampled_from(
    [b"\r\n", b"--", b"\r\n--", BOUNDARY[:-1].encode(), b"\r", b"\n", b"x", b"\0"]
)
CONTENTS = st.lists(PIECES, max_size=12).map(b"".join)


def form(parts, boundary=BOUNDARY):
    body = b""
    for name, file, content in parts:
        file_name = "" if file is None else f'; filename="{file}"'
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file_name}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


def parse(body, *, kind=f"multipart/form-data; boundary={BOUNDARY}", query=b"", chunk=7, **options):
    pieces = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]
    messages = iter(
        {"type": "http.request", "body": piece, "more_body": n + 1 < len(pieces)}
        for n, piece in enumerate(pieces)
    )

    async def receive():
        return next(messages)

    scope = {
        "type": "http",
        "path": "/",
        "query_string": query,
        "headers": [(b"content-type", kind.encode()), (b"host", b"service")],
    }
    arguments = {"max_files": 3, **options}
    budget = arguments.pop("budget", BodyBudget(10**6))
    with budget.reserve() as consume:
        return asyncio.run(read_submission(Request(scope, receive), consume, "image", **arguments))


def error_code(body, **options):
    with pytest.raises(ServiceError) as caught:
        parse(body, **options)
    return caught.value.code


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(NAMES.filter(lambda n: n != "image"), CONTENTS), max_size=4), CONTENTS)
def test_parts_are_unchanged_and_the_email_parser_finds_as_many(fields, image):
    fields = [(name, content) for name, content in fields]
    body = form([*((n, None, c) for n, c in fields), ("image", "a.png", image)])
    submission = parse(body)
    assert [(n, t.encode()) for n, t in submission.fields] == fields
    assert [bytes(f.data) for f in submission.files] == [image]
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n".encode() + body
    )
    assert len(message.get_payload()) == len(fields) + 1


def test_preamble_epilogue_and_padding_are_ignored():
    body = (
        b"preamble\r\n" + form([("image", "a", b"x")]).replace(b"y\r\n", b"y \t\r\n") + b"epilogue"
    )
    assert bytes(parse(body).files[0].data) == b"x"


def test_query_comes_before_the_form():
    submission = parse(
        form([("image", "a", b"x"), ("mode", None, b"base")]), query=b"mode=fused&mode=%C3%BC"
    )
    assert submission.fields == [("mode", "fused"), ("mode", "ü"), ("mode", "base")]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nothing",
        form([("image", "a", b"x")])[:-10],
        form([("image", "a", b"x")]).replace(b'name="image"; ', b""),
        form([("image", "a", b"x")]).replace(b"form-data", b"attachment"),
        form([("image", "a", b"x")]).replace(b"\r\n\r\n", b"\r\n"),
        form([("image", "a", b"x")]).replace(b"\r\n", b"\n"),
        f"--{BOUNDARY}\r\n\r\nno header\r\n--{BOUNDARY}--".encode(),
        f"--{BOUNDARY}x\r\n\r\n\r\n--{BOUNDARY}--".encode(),
        f"--{BOUNDARY}\r\n".encode() + b"X: " + b"y" * 5000 + b"\r\n\r\n",
        form([("\udc80".encode("utf-8", "surrogatepass").decode("latin-1"), None, b"\xff")]),
        form([(f"f{n}", None, b"") for n in range(601)]),
        form([("classes", None, b"x" * 600_000)]),
        b"\r\n--" * 50_000,
        f"\r\n--{BOUNDARY}".encode() * 20_000,
    ],
    ids=range(15),
)
def test_malformed_forms_are_rejected(body):
    assert error_code(body, chunk=10_000) == "bad_request"


def test_the_number_of_files_is_limited():
    assert error_code(form([("image", str(n), b"") for n in range(4)])) == "invalid"
    assert error_code(form([("classes", None, b"road")])) == "invalid"


def test_the_budget_is_released_after_each_body_and_after_an_error():
    budget = BodyBudget(400)
    body = form([("image", "a", b"x" * 100)])
    for _ in range(3):
        parse(body, budget=budget)
    assert error_code(form([("image", "a", b"x" * 400)]), budget=budget) == "overloaded"
    parse(body, budget=budget)
