"""Images regenerated from their lineage."""

import json
import math

import pytest
import torch

from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.synthesize.replay import Replayer
from loraseg.batch.synthesize.run import synthesize
from loraseg.batch.synthesize.state import read_run_state
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import ConfigError, DatasetError, IntegrityError
from loraseg.storage import open_store
from tests.tiny_synthesis import all_rows, settings, write_inputs
from tests.unit.train.tiny_generator import write_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, and a dataset that was extended from 3 to 5 images of each mask."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"), masks=2)
    synthesize(settings(folder, folder / "out"), LocalExecutor())
    synthesize(settings(folder, folder / "out", images=5, append=True), LocalExecutor())
    return folder


def test_replayed_images_equal_the_stored_ones(folder):
    replay = Replayer(ShardDataset.open(str(folder / "out")))
    threads = torch.get_num_threads()
    rows = all_rows(folder / "out")
    assert {row.k for row in rows} == set(range(5))
    for row in rows:
        replayed = replay(row.pair_id[:20])
        assert replayed.differing_pixels == 0
        assert replayed.row.pair_id == row.pair_id
    assert torch.get_num_threads() == threads


def test_a_changed_base_is_an_error(folder, tmp_path):
    write_inputs(tmp_path, masks=1)
    synthesize(settings(tmp_path, tmp_path / "out"), LocalExecutor())
    write_pipeline(tmp_path / "pipeline")
    config = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    pair_id = all_rows(tmp_path / "out")[0].pair_id
    with pytest.raises(ConfigError, match="created with generator"):
        Replayer(ShardDataset.open(str(tmp_path / "out")))(pair_id)


def test_an_unknown_pair_is_an_error(folder):
    with pytest.raises(DatasetError, match="f00"):
        Replayer(ShardDataset.open(str(folder / "out")))("f00" * 21 + "a")


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": [1]},
        {"classes": 5},
        {"facts": []},
        {"settings": [1]},
        {"threads": math.inf},
        {"threads": 0},
        {"threads": 10**9},
        "[" * 100_000,
        "null",
    ],
)
def test_a_damaged_run_state_is_an_error(changes, folder, tmp_path):
    values = json.loads((folder / "out" / "dataset.json").read_text())
    text = changes if isinstance(changes, str) else json.dumps({**values, **changes})
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"dataset\.json: (damaged|not valid JSON|got)"):
        read_run_state(open_store(str(tmp_path)))
