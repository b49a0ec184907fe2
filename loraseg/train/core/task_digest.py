"""Digests of tasks, which select checkpoints and published versions."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from loraseg import config as configuration

__all__ = ["task_digest"]


def task_digest(version: int, parts: Mapping[str, Any], *, compact: bool = True) -> str:
    """Return the sha256 of everything that decides a task's result, as canonical JSON.

    Equal digests mean equal results: they select checkpoints and published versions, so the JSON of
    existing tasks must not change.

    Args:
        version: Raised when the same parts would give another result; the key "format" of the JSON.
        parts: Config dataclasses and plain JSON values by name.
        compact: Write the JSON without spaces. Closed-set runs are digested with spaces.
    """
    content = {
        "format": version,
        **{
            name: configuration.to_dict(part) if dataclasses.is_dataclass(part) else part
            for name, part in parts.items()
        },
    }
    separators = (",", ":") if compact else None
    text = json.dumps(content, sort_keys=True, separators=separators)
    return hashlib.sha256(text.encode()).hexdigest()
