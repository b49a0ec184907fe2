"""What a report is made of: plain values, filled by an evaluation and rendered by ``report.py``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError
from loraseg.tensor_types import ndarray

__all__ = [
    "HeatmapTable",
    "HtmlReport",
    "MethodRow",
    "MixEntry",
    "Prediction",
    "ReportExample",
    "ScoreTable",
    "StatTile",
    "WeightMatrix",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class StatTile:
    """One figure at the top of the page.

    Attributes:
        label: What it is, such as "SemLA, h-mean".
        value: The figure as text, with its unit.
        note: A few words below it; may be empty.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRow:
    """A method's scores, one for each domain of its table.

    Attributes:
        name: As printed.
        scores: mIoU in [0, 1] by domain; None where it was not run.
        hmean: Harmonic mean over the domains, in [0, 1]; None where it is not defined.
        note: A few words on what the method does; may be empty.
        spreads: Standard deviation over seeds by domain, in [0, 1]; empty for a single seed.
        hmean_spread: The same for ``hmean``.
        is_bound: True for a bound such as the oracle, which does not compete for "best".
    """

    name: str
    scores: tuple[float | None, ...]
    hmean: float | None
    note: str = ""
    spreads: tuple[float | None, ...] = ()
    hmean_spread: float | None = None
    is_bound: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTable:
    """Methods by domains.

    Attributes:
        title: Heading of the table.
        domains: Column headings.
        rows: In the order they are printed.
        baseline: Name of the row that differences are taken to; empty for none.
        note: A sentence below the heading; may be empty.

    Raises:
        ConfigError: A row has another number of scores, or ``baseline`` names no row.
    """

    title: str
    domains: tuple[str, ...]
    rows: tuple[MethodRow, ...]
    baseline: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            _check_length(f"table {self.title!r}, scores of {row.name!r}", row.scores, self.domains)
            if row.spreads:
                _check_length(
                    f"table {self.title!r}, spreads of {row.name!r}", row.spreads, self.domains
                )
        names = [row.name for row in self.rows]
        if self.baseline and self.baseline not in names:
            raise ConfigError(f"table {self.title!r}: baseline {self.baseline!r} not in {names}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMatrix:
    """Who was retrieved for whom.

    Attributes:
        targets: Domains of the images, one a row.
        adapters: Names of the adapters, one a column.
        weights: Mean mixing weight over the target's images, in [0, 1]; None where the adapter was
            left out (the target's own).

    Raises:
        ConfigError: The matrix is not targets x adapters.
    """

    targets: tuple[str, ...]
    adapters: tuple[str, ...]
    weights: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        _check_length("weight matrix", self.weights, self.targets)
        for target, row in zip(self.targets, self.weights, strict=True):
            _check_length(f"weight matrix, row {target!r}", row, self.adapters)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatmapTable:
    """Shaded figures by row and column, such as the IoU of each class in each domain.

    Attributes:
        title: Heading, such as "IoU by class, SemLA".
        rows: Row headings.
        columns: Column headings.
        values: In [0, 1], or in [-1, 1] if ``signed``; None where not defined. Shown as percent.
        signed: True for differences: shaded by two colours around 0, printed with a sign.
        note: A sentence below the heading; may be empty.

    Raises:
        ConfigError: The values are not rows x columns.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    signed: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        _check_length(f"heat table {self.title!r}", self.values, self.rows)
        for name, row in zip(self.rows, self.values, strict=True):
            _check_length(f"heat table {self.title!r}, row {name!r}", row, self.columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixEntry:
    """An adapter in a mix.

    Attributes:
        adapter: Its name.
        weight: Mixing weight in [0, 1].
        distance: Euclidean distance of image and centroid; None where no retrieval took place.
    """

    adapter: str
    weight: float
    distance: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One label map of an example.

    Attributes:
        title: Whose it is: "truth", "zero-shot", "SemLA".
        labels: Class ids (h, w), 255 = ignore, of the example's label space.
        score: mIoU of this image in [0, 1], if known.
    """

    title: str
    labels: ndarray
    score: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportExample:
    """An image with its label maps side by side.

    Attributes:
        title: Heading, such as "fog-heavy, image 0003".
        image: RGB (h, w, 3) uint8.
        label_space: Of all the label maps.
        predictions: In the order they are shown, the truth first.
        retrieved: The adapters mixed for this image, heaviest first.
        note: A sentence below; may be empty.
    """

    title: str
    image: ndarray
    label_space: LabelSpace
    predictions: tuple[Prediction, ...]
    retrieved: tuple[MixEntry, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class HtmlReport:
    """A whole page.

    Attributes:
        title: Heading of the page.
        summary: What came out, in a sentence or two.
        scores: The main table.
        tiles: Up to about four figures above it.
        more_scores: Further tables, such as ablations.
        weights: Who was retrieved for whom.
        heat_tables: IoU by class and domain, of one or several methods.
        examples: Pictures.
        settings: The resolved config; nested mappings are shown with dotted keys.
        provenance: Code revision, seeds, digests, date, machine: name -> text.
        notes: Sentences on how to read the figures.
    """

    title: str
    summary: str
    scores: ScoreTable
    tiles: tuple[StatTile, ...] = ()
    more_scores: tuple[ScoreTable, ...] = ()
    weights: WeightMatrix | None = None
    heat_tables: tuple[HeatmapTable, ...] = ()
    examples: tuple[ReportExample, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _check_length(where: str, values: tuple[Any, ...], names: tuple[str, ...]) -> None:
    if len(values) != len(names):
        raise ConfigError(f"{where}: got {len(values)} values, expected {len(names)}")
