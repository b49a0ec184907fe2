"""MatchMask++ as one job on Ray, run again with the same and with other inputs."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

import jobs.pipeline as job
from loraseg import config as configuration
from loraseg.batch.matchmask_pp.pipeline import STAGE_LOG_KEY
from loraseg.data import write_mask
from loraseg.data.shards.reader import ShardDataset
from loraseg.segment.closed_set.checkpoint import load_closed_set_segmenter
from tests.tiny_synthesis import CLASSES, mask, write_inputs, write_masks

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def write_images(folder, count, split):
    (folder / "images" / split).mkdir(parents=True)
    for number in range(count):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / split / f"{number:03d}.png")


@pytest.fixture
def settings(tmp_path):
    write_inputs(tmp_path, masks=1)
    real = write_masks(tmp_path / "real", 3)
    (real / "masks" / "val").mkdir()
    for number in range(2):
        write_mask(real / "masks" / "val" / f"{number:03d}.png", mask(number))
    write_images(real, 3, "train")
    write_images(real, 2, "val")
    write_images(tmp_path / "unlabelled", 3, "train")
    return {
        "real": str(real),
        "unlabelled": str(tmp_path / "unlabelled"),
        "output": str(tmp_path / "out"),
        "images": 2,
        "threshold": 0.0,
        "base": str(tmp_path / "pipeline"),
        "sampling": {"images": 3, "steps": 1, "scheduler": "ddim"},
        "filter": {"min_kept": 0.0},
        "overrides": {
            "steps": 2,
            "batch_size": 2,
            "crop": 32,
            "eval_every": 1,
            "network": {"width": 8},
        },
        "workers": {"resources": {"cpus": 0.5}},
        "generators": {"cpus": 0.5},
    }


def run(tmp_path, settings):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as leaving:
        configuration.main(job.main, job.Config, ["--config", str(file), "method=matchmask_pp"])
    return leaving.value.code


def test_all_stages_run_once(ray_cluster, settings, tmp_path, capsys):
    assert run(tmp_path, settings) == 0
    lines = _stage_lines(capsys)
    assert [line.split(":")[0] for line in lines] == [
        *("segmenter-0", "pairs-0", "segmenter-1", "masks-1", "pairs-1", "segmenter-2")
    ]
    stages = json.loads((tmp_path / "out" / STAGE_LOG_KEY).read_text())["stages"]
    first, second = (stages[f"pairs-{n}"]["result"] for n in range(2))
    assert (first["pairs"], second["pairs"]) == (6, 9)
    assert len(ShardDataset.open(str(tmp_path / "out" / second["dataset"]))) == 9
    last = stages["segmenter-2"]["result"]
    assert (
        load_closed_set_segmenter(tmp_path / "out" / last["segmenter"]).label_space.names == CLASSES
    )
    assert last["control_miou"] == stages["segmenter-1"]["result"]["control_miou"]
    before = (tmp_path / "out" / STAGE_LOG_KEY).read_bytes()
    assert run(tmp_path, settings) == 0
    assert _stage_lines(capsys) == lines
    assert (tmp_path / "out" / STAGE_LOG_KEY).read_bytes() == before
    # A moved output keeps its stages; changed unlabelled images rerun the stages that use them.
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "unlabelled" / "images" / "train" / "002.png").unlink()
    assert run(tmp_path, {**settings, "output": str(tmp_path / "moved")}) == 0
    assert _stage_lines(capsys)[:3] == lines[:3]
    assert not (tmp_path / "out").exists()
    after = json.loads((tmp_path / "moved" / STAGE_LOG_KEY).read_text())["stages"]
    assert [name for name in sorted(after) if after[name] != stages[name]] == [
        *("masks-1", "pairs-1", "segmenter-2")
    ]
    assert after["pairs-1"]["result"]["pairs"] == 6
    assert str(tmp_path) not in json.dumps(after)


def _stage_lines(capsys):
    """Return the output lines of the job; Ray Train prints others."""
    names = ("segmenter-", "pairs-", "masks-")
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(names)]
