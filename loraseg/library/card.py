"""The card of an adapter, ``card.json``: base, classes, centroids, recipe and metrics."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from loraseg.errors import IntegrityError
from loraseg.library.centroid import Centroid, CentroidFile
from loraseg.storage.json_io import canonical_json, parse_json_as

__all__ = [
    "MAX_CARD_BYTES",
    "AdapterCard",
    "BaseModelInfo",
    "CardFile",
    "Role",
    "TrainingSet",
    "check_digest",
    "check_name",
]

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
    """The training data of an adapter: sha256 (hex) of the samples, and number of images."""

    digest: str
    images: int

    def __post_init__(self) -> None:
        """Check digest and count."""
        check_digest(self.digest, "training set")
        if self.images < 0:
            raise IntegrityError(f"training set: {self.images} images")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterCard:
    """The card of an adapter. Equal cards give equal bytes; it holds no time stamp.

    Readers ignore unknown fields, so that fields can be added, and reject a card with a higher
    schema number.

    Attributes:
        name: Lower-case letters, digits, ``.``, ``_`` and ``-``; at most 128, no leading sign.
        role: The kind of model that the adapter is for.
        base: The model that the adapter was trained on.
        label_space: Class names in the order of their ids; empty if unknown.
        centroids: Mean embeddings of the domain, usually one.
        recipe: The full training config as JSON values.
        training: The training data; None if unknown.
        metrics: JSON values, such as ``{"miou": 0.41}``; finite.
        code_revision: Revision of the training code; empty if unknown.
        parents: Digests of adapters that it was derived from.
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
        """Check ranges and JSON values.

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
    def from_file(
        cls, values: "CardFile", centroids: tuple[Centroid, ...] | None = None
    ) -> "AdapterCard":
        """Build a card from the values of ``card.json``.

        Args:
            values: The parsed file.
            centroids: Replace those of ``values``.

        Raises:
            IntegrityError: A value is out of range.
        """
        if centroids is None:
            centroids = tuple(Centroid.from_file(item) for item in values.centroids)
        return cls(
            name=values.name,
            role=values.role,
            base=values.base,
            label_space=values.label_space,
            centroids=centroids,
            recipe=values.recipe,
            training=values.training,
            metrics=values.metrics,
            code_revision=values.code_revision,
            parents=values.parents,
        )

    @classmethod
    def from_bytes(
        cls, data: bytes, centroids: tuple[Centroid, ...] | None = None
    ) -> "AdapterCard":
        """Read ``card.json``.

        Args:
            data: The file, from an untrusted source.
            centroids: Replace those of the file.

        Raises:
            IntegrityError: The file is too large, not a card or of a newer schema, or a value has
                another type or is out of range.
        """
        values = parse_json_as(
            CardFile,
            data,
            "card",
            max_bytes=MAX_CARD_BYTES,
            error=IntegrityError,
            version=("schema", SCHEMA_VERSION),
        )
        return cls.from_file(values, centroids)


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFile:
    """The values of ``card.json``; other keys are ignored, as cards may grow."""

    schema: Literal[1]
    name: str
    role: Role
    base: BaseModelInfo
    label_space: tuple[str, ...] = ()
    centroids: tuple[CentroidFile, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    training: TrainingSet | None = None
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    code_revision: str = ""
    parents: tuple[str, ...] = ()


def check_name(name: str) -> str:
    """Return ``name`` if it is a valid adapter name.

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
