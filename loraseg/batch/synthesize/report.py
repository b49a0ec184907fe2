"""The report of a synthetic dataset: an HTML page, a card, and a contact sheet."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from loraseg.batch.synthesize.filter_stage import read_committed
from loraseg.batch.synthesize.shard_statistics import ShardStatistics
from loraseg.batch.synthesize.state import SynthesisRunState
from loraseg.data.drawing import colorize, encode_png
from loraseg.data.labels import IGNORE, LabelSpace
from loraseg.data.masks import decode_mask
from loraseg.data.shards.manifest import ShardEntry
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import PairRow
from loraseg.data.untrusted_images import decode_image
from loraseg.reports.page import HtmlReport, Section, StatTile, render_report
from loraseg.reports.pictures import PictureSheet
from loraseg.reports.settings import KeyValues
from loraseg.reports.tables import Bar, BarChart, Notes, Table
from loraseg.synth.sheet import SheetRow, contact_sheet
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["CARD", "REPORT", "SHEET", "collect_statistics", "write_report"]

REPORT, CARD, SHEET = "report.html", "README.md", "sheets/first.png"
_MAX_SHOWN_MASKS, _MAX_SHOWN_SIBLINGS = 8, 5
_STATISTICS_COLUMNS = ("kept", "kept_by_class", "reason", "k")
_READ_THREADS = 16


def collect_statistics(dataset: ShardDataset) -> ShardStatistics:
    """Sum the statistics beside the shards; a shard without them is read.

    Raises:
        IntegrityError: A shard is damaged.
        StoreError: The store cannot be read.
    """
    classes = len(dataset.manifest.classes)

    def shard_statistics(entry: ShardEntry) -> ShardStatistics:
        committed = read_committed(dataset.store, PurePosixPath(entry.file).stem, classes)
        if committed is not None and committed.entry == entry:
            return committed.statistics
        return ShardStatistics.from_rows(
            dataset.read_shard(entry, columns=_STATISTICS_COLUMNS), classes
        )

    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="notes") as pool:
        return ShardStatistics.merge(pool.map(shard_statistics, dataset.manifest.shards), classes)


def write_report(dataset: ShardDataset, state: SynthesisRunState) -> None:
    """Write ``report.html``, ``README.md`` and the contact sheet beside the shards.

    Raises:
        IntegrityError: A shard is damaged.
        StoreError: The store cannot be read or written.
    """
    statistics = collect_statistics(dataset)
    sheet = _sheet(dataset)
    if sheet is not None:
        dataset.store.put(SHEET, sheet)
    dataset.store.put(CARD, _card(dataset, state, statistics).encode())
    page = render_report(_build_report(dataset, state, statistics, sheet))
    dataset.store.put(REPORT, page.encode())


def _build_report(
    dataset: ShardDataset,
    state: SynthesisRunState,
    statistics: ShardStatistics,
    sheet: bytes | None,
) -> HtmlReport:
    manifest = dataset.manifest
    bars = list(_class_bars(dataset, statistics))
    return HtmlReport(
        title="Synthetic image/label pairs",
        summary=f"Generation {manifest.generation} of the manifest.",
        tiles=[
            StatTile(label="pairs", value=f"{manifest.pairs:,}"),
            StatTile(label="masks", value=f"{manifest.masks:,}"),
            StatTile(label="labels kept", value=f"{100 * statistics.mean_kept:.1f} %"),
        ],
        sections=[
            Section(
                title="Summary",
                blocks=[KeyValues(rows=_summary_rows(dataset, state, statistics))],
            ),
            Section(
                title="Labels kept, by class",
                blocks=[BarChart(bars) if bars else Notes(["There was no vote."])],
            ),
            *_sheet_section(sheet),
            Section(title="Not used", blocks=_rejected_blocks(dataset, statistics)),
        ],
    )


def _sheet_section(sheet: bytes | None) -> list[Section]:
    if sheet is None:
        return []
    alt = "Masks with their images, labels and the segmenter's predictions"
    return [
        Section(
            title="The first masks",
            note="Each image with its label and the segmenter's prediction. White in a label: "
            "removed by the filter. Grey: not labelled in the mask.",
            blocks=[PictureSheet(png=sheet, alt=alt)],
        )
    ]


def _rejected_blocks(dataset: ShardDataset, statistics: ShardStatistics) -> list[Table | Notes]:
    rejected = statistics.rejected
    if not rejected:
        return [Notes(["Every mask was used, every pair was kept."])]
    table = Table(header=("mask", "status", "reason"), rows=rejected, numeric=False)
    more = sum(dataset.manifest.statuses.values()) - dataset.manifest.pairs - len(rejected)
    return [table, Notes([f"And {more} more rows."])] if more > 0 else [table]


def _summary_rows(
    dataset: ShardDataset, state: SynthesisRunState, statistics: ShardStatistics
) -> list[tuple[str, str]]:
    sampling = state.config.sampling
    adapters = ", ".join(f"{one.name} ({one.digest[:12]})" for one in state.models.adapters)
    segmenter = state.models.segmenter
    return [
        ("pairs", f"{dataset.manifest.pairs:,}"),
        ("masks", f"{dataset.manifest.masks:,}"),
        *(
            (status, f"{count:,}")
            for status, count in dataset.manifest.statuses.items()
            if status != "ok"
        ),
        ("labels kept", f"{100 * statistics.mean_kept:.1f} %"),
        ("filter", state.config.filter.method),
        ("base", f"{state.config.base} ({state.models.base[:12]})"),
        ("adapters", adapters or "none"),
        ("segmenter", "none" if segmenter is None else segmenter[:12]),
        ("sampling", f"{sampling.scheduler}, {sampling.steps} steps, guidance {sampling.guidance}"),
        ("seed", str(sampling.seed)),
        ("code", state.code),
    ]


def _class_bars(dataset: ShardDataset, statistics: ShardStatistics) -> Iterator[Bar]:
    for name, share in zip(dataset.manifest.classes, statistics.kept_by_class, strict=True):
        if share is not None:
            yield Bar(name, share, f"{100 * share:.1f} %")


def _card(dataset: ShardDataset, state: SynthesisRunState, statistics: ShardStatistics) -> str:
    lines = [
        "# Synthetic image/label pairs",
        "",
        "Generated by loraseg from label maps; the images are not photographs. A label is the mask",
        "that the image was generated from, with 255 where the filter rejected a pixel.",
        "",
        *(
            f"- {name}: {_escape_markdown(value)}"
            for name, value in _summary_rows(dataset, state, statistics)
        ),
        f"- classes: {', '.join(_escape_markdown(name) for name in dataset.manifest.classes)}",
        "",
        "`manifest.json` lists the valid shards, which are Parquet files:",
        "",
        "```python",
        "import json, pandas",
        'manifest = json.load(open("manifest.json"))',
        'pairs = pandas.concat(pandas.read_parquet(s["file"]) for s in manifest["shards"])',
        'pairs = pairs[pairs.status == "ok"]  # image and label are PNG bytes',
        "```",
        "",
        "`loraseg synth ls .` lists them, `loraseg synth replay . PAIR_ID` regenerates an image,",
        "`loraseg synth export` writes a dataset folder, WebDataset, COCO or Hugging Face Parquet.",
    ]
    return "\n".join(lines) + "\n"


def _sheet(dataset: ShardDataset) -> bytes | None:
    """Draw the first masks with their images, labels and predictions; None without images."""
    masks: dict[str, list[PairRow]] = defaultdict(list)
    for row in dataset.rows(statuses=("ok", "dropped")):
        if row.mask_id is None or row.image is None:
            continue
        if row.mask_id not in masks and len(masks) == _MAX_SHOWN_MASKS:
            break
        masks[row.mask_id].append(row)
    space = LabelSpace(dataset.manifest.classes)
    rows = [_sheet_row(siblings[:_MAX_SHOWN_SIBLINGS], space) for siblings in masks.values()]
    return encode_png(contact_sheet(rows, space)) if rows else None


def _sheet_row(rows: Sequence[PairRow], space: LabelSpace) -> SheetRow:
    pictures: list[tuple[str, UInt8[ndarray, "_ _ 3"]]] = []
    for row in rows:
        where = f"pair {row.pair_id}"
        label = decode_mask(row.label or b"", where=where)
        pictures.append((f"image {row.k}", decode_image(row.image or b"")))
        kept = "" if row.kept is None else f" {100 * row.kept:.0f} %"
        pictures.append(
            (
                f"label{kept}",
                _draw_filtered(label, decode_mask(row.mask or b"", where=where), space),
            )
        )
        if row.predicted is not None:
            predicted = decode_mask(row.predicted, where=where)
            pictures.append(("predicted", colorize(predicted, space)))
    mask = decode_mask(rows[0].mask or b"", where=f"mask {rows[0].mask_name!r}")
    return SheetRow(rows[0].mask_name, mask, pictures)


def _draw_filtered(
    label: UInt8[ndarray, "h w"], mask: UInt8[ndarray, "h w"], space: LabelSpace
) -> UInt8[ndarray, "h w 3"]:
    """Draw a label: white where the filter rejected a pixel, grey where the mask is 255."""
    picture = colorize(label, space).copy()
    picture[(label == IGNORE) & (mask != IGNORE)] = 255
    return picture


def _escape_markdown(text: str) -> str:
    """Escape the characters that have a meaning in Markdown."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>#|" else char for char in text)
