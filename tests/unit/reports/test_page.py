import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError, DatasetError
from loraseg.reports.curves import CurvePlot
from loraseg.reports.heatmaps import HeatmapTable, WeightMatrix
from loraseg.reports.page import HtmlReport, Section, StatTile, render_report
from loraseg.reports.pictures import MixEntry, PictureSheet, Prediction, ReportExample
from loraseg.reports.scores import MethodRow, ScoreTable
from loraseg.reports.settings import KeyValues, flatten
from loraseg.reports.tables import Bar, BarChart, Notes, Table

SPACE = LabelSpace(("road", "sky", "car"))
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """A parsed page: cell texts by row, attributes of all tags; checks that tags nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.bold, self.text, self._open = [], [], [], "", []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "b" in self._open:
            self.bold.append(data)
        if self.rows and {"td", "th"} & set(self._open):
            self.rows[-1][-1] = " ".join((self.rows[-1][-1] + " " + data).split())

    def row(self, name):
        return next(row for row in self.rows if row and row[0].startswith(name))

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def scores(**changes):
    values = {
        "domains": ("fog", "night"),
        "rows": (
            MethodRow(name="zero-shot", scores=(0.40, 0.301), hmean=0.343),
            MethodRow(name="uniform", scores=(0.50, 0.2999), hmean=0.375),
            MethodRow(name="ours", scores=(0.4996, None), hmean=math.nan, note="per image"),
            MethodRow(name="oracle", scores=(0.5, 0.6), hmean=0.545, is_bound=True),
        ),
        "baseline": "zero-shot",
    }
    return ScoreTable(**{**values, **changes})


def example(size=(20, 30), **changes):
    generator = np.random.default_rng(0)
    labels = generator.choice(np.array([0, 1, 255], np.uint8), size)
    values = {
        "title": "fog, image 1",
        "image": generator.integers(0, 256, (*size, 3), dtype=np.uint8),
        "label_space": SPACE,
        "predictions": (
            Prediction(title="truth", labels=labels),
            Prediction(title="ours", labels=np.zeros(size, np.uint8), score=0.5),
        ),
        "retrieved": (
            MixEntry(adapter="rain", weight=0.75, distance=4.5),
            MixEntry(adapter="snow", weight=0.25),
        ),
    }
    return ReportExample(**{**values, **changes})


def report(*blocks, **changes):
    """A report with a section for each block."""
    sections = [
        Section(title=f"{type(block).__name__} {index}", blocks=[block])
        for index, block in enumerate(blocks)
    ]
    values = {"title": "A report", "summary": "All domains improve.", "sections": sections}
    return HtmlReport(**{**values, **changes})


def full():
    """A report with every kind of block."""
    return report(
        scores(),
        scores(baseline=""),
        WeightMatrix(
            targets=("fog", "night"),
            adapters=("fog", "night", "rain"),
            weights=((None, 0.25, 0.75), (1.0, None, 0.0)),
        ),
        HeatmapTable(
            rows=("fog", "night"),
            columns=("road", "sky"),
            values=((0.8, math.nan), (0.05, None)),
        ),
        HeatmapTable(
            rows=("fog",),
            columns=("road", "sky", "car"),
            values=((-0.2, 0.1, 0.00001),),
            signed=True,
        ),
        CurvePlot("Loss", {"main": [(1, 2.0), (2, 1.0)], "control": [(1, 3.0), (2, 2.5)]}),
        example(),
        PictureSheet(png=b"png", alt="A sheet", caption="After 3 steps"),
        BarChart([Bar("road", 0.5, "50.0 %")]),
        Table(header=("Class", "main"), rows=[("road", "80.0"), ("mean", "79.0")], has_total=True),
        KeyValues(rows=flatten({"k": 5, "recipe": {"rank": 8, "targets": ["q", "v"]}, "none": {}})),
        KeyValues(rows=[("code revision", "abc")], summary="Origin"),
        Notes(["A note."]),
        tiles=(StatTile(label="h-mean", value="54.2", note="3 seeds"),),
    )


def test_scores_are_printed_with_differences_and_the_best_in_bold():
    page = Page(render_report(report(scores())))
    assert page.row("zero-shot") == ["zero-shot", "34.3", "40.0", "30.1"]
    assert page.row("uniform") == ["uniform", "37.5 +3.2", "50.0 +10.0", f"30.0 {MINUS}0.1"]
    assert page.row("ours") == ["ours per image", DASH, "50.0 +10.0", DASH]
    # Equal as printed is equally good; the oracle is a bound and cannot be the best.
    assert page.bold == ["30.1", "37.5", "50.0", "50.0"]


def test_spreads_are_printed_with_their_scores():
    rows = (MethodRow(name="ours", scores=(0.5, 0.4), hmean=0.44, spreads=(0.012, None)),)
    page = Page(render_report(report(scores(rows=rows, baseline=""))))
    assert page.row("ours") == ["ours", "44.0", "50.0 ± 1.2", "40.0"]
    assert "standard deviation over seeds" in page.text


def test_heat_maps_and_weights_show_their_numbers():
    page = Page(render_report(full()))
    assert ["fog", "80.0", DASH] in page.rows
    assert ["night", "5.0", DASH] in page.rows
    assert ["fog", f"{MINUS}20.0", "+10.0", "0.0"] in page.rows
    assert ["fog", DASH, ".25", ".75"] in page.rows
    assert ["night", "1.00", DASH, ".00"] in page.rows


def test_heat_map_rounds_and_leaves_small_shares_blank():
    table = HeatmapTable(
        rows=("road",),
        columns=("road", "sky", "car"),
        values=((0.996, 0.004, 0.0),),
        digits=0,
        blank_below=0.005,
    )
    assert Page(render_report(report(table))).row("road") == ["road", "100", "", ""]


def test_shades_follow_the_values():
    html = render_report(full())
    shares = [float(value) for value in re.findall(r"--share: ([\d.]+)%", html)]
    assert shares == [80.0, 0.0, 5.0, 0.0, 100.0, 50.0, 0.0]
    opacities = [float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', html)]
    assert opacities == [0.25, 0.75, 1.0]


def luminance(rgb):
    """WCAG 2 relative luminance of levels in 0..255."""
    parts = np.array(rgb, dtype=float) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("signed", [False, True])
def test_figures_keep_their_contrast_on_every_shade(theme, signed):
    """At least 4.5 : 1 (WCAG 2 AA) on shades in steps of 1 %, with the colours of the page."""
    sign = -1 if signed else 1
    table = HeatmapTable(
        rows=("r",),
        columns=tuple(str(share) for share in range(101)),
        values=(tuple(sign * share / 100 for share in range(101)),),
        signed=signed,
    )
    html = render_report(report(table))
    style = html.partition("<style>")[2].split("@media")[0 if theme == "light" else 1]
    colors = {
        name: np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)])
        for name, digits in re.findall(r"--([a-z-]+): #([0-9a-f]{6});", style)
    }
    tint = colors["heat-down" if signed else "heat"]
    cells = [a for a in Page(html).attributes("td") if "--share" in a.get("style", "")]
    assert len(cells) == 101
    for cell in cells:
        share = float(re.search(r"[\d.]+", cell["style"])[0]) / 100
        ink = colors["on-heat" if "on-heat" in cell.get("class", "") else "heat-ink"]
        ground = luminance(tint * share + colors["surface"] * (1 - share))
        light, dark = sorted((ground, luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_curves_and_text_keep_their_contrast_on_the_surface(theme):
    """WCAG 2 AA: 3 : 1 for lines, 4.5 : 1 for text."""
    html = render_report(report())
    style = html.partition("<style>")[2].split("@media")[0 if theme == "light" else 1]
    colors = {
        name: luminance([int(digits[i : i + 2], 16) for i in (0, 2, 4)])
        for name, digits in re.findall(r"--([a-z-]+): #([0-9a-f]{6});", style)
    }
    for name, least in {
        "curve-a": 3,
        "curve-b": 3,
        "ink": 4.5,
        "muted": 4.5,
        "accent": 4.5,
    }.items():
        dark, light = sorted((colors[name], colors["surface"]))
        assert (light + 0.05) / (dark + 0.05) >= least, name


def test_page_loads_nothing_and_runs_nothing():
    html = render_report(full())
    page = Page(html)
    assert not page.attributes("script")
    sources = [a.get("src") or a.get("href") for _, a in page.tags if "src" in a or "href" in a]
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "url(" not in html
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}


def test_links_and_references_resolve():
    page = Page(render_report(full()))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a["href"][1:] for a in page.attributes("a")]
    named += [a["aria-describedby"] for a in page.attributes("table") if "aria-describedby" in a]
    named += [a["aria-labelledby"] for a in page.attributes("svg") if "aria-labelledby" in a]
    assert len(named) >= 18
    assert set(named) <= set(ids)
    assert len(page.attributes("h1")) == 1


def test_every_value_is_escaped():
    evil = "<script>alert(1)</script>\"'&"
    blocks = (
        scores(domains=(evil, "night")),
        example(title=evil),
        HeatmapTable(rows=(evil,), columns=(evil,), values=((0.5,),)),
        WeightMatrix(targets=(evil,), adapters=(evil,), weights=((1.0,),)),
        CurvePlot(evil, {evil: [(1, 0.5)]}),
        PictureSheet(png=b"", alt=evil, caption=evil),
        BarChart([Bar(evil, 0.5, evil)]),
        Table(header=(evil, evil), rows=((evil, evil),)),
        KeyValues(rows=flatten({evil: evil}), summary=evil),
        Notes([evil]),
        Notes([evil, evil]),
    )
    sections = [Section(title=evil, note=evil, blocks=[block]) for block in blocks]
    tiles = [StatTile(label=evil, value=evil, note=evil)]
    html = render_report(report(title=evil, summary=evil, sections=sections, tiles=tiles))
    page = Page(html)
    assert not page.attributes("script")
    assert "<script" not in html
    assert page.text.count("<script>alert(1)</script>") >= 3 * len(blocks) + 5 + 20


def test_example_pictures_are_the_pixels():
    shown = example()
    page = Page(render_report(report(shown)))
    pictures = page.attributes("img")
    assert [picture["alt"] for picture in pictures] == [
        "fog, image 1: the image",
        "fog, image 1: label map of truth",
        "fog, image 1: label map of ours",
    ]
    decoded = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))))
        for picture in pictures
    ]
    np.testing.assert_array_equal(decoded[0], shown.image)
    np.testing.assert_array_equal(decoded[1], shown.predictions[0].labels)
    np.testing.assert_array_equal(decoded[2], shown.predictions[1].labels)
    assert "mIoU 50.0" in page.text
    assert page.row("rain") == ["rain", "", "0.750", "4.500"]
    assert page.row("snow") == ["snow", "", "0.250", DASH]
    legend = page.text.partition("fog, image 1")[2]
    assert re.findall(r"road|sky|car|not labelled", legend)[:3] == ["road", "sky", "not labelled"]


def test_large_pictures_are_shrunk_and_keep_their_ids():
    page = Page(render_report(report(example(size=(900, 1200)))))
    for picture in page.attributes("img"):
        assert (picture["width"], picture["height"]) == ("480", "360")
    assert picture["src"].startswith("data:image/png")
    assert page.attributes("img")[0]["src"].startswith("data:image/jpeg")


def test_a_picture_sheet_holds_the_file():
    page = Page(render_report(report(PictureSheet(png=b"\x89PNG", alt="A sheet"))))
    (picture,) = page.attributes("img")
    assert picture == {
        "src": "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode(),
        "alt": "A sheet",
    }


def test_settings_are_flattened():
    page = Page(render_report(full()))
    assert ["k", "5"] in page.rows
    assert ["recipe.rank", "8"] in page.rows
    assert ["recipe.targets", "q, v"] in page.rows
    assert ["none", "{}"] in page.rows
    assert ["code revision", "abc"] in page.rows


def test_bars_and_tables_show_their_text():
    html = render_report(full())
    page = Page(html)
    assert "50.0 %" in page.text
    assert '<i style="width: 42.0%"></i>50.0 %' in html
    assert page.row("mean") == ["mean", "79.0"]


def test_equal_reports_give_equal_text():
    assert render_report(full()) == render_report(full())


def test_smallest_report():
    assert "A report" in render_report(report(ScoreTable(domains=(), rows=())))
    assert "A report" in render_report(report())


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: scores(domains=("fog",)), r"scores of 'zero-shot': got 2 values, expected 1"),
        (lambda: scores(baseline="base"), r"baseline 'base' not in \['zero-shot'"),
        (
            lambda: WeightMatrix(targets=("a",), adapters=("b",), weights=((0.5, 0.5),)),
            r"weight matrix, row 'a': got 2 values, expected 1",
        ),
        (
            lambda: HeatmapTable(rows=("a",), columns=("b",), values=()),
            r"heat map: got 0 values, expected 1",
        ),
    ],
)
def test_mismatched_tables_are_refused(build, match):
    with pytest.raises(ConfigError, match=match):
        build()


def test_mismatched_label_maps_are_refused():
    wrong = Prediction(title="ours", labels=np.zeros((3, 3), np.uint8))
    with pytest.raises(DatasetError, match=r"map 'ours' of \(3, 3\) for an image of \(20, 30\)"):
        render_report(report(example(predictions=(wrong,))))
    wrong = Prediction(title="ours", labels=np.full((20, 30), 9, np.uint8))
    with pytest.raises(DatasetError, match=r"ids \[9\] outside the class list"):
        render_report(report(example(predictions=(wrong,))))
