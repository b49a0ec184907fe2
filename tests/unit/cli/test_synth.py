import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loraseg.cli import main
from loraseg.cli.synth import FORMATS
from loraseg.data import open_dataset
from loraseg.data.exports import EXPORTERS
from tests.unit.data.shards.sample_dataset import (
    commit_sample_dataset,
    commit_shards,
    make_bad_mask,
    make_pair,
    pair_id,
    random_arrays,
)
from tests.unit.data.shards.test_audit import write_settings


@pytest.fixture
def uri(tmp_path):
    commit_sample_dataset(tmp_path / "data")
    write_settings(tmp_path / "data")
    return str(tmp_path / "data")


def run(capsys, *arguments):
    status = main(["synth", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_formats_equal_the_keys_of_the_exporters():
    assert set(FORMATS) == set(EXPORTERS)


def test_ls_lists_shards(uri, capsys):
    status, out, _ = run(capsys, "ls", uri)
    lines = out.splitlines()
    assert (status, lines[0].split()[-4:]) == (0, ["OK", "DROPPED", "BAD_MASK", "DUPLICATE"])
    assert [line.split()[-4:] for line in lines[1:4]] == [
        ["7", "1", "1", "0"],
        ["0", "0", "0", "1"],
        ["5", "1", "0", "0"],
    ]
    assert lines[-1].endswith("rows: 12 ok, 2 dropped, 1 bad_mask, 1 duplicate")


def test_ls_lists_the_rows_with_a_status(uri, capsys):
    _, out, _ = run(capsys, "ls", uri, "--status", "ok")
    assert [line.split("\t")[0] for line in out.splitlines()] == list(map(pair_id, range(12)))
    _, out, _ = run(capsys, "ls", uri, "--status", "dropped", "--status", "bad_mask")
    assert [line.split("\t")[-1] for line in out.splitlines()] == ["kept 10 %", "why", "kept 10 %"]


def test_control_characters_in_reasons_are_replaced(tmp_path, capsys):
    row = make_bad_mask("x")
    object.__setattr__(row, "reason", "a\x1b[2Jb\nc")
    commit_shards(tmp_path, [[row]])
    _, out, _ = run(capsys, "ls", str(tmp_path), "--status", "bad_mask")
    assert out.endswith("\ta?[2Jb?c\n")


def test_show_prints_the_row_and_writes_its_images(uri, capsys, tmp_path):
    status, out, _ = run(capsys, "show", uri, pair_id(3)[:12], "--out", str(tmp_path / "out"))
    record = json.loads(out)
    assert (status, record["pair_id"], record["lineage"]["pair_id"]) == (0, pair_id(3), pair_id(3))
    assert record["heads"] == [{"name": "head 0", "digest": "01" * 32, "weight": 0.1}]
    assert record["image"] == f"{len(make_pair(3).image)} bytes"
    names = sorted(path.name.partition("_")[2] for path in (tmp_path / "out").iterdir())
    assert names == ["image.png", "label.png", "mask.png"]
    written = next((tmp_path / "out").glob("*_image.png")).read_bytes()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(written))), random_arrays(3)[0])


def test_verify_reports_damaged_and_uncommitted_files(uri, capsys):
    status, out, _ = run(capsys, "verify", uri)
    assert (status, "3 shards, 16 rows, ok" in out) == (0, True)
    (Path(uri) / "shards" / "0002.parquet").unlink()
    (Path(uri) / "shards" / "abcd.parquet").write_bytes(b"")
    status, out, _ = run(capsys, "verify", uri)
    lines = out.splitlines()
    assert status == 1
    assert lines[0].startswith("damaged: ")
    assert lines[1] == "not committed: shards/abcd.parquet"
    assert lines[2].endswith("DAMAGED")


@pytest.mark.parametrize("kind", FORMATS)
def test_export_writes_every_format(uri, capsys, tmp_path, kind):
    status, out, _ = run(capsys, "export", uri, kind, str(tmp_path / "out"))
    assert (status, out) == (0, f"{tmp_path / 'out'}: 12 pairs\n")
    assert any((tmp_path / "out").iterdir())


def test_export_uses_the_given_split_name(uri, capsys, tmp_path):
    run(capsys, "export", uri, "folder", str(tmp_path / "out"), "--split", "extra")
    assert open_dataset(tmp_path / "out").splits == ("extra",)
    status, _, err = run(capsys, "export", uri, "coco", str(tmp_path / "c"), "--split", "extra")
    assert (status, "--split" in err) == (2, True)
    status, _, err = run(capsys, "export", uri, "folder", str(tmp_path / "d"), "--split", "../x")
    assert (status, "split: got" in err) == (2, True)


def test_error_messages_are_one_line(uri, capsys, tmp_path):
    for arguments in (
        ("ls", str(tmp_path / "nowhere")),
        ("show", uri, "zz"),
        ("export", uri, "coco", uri),
    ):
        status, _, err = run(capsys, *arguments)
        assert (status, err.count("\n"), err.startswith("error: ")) == (1, 1, True)
