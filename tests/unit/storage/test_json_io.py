import dataclasses
from typing import Annotated, Literal

import pytest
from pydantic import ConfigDict, Field

from loraseg.errors import DatasetError, IntegrityError
from loraseg.storage.json_io import (
    canonical_json,
    parse_json,
    parse_json_as,
    parse_json_object,
    readable_json,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    size: int

    def __post_init__(self):
        if self.size == 13:
            raise IntegrityError("part: size 13")


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    name: str
    kind: Literal["a", "b"] = "a"
    share: Annotated[float, Field(ge=0, le=1)] = 0.0
    parts: tuple[Part, ...] = ()
    flag: bool = False


def read(data, **options):
    return parse_json_as(File, data, "x.json", max_bytes=1000, error=IntegrityError, **options)


def test_bytes_of_canonical_json():
    values = {"b": [1, 1e-05, 0.1, None, True], "a": {"ü": "\n"}}
    assert canonical_json(values) == b'{"a":{"\\u00fc":"\\n"},"b":[1,1e-05,0.1,null,true]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json([float("nan")])


def test_bytes_of_readable_json():
    assert readable_json({"b": [1], "a": "ü"}) == '{\n "a": "ü",\n "b": [\n  1\n ]\n}\n'.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON: 'utf-8' codec"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[" * 100_000, "not valid JSON: maximum recursion"),
        (b"[" + b"9" * 5000 + b"]", "not valid JSON: Exceeds the limit"),
        (b'[{"a": 1, "b": 2, "a": 1}]', "key 'a' appears twice"),
        (b" " * 200_001, "got 200001 bytes, expected at most 200000"),
    ],
)
def test_text_that_is_not_strict_json(data, message):
    for error in (IntegrityError, DatasetError):
        with pytest.raises(error, match=rf"^x\.json: (not valid JSON: )?{message}"):
            parse_json(data, "x.json", max_bytes=200_000, error=error)


def test_many_keys_with_a_duplicate_take_linear_time():
    keys = ",".join(f'"{index}":0' for index in range(100_000))
    with pytest.raises(IntegrityError, match="key '0' appears twice"):
        parse_json(f'{{{keys},"0":1}}'.encode(), "x", max_bytes=10**7, error=IntegrityError)


def test_objects():
    assert parse_json_object(b'{"a": 1}', "x", max_bytes=9, error=DatasetError) == {"a": 1}
    with pytest.raises(DatasetError, match="x: got list, expected a JSON object"):
        parse_json_object(b"[]", "x", max_bytes=9, error=DatasetError)


def test_typed_values():
    data = b'{"format": 1, "name": "n", "share": 1, "parts": [{"size": 2}]}'
    assert read(data, version=("format", 1)) == File(1, "n", "a", 1.0, (Part(2),))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"3", "got int, expected a JSON object"),
        (b'{"format": 1}', "name is missing"),
        (b'{"format": 1, "name": "n", "nam": 1}', "nam is not a known key"),
        (b'{"format": 1, "name": 3}', "name: got 3, expected a valid string"),
        (b'{"format": true, "name": "n"}', "format: got True, expected a valid integer"),
        (b'{"format": 1.0, "name": "n"}', "format: got 1.0, expected a valid integer"),
        (b'{"format": 1, "name": "n", "flag": 1}', "flag: got 1, expected a valid boolean"),
        (b'{"format": 1, "name": "n", "kind": "c"}', "kind: got 'c', expected 'a' or 'b'"),
        (b'{"format": 1, "name": "n", "share": 1.5}', "share: got 1.5, expected less than"),
        (b'{"format": 1, "name": "n", "parts": [{}]}', r"parts\.0\.size is missing"),
        (b'{"format": 1, "name": "n", "parts": [{"size": 13}]}', r"parts\.0: part: size 13"),
        (b'{"format": 1, "name": "\\ud800"}', "not valid JSON: unexpected end of hex escape"),
    ],
)
def test_values_of_other_types(data, message):
    with pytest.raises(IntegrityError, match=rf"^x\.json: {message}"):
        read(data)


@pytest.mark.parametrize("data", [b'{"format": 2}', b'{"format": true}', b'{"format": "1"}', b"{}"])
def test_version_is_checked_first(data):
    with pytest.raises(IntegrityError, match=r"format .*; this version of loraseg reads 1"):
        read(data, version=("format", 1))
