"""``loraseg synth fidelity``: printed table, JSON and error messages."""

import json

import pytest

from loraseg.cli import main
from tests.unit.evaluate.fidelity.sample_data import pair, picture, write_real, write_shards
from tests.unit.tiny import write_models


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    images = [picture(seed) for seed in range(7)]
    real = write_real(tmp_path_factory.mktemp("real"), images, split="few")
    rows = [pair(n, picture(50 + n) // 4, mask=n // 2, prompt=None) for n in range(6)]
    rows.append(pair(9, images[4], mask=9, prompt=None))
    uri = write_shards(tmp_path_factory.mktemp("synthetic"), rows)
    encoder = write_models(tmp_path_factory.mktemp("models"))[1]
    return uri, "--real", str(real), "--split", "few", "--encoder", encoder


def run(*arguments):
    return main(["synth", "fidelity", *arguments])


def test_table(arguments, capsys):
    assert run(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["FIGURE", "VALUE", "REAL", "SYNTHETIC", "MEANING", "ENCODER"]
    cells = {line.split()[0]: line.split() for line in lines[1:11]}
    assert cells["cmmd"][2:4] == ["7", "7"]
    assert cells["cmmd_no_crop"][-1].endswith(":square16-bicubic-whole")
    assert cells["clip_score"][1:4] == ["-", "-", "-"]
    assert cells["copies"][1] == "0.1429"
    assert cells["sibling_distance"][2:4] == ["-", "6"]
    assert lines[11:] == ["possible copy: 0009 of real4 (distance 0.0000)"]


def test_json(arguments, capsys):
    assert run(*arguments, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {"encoder", "real", "synthetic", "figures", "suspects"}
    assert record["figures"]["cmmd"]["settings"] == {"sigma": 10.0, "scale": 1000.0}
    assert all(figure["encoder"].startswith("clip:") for figure in record["figures"].values())


def test_usage_errors(arguments, tmp_path, capsys):
    assert run(str(tmp_path), *arguments[1:]) == 1
    assert "no synthetic data is committed" in capsys.readouterr().err
    assert run(*arguments[:3], *arguments[5:]) == 1
    assert "no split 'train'" in capsys.readouterr().err
