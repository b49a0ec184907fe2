"""Scores of a model's layers by a probe, as a file that selections are made from."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType, NoneType
from typing import Any

from loraseg.adapters.targets.unet import PROJECTION_PARTS, Projection, ProjectionPart
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage.json_io import canonical_json, parse_json_as

__all__ = ["MAX_REPORT_BYTES", "LayerReport", "LayerScore"]

REPORT_FORMAT = "loraseg layer report 1"
MAX_REPORT_BYTES = 2**26
_MAX_LAYERS = 2**16
_MAX_TEXT_LENGTH = 1024
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARTS = tuple(PROJECTION_PARTS.values())
_SCALAR_TYPES = (str, int, float, bool, NoneType)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerScore:
    """Score of one layer, with its place in the UNet if it is an attention projection.

    Attributes:
        name: Full dotted module name.
        score: Final score; not negative.
        history: Scores over the run, one per epoch unless the method defines otherwise.
        numel: Number of elements of its weight.
        block: As in :class:`~loraseg.adapters.targets.unet.Projection`, like the next three; all
            None for a layer that is not an attention projection.
        cross: Whether it belongs to cross-attention, over the text tokens.
        part: Which projection: query, key, value or output.
        factor: Side of the latent divided by the side of the layer's feature map.
    """

    name: str
    score: float
    history: tuple[float, ...] = ()
    numel: int
    block: str | None = None
    cross: bool | None = None
    part: ProjectionPart | None = None
    factor: int | None = None

    def __post_init__(self) -> None:
        if len(self.name) > _MAX_TEXT_LENGTH or not _NAME.fullmatch(self.name):
            raise ConfigError(f"layer report: {self.name[:80]!r} is not a dotted module name")
        for value in (self.score, *self.history):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"layer report: {self.name}: score {value}, expected a finite number from 0"
                )
        kind = (self.block, self.cross, self.part, self.factor)
        known = [value is not None for value in kind]
        if any(known) and not (all(known) and self.part in _PARTS):
            raise ConfigError(
                f"layer report: {self.name}: block, cross, part, factor are {kind}; expected all "
                f"of a projection, the part one of {', '.join(_PARTS)}, or none"
            )
        if self.numel < 1 or (self.factor is not None and self.factor < 1):
            raise ConfigError(
                f"layer report: {self.name}: numel {self.numel}, factor {self.factor}; expected "
                f"numbers from 1"
            )

    @classmethod
    def from_projection(
        cls, projection: Projection, score: float, history: Sequence[float] = ()
    ) -> "LayerScore":
        """Score an attention projection."""
        return cls(
            name=projection.name,
            score=float(score),
            history=tuple(float(value) for value in history),
            numel=projection.d_in * projection.d_out,
            block=projection.block,
            cross=projection.cross,
            part=projection.part,
            factor=projection.factor,
        )

    @property
    def is_projection(self) -> bool:
        """Whether it is an attention projection."""
        return self.part is not None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Scores of one model by one method, highest first, ties by name.

    Attributes:
        method: Name of the scoring method, such as ``gradient``.
        base_name: Name of the scored model.
        base_digest: sha256 (hex) of its weights.
        scores: One per layer, given in any order.
        samples: Sizes of the data behind the scores, such as ``{"images": 64, "epochs": 3}``.
        settings: Settings of the method, flat: strings, numbers, booleans, None, or lists of these.

    Raises:
        ConfigError: There is no layer, a name occurs twice or is not a module name, a score is
            negative or not finite, or a field is of the wrong type.
    """

    method: str
    base_name: str
    base_digest: str
    scores: tuple[LayerScore, ...]
    samples: Mapping[str, int]
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check(self)
        ranked = tuple(sorted(self.scores, key=lambda score: (-score.score, score.name)))
        object.__setattr__(self, "scores", ranked)
        for name in ("samples", "settings"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def projections(self) -> "LayerReport":
        """Return the report of the attention projections alone.

        Raises:
            ConfigError: The report has no attention projection.
        """
        kept = tuple(score for score in self.scores if score.is_projection)
        return replace(self, scores=kept)

    def top(self, k: int) -> tuple[str, ...]:
        """Return the names of the k layers with the highest scores, highest first.

        Raises:
            ConfigError: k is not in [1, number of layers].
        """
        if not 1 <= k <= len(self.scores):
            raise ConfigError(
                f"layer report: k = {k}, expected 1 to {len(self.scores)}, the number of layers"
            )
        return tuple(score.name for score in self.scores[:k])

    def overlap(self, other: "LayerReport", k: int) -> float:
        """Return |A and B| / |A or B| of the two top-k sets: 1 if equal, 0 if disjoint.

        Raises:
            ConfigError: k exceeds the layers of one of them, or they do not score the same layers.
        """
        if {score.name for score in self.scores} != {score.name for score in other.scores}:
            raise ConfigError(
                f"layer reports: {len(self.scores)} and {len(other.scores)} layers that are not "
                f"the same; expected reports on one kind of model"
            )
        mine, theirs = set(self.top(k)), set(other.top(k))
        return len(mine & theirs) / len(mine | theirs)

    def to_bytes(self) -> bytes:
        """Return canonical JSON; equal reports give equal bytes."""
        values = {
            "format": REPORT_FORMAT,
            **_field_values(self),
            "scores": [asdict(score) for score in self.scores],
            "samples": dict(self.samples),
            "settings": dict(self.settings),
        }
        return canonical_json(values) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> "LayerReport":
        """Read a report from an untrusted source.

        Raises:
            IntegrityError: The file is too large, not a report in canonical JSON, or a value is
                missing, of another type or out of range.
        """
        report = parse_json_as(
            cls,
            data,
            "layer report",
            max_bytes=MAX_REPORT_BYTES,
            error=IntegrityError,
            version=("format", REPORT_FORMAT),
        )
        if report.to_bytes() != data:
            raise IntegrityError(
                "layer report: not in canonical form (unknown keys, order, spaces or numbers)"
            )
        return report


def _field_values(report: LayerReport) -> dict[str, Any]:
    return {field.name: getattr(report, field.name) for field in fields(report)}


def _check(report: LayerReport) -> None:
    for name in ("method", "base_name"):
        text = getattr(report, name)
        if not text or len(text) > _MAX_TEXT_LENGTH or not text.isprintable():
            raise ConfigError(
                f"layer report: {name} {text[:80]!r}, expected 1 to {_MAX_TEXT_LENGTH} "
                f"printable characters"
            )
    if not _SHA256.fullmatch(report.base_digest):
        raise ConfigError(
            f"layer report: base_digest {report.base_digest[:80]!r}, expected 64 hex digits"
        )
    names = {score.name for score in report.scores}
    if len(report.scores) > _MAX_LAYERS:
        raise ConfigError(
            f"layer report: {len(report.scores)} layers, expected at most {_MAX_LAYERS}"
        )
    if not names or len(names) != len(report.scores):
        raise ConfigError(
            f"layer report: {len(report.scores)} layers with {len(names)} names, expected at least "
            f"one layer and each once"
        )
    for key in (*report.samples, *report.settings):
        if not 1 <= len(key) <= _MAX_TEXT_LENGTH or not key.isprintable():
            raise ConfigError(
                f"layer report: name {key[:80]!r}, expected 1 to {_MAX_TEXT_LENGTH} printable "
                f"characters"
            )
    for key, value in report.settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        if not all(_is_json_scalar(item) for item in values):
            raise ConfigError(
                f"layer report: setting {key[:80]!r} is {str(value)[:80]}, expected strings, "
                f"finite numbers, booleans or a list of them"
            )


def _is_json_scalar(value: object) -> bool:
    return type(value) in _SCALAR_TYPES and not (
        isinstance(value, float) and not math.isfinite(value)
    )
