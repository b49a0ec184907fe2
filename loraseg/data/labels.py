"""Label spaces: ordered class names, matched across data sets by name, and ``classes.json``."""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from loraseg.data.palette import class_colors
from loraseg.errors import DatasetError
from loraseg.storage.json_io import parse_json
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["IGNORE", "LabelSpace", "parse_classes", "read_classes", "write_classes"]

IGNORE = 255
_MAX_BYTES = 2**24


@dataclass(frozen=True)
class LabelSpace:
    """Class names; the id of a class is its index in ``names``, and 255 is ignored.

    Names are compared without case and repeated blanks ("Traffic  Sign" equals "traffic sign").
    Their case is kept, because prompts contain them.

    Raises:
        DatasetError: No names, over 255 names, an empty or unprintable name, or two equal ones.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= IGNORE:
            raise DatasetError(f"a label space needs 1 to {IGNORE} classes, got {len(self.names)}")
        seen: dict[str, str] = {}
        for name in self.names:
            if not name.strip() or not name.isprintable():
                raise DatasetError(f"class name {name!r}: expected printable text")
            if (key := _match_key(name)) in seen:
                raise DatasetError(
                    f"class name {name!r} appears twice (first as {seen[key]!r}); "
                    "names are compared without regard to case and blanks"
                )
            seen[key] = name
        tidy = tuple(unicodedata.normalize("NFC", " ".join(name.split())) for name in self.names)
        object.__setattr__(self, "names", tidy)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def palette(self) -> UInt8[ndarray, "n 3"]:
        """One RGB colour per class; a class has the same colour in every label space."""
        colors = class_colors(self.names)
        colors.setflags(write=False)
        return colors

    def index(self, name: str) -> int:
        """Return the id of a class.

        Raises:
            DatasetError: No class of that name.
        """
        index = self._index.get(_match_key(name))
        if index is None:
            raise DatasetError(f"no class {name!r} among {', '.join(self.names)}")
        return index

    def remap_table(self, target: "LabelSpace") -> UInt8[ndarray, "256"]:
        """Return the table ``t`` with ``t[mask]`` in the ids of ``target``.

        Classes that ``target`` lacks, ids outside this space and 255 become 255.
        """
        table = np.full(256, IGNORE, dtype=np.uint8)
        for index, name in enumerate(self.names):
            table[index] = target._index.get(_match_key(name), IGNORE)
        return table

    @cached_property
    def _index(self) -> dict[str, int]:
        return {_match_key(name): index for index, name in enumerate(self.names)}


def read_classes(path: str | Path) -> LabelSpace:
    """Read ``classes.json``.

    The classes, at the top or under the key "classes", are one of: a list of names (id = index), a
    list of ``{"id": 0, "name": "road"}``, a mapping ``{"road": 0}`` or a mapping ``{"0": "road"}``.
    Other keys of the objects are allowed and ignored, but "ignore_index", if there, must be 255.

    Raises:
        DatasetError: The file is missing, not UTF-8 JSON, of another form, its ids are not
            0..n-1, each once, or as in :class:`LabelSpace`.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot read the class list: {error.strerror}") from error
    return parse_classes(data, str(path))


def parse_classes(data: bytes, where: str) -> LabelSpace:
    """Read the bytes of a ``classes.json``, by the rules of :func:`read_classes`.

    Args:
        data: The file's bytes.
        where: Name of the file, for messages.

    Raises:
        DatasetError: As for :func:`read_classes`.
    """
    content = parse_json(data, where, max_bytes=_MAX_BYTES, error=DatasetError)
    try:
        return LabelSpace(_parse_names(content))
    except ValueError as error:  # DatasetError is one; so is an id of thousands of digits
        raise DatasetError(f"{where}: {error}") from error


def write_classes(path: str | Path, label_space: LabelSpace) -> None:
    """Write ``classes.json`` in the list-of-objects form, with the display colours."""
    classes = [
        {"id": index, "name": name, "color": [int(channel) for channel in color]}
        for index, (name, color) in enumerate(
            zip(label_space.names, label_space.palette, strict=True)
        )
    ]
    text = json.dumps({"ignore_index": IGNORE, "classes": classes}, indent=1, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _match_key(name: str) -> str:
    return unicodedata.normalize("NFC", " ".join(name.split())).casefold()


def _parse_names(content: Any) -> tuple[str, ...]:
    if isinstance(content, Mapping) and "classes" in content:
        mapping = cast(Mapping[str, Any], content)
        ignore = mapping.get("ignore_index", IGNORE)
        if ignore != IGNORE:
            raise DatasetError(f"ignore_index {ignore!r}: masks must mark ignored pixels by 255")
        content = mapping["classes"]
    by_id: dict[int, str] = {}
    for index, name in _id_name_pairs(content):
        if not isinstance(name, str) or isinstance(index, bool) or not isinstance(index, int):
            raise DatasetError(f"class {name!r} with id {index!r}: expected text and an integer")
        if index in by_id:
            raise DatasetError(f"id {index} belongs to both {by_id[index]!r} and {name!r}")
        by_id[index] = name
    if sorted(by_id) != list(range(len(by_id))):
        raise DatasetError(f"class ids must be 0 to {len(by_id) - 1}, got {sorted(by_id)}")
    return tuple(by_id[index] for index in range(len(by_id)))


def _id_name_pairs(content: Any) -> list[tuple[Any, Any]]:
    """Return (id, name) pairs of any of the accepted forms, not yet checked."""
    if isinstance(content, Mapping):
        items = list(cast(Mapping[str, Any], content).items())
        if all(key.isdecimal() and isinstance(value, str) for key, value in items):
            return [(int(key), value) for key, value in items]
        return [(value, key) for key, value in items]
    if isinstance(content, list):
        entries = cast(list[Any], content)
        if all(isinstance(entry, Mapping) for entry in entries):
            return [(entry.get("id"), entry.get("name")) for entry in entries]
        return list(enumerate(entries))
    raise DatasetError(f"expected a list or an object of classes, got {type(content).__name__}")
