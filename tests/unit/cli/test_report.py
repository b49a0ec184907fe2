"""``loraseg report``: printed tables and error messages."""

import pytest

from loraseg.cli import main
from tests.unit.probes.test_tables import layer, report

PROJECTION = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def files(tmp_path):
    one = report(layer(PROJECTION, 1.0, "mid_block", True, "v", 8), layer("conv_in", 3.0))
    two = report(layer(PROJECTION, 5.0, "mid_block", True, "v", 8), layer("conv_in", 4.0))
    for name, layer_report in (("one", one), ("two", two)):
        (tmp_path / f"{name}.json").write_bytes(layer_report.to_bytes())
    return [str(tmp_path / f"{name}.json") for name in ("one", "two")]


def test_show(files, capsys):
    assert main(["report", "show", files[0], "--top", "1"]) == 0
    text = capsys.readouterr().out
    assert "conv_in" in text
    assert PROJECTION not in text
    assert main(["report", "show", files[0], "--projections"]) == 0
    text = capsys.readouterr().out
    assert "conv_in" not in text
    assert PROJECTION in text


def test_compare(files, capsys):
    assert main(["report", "compare", *files, "--top", "1", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Spearman correlation -1.000" in "".join(lines)
    assert [line.split() for line in lines[-2:]] == [["1", "0.000"], ["2", "1.000"]]


def test_usage_errors(files, tmp_path, capsys):
    assert main(["report", "show", str(tmp_path / "none.json")]) == 2
    assert "layer report does not exist" in capsys.readouterr().err
    assert main(["report", "compare", *files, "--top", "7"]) == 2
    assert "k = 7" in capsys.readouterr().err
    (tmp_path / "odd.json").write_text("{}")
    assert main(["report", "show", str(tmp_path / "odd.json")]) == 1
