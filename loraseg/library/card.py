"""What is known about an adapter: ``card.json``, validated whenever it is read."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from loraseg.errors import IntegrityError
from loraseg.library.centroid import Centroid

__all__ = ["MAX_CARD_BYTES", "AdapterCard", "BaseModelInfo", "Role", "TrainingSet", "check_name"]

Role = Literal["segmenter", "generator"]

SCHEMA_VERSION = 1
MAX_CARD_BYTES = 4 * 2**20
_MAX_CLASSES = 65_536
_MAX_CENTROIDS = 1024
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class BaseModelInfo:
    """The frozen model that the adapter was trained on: its name and sha256 (hex)."""

    name: str
    digest: str

    def __post_init__(self) -> None:
        """Check the digest."""
        check_digest(self.digest, "base")


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What the adapter was trained on: sha256 (hex) of the samples, and how many images."""

    digest: str
    images: int

    def __post_init__(self) -> None:
        """Check digest and count."""
        check_digest(self.digest, "training set")
        if self.images < 0:
            raise IntegrityError(f"training set: {self.images} images")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterCard:
    """An adapter's card. Equal cards give equal bytes; there is no time of day in it.

    Cards may grow: a reader ignores fields that it does not know, since those of schema 1 keep
    their meaning, and refuses a card of a higher schema number.

    Attributes:
        name: Lower-case letters, digits, ``.``, ``_`` and ``-``; at most 128, no leading sign.
        role: What the adapter is for.
        base: The model that it fits.
        label_space: Class names in the order of their ids; empty if unknown.
        centroids: Where its domain lies; usually one.
        recipe: The full training config as JSON values.
        training: What it was trained on; None if unknown.
        metrics: JSON values, such as ``{"miou": 0.41}``; finite.
        code_revision: Which code trained it; empty if unknown.
        parents: Digests of adapters that it was made from.
    """

    name: str
    role: Role
    base: BaseModelInfo
    label_space: tuple[str, ...] = ()
    centroids: tuple[Centroid, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    training: TrainingSet | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    code_revision: str = ""
    parents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what the types do not say.

        Raises:
            IntegrityError: A field is out of range or is not JSON.
        """
        check_name(self.name)
        _check_role(self.role)
        if len(self.label_space) > _MAX_CLASSES or len(self.centroids) > _MAX_CENTROIDS:
            raise IntegrityError(
                f"card {self.name!r}: {len(self.label_space)} classes, {len(self.centroids)} "
                f"centroids; at most {_MAX_CLASSES} and {_MAX_CENTROIDS}"
            )
        if len(set(self.label_space)) != len(self.label_space):
            raise IntegrityError(f"card {self.name!r}: a class name stands twice in label_space")
        for parent in self.parents:
            check_digest(parent, "parent")
        _check_json(self.recipe, f"card {self.name!r}: recipe")
        _check_json(self.metrics, f"card {self.name!r}: metrics")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        training = self.training
        return {
            "schema": SCHEMA_VERSION,
            "name": self.name,
            "role": self.role,
            "base": {"name": self.base.name, "digest": self.base.digest},
            "label_space": list(self.label_space),
            "centroids": [centroid.to_json() for centroid in self.centroids],
            "recipe": dict(self.recipe),
            "training": training and {"digest": training.digest, "images": training.images},
            "metrics": dict(self.metrics),
            "code_revision": self.code_revision,
            "parents": list(self.parents),
        }

    def to_bytes(self) -> bytes:
        """Return ``card.json``.

        Raises:
            IntegrityError: It would exceed 4 MiB.
        """
        data = canonical_json(self.to_json())
        if len(data) > MAX_CARD_BYTES:
            raise IntegrityError(f"card {self.name!r}: {len(data)} bytes, at most {MAX_CARD_BYTES}")
        return data

    @classmethod
    def from_json(cls, values: Any, centroids: tuple[Centroid, ...] | None = None) -> "AdapterCard":
        """Build a card from plain JSON values.

        Args:
            values: As :meth:`to_json` gives them.
            centroids: To take instead of those among ``values``.

        Raises:
            IntegrityError: It is not a card, is of a newer schema, or a field is wrong.
        """
        card = _mapping(values, "card")
        schema = card.get("schema")
        if schema != SCHEMA_VERSION:
            raise IntegrityError(
                f"card: schema {schema!r}; this version of loraseg reads {SCHEMA_VERSION}"
            )
        base = _mapping(card.get("base"), "card: base")
        training = card.get("training")
        if centroids is None:
            centroids = tuple(
                Centroid.from_json(_mapping(item, "card: centroid"))
                for item in _list(card, "centroids")
            )
        return cls(
            name=_text(card, "name"),
            role=_check_role(_text(card, "role")),
            base=BaseModelInfo(_text(base, "name"), _text(base, "digest")),
            label_space=_texts(card, "label_space"),
            centroids=centroids,
            recipe=_mapping(card.get("recipe", {}), "card: recipe"),
            training=None if training is None else _training(_mapping(training, "card: training")),
            metrics=_mapping(card.get("metrics", {}), "card: metrics"),
            code_revision=_text(card, "code_revision") if "code_revision" in card else "",
            parents=_texts(card, "parents"),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "AdapterCard":
        """Read ``card.json``.

        Raises:
            IntegrityError: As :meth:`from_json`, or it is too large or not JSON.
        """
        return cls.from_json(parse_json(data, "card", MAX_CARD_BYTES))


def check_name(name: str) -> str:
    """Return ``name`` if an adapter may have it.

    Raises:
        IntegrityError: It does not match ``[a-z0-9][a-z0-9._-]{0,127}``.
    """
    if not _NAME.fullmatch(name):
        raise IntegrityError(
            f"adapter name {name[:140]!r}: expected 1 to 128 of a-z, 0-9, '.', '_', '-', "
            "the first a letter or digit"
        )
    return name


def check_digest(digest: str, what: str) -> str:
    """Return ``digest`` if it is 64 lower-case hex digits.

    Raises:
        IntegrityError: It is not.
    """
    if not _DIGEST.fullmatch(digest):
        raise IntegrityError(f"{what}: digest {digest[:80]!r}, expected 64 hex digits (sha256)")
    return digest


def canonical_json(values: Any) -> bytes:
    """Return JSON with sorted keys and no spaces; equal values give equal bytes."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def parse_json(data: bytes, what: str, limit_bytes: int) -> Any:
    """Parse JSON that somebody else may have written.

    Raises:
        IntegrityError: It is larger than ``limit_bytes``, not JSON, nested too deeply, or holds
            NaN or an infinity.
    """
    if len(data) > limit_bytes:
        raise IntegrityError(f"{what}: {len(data)} bytes, at most {limit_bytes}")
    try:
        return json.loads(data.decode(), parse_constant=_reject_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{what}: not valid JSON ({error})") from error


def _reject_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _check_json(values: Any, where: str) -> None:
    if isinstance(values, Mapping):
        for key, value in cast(Mapping[Any, Any], values).items():
            if not isinstance(key, str):
                raise IntegrityError(f"{where}: key {key!r} is not text")
            _check_json(value, where)
    elif isinstance(values, list | tuple):
        for value in cast(Sequence[Any], values):
            _check_json(value, where)
    elif isinstance(values, float):
        if not math.isfinite(values):
            raise IntegrityError(f"{where}: {values} is not a finite number")
    elif not isinstance(values, str | int | None):
        raise IntegrityError(f"{where}: {type(values).__name__} is not a JSON value")


def _check_role(role: str) -> Role:
    if role not in get_args(Role):
        raise IntegrityError(f"card: role {role!r}, expected one of {', '.join(get_args(Role))}")
    return cast(Role, role)


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise IntegrityError(f"{where}: expected an object, got {type(values).__name__}")
    return cast(dict[str, Any], values)


def _list(values: dict[str, Any], key: str) -> list[Any]:
    items = values.get(key, [])
    if not isinstance(items, list):
        raise IntegrityError(f"card: {key}: expected a list, got {type(items).__name__}")
    return cast(list[Any], items)


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise IntegrityError(f"card: {key}: expected text, got {type(value).__name__}")
    return value


def _texts(values: dict[str, Any], key: str) -> tuple[str, ...]:
    items = _list(values, key)
    if not all(isinstance(item, str) for item in items):
        raise IntegrityError(f"card: {key}: expected a list of texts")
    return tuple(items)


def _training(values: dict[str, Any]) -> TrainingSet:
    images = values.get("images")
    if isinstance(images, bool) or not isinstance(images, int):
        raise IntegrityError(f"card: training images: expected an integer, got {images!r}")
    return TrainingSet(_text(values, "digest"), images)
