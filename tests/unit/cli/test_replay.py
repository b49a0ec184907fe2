import pytest
import torch

from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.synthesize.run import synthesize
from loraseg.cli import main
from tests.tiny_synthesis import all_rows, settings, write_inputs


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("inputs"), masks=1)
    synthesize(settings(folder, folder / "out"), LocalExecutor(torch.get_num_threads()))
    return folder / "out"


def test_replayed_images_are_equal(out, tmp_path, capsys):
    pairs = [row.pair_id for row in all_rows(out)]
    assert main(["synth", "replay", str(out), *pairs, "--out", str(tmp_path)]) == 0
    assert "3 of 3 equal" in capsys.readouterr().out
    for row in all_rows(out):
        assert (tmp_path / f"{row.pair_id[:16]}_replayed.png").read_bytes() == row.image


def test_missing_pairs_and_datasets_are_reported(out, tmp_path, capsys):
    assert main(["synth", "replay", str(out), "ffff"]) == 1
    assert "ffff" in capsys.readouterr().err
    assert main(["synth", "replay", str(tmp_path), "ffff"]) == 1
    assert "no synthetic data is committed" in capsys.readouterr().err
