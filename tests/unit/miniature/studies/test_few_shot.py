import dataclasses
import json

import numpy as np
import pytest

from loraseg.errors import DatasetError
from loraseg.miniature.studies import few_shot, few_shot_data
from loraseg.miniature.studies.few_shot import (
    FILTERS,
    FewShotStudyConfig,
    results_table,
    run_contact_sheet,
    run_few_shot,
    run_mixing_ratios,
)
from loraseg.miniature.studies.few_shot_data import REAL_SIZE, from_folder
from loraseg.miniature.world.dataset import write_dataset

TINY = FewShotStudyConfig(labelled=3, seed=0, masks=3, steps=2, generator_steps=1)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(few_shot_data, "_VAL", 2)
    monkeypatch.setattr(few_shot_data, "_TEST", 2)
    monkeypatch.setattr(few_shot_data, "_UNLABELLED", 2)
    monkeypatch.setattr(few_shot_data, "_JUDGE_STEPS", 2)
    quick = dataclasses.replace(few_shot.SAMPLING, steps=1)
    monkeypatch.setattr(few_shot, "SAMPLING", quick)
    monkeypatch.setattr(few_shot, "_SIBLINGS", 3)
    monkeypatch.setattr(few_shot, "_MIN_CONFIDENCE", 0.0)


def test_every_row_is_scored_once(tmp_path):
    results = run_few_shot(TINY, tmp_path)
    rows = {"real only", "synthetic only", "++", *(f"real + {name}" for name in FILTERS)}
    assert results["miou"].keys() == rows
    assert all(0 <= value <= 1 for value in results["miou"].values())
    assert results["labels"]["none"]["kept"] == 1
    assert (tmp_path / "fewshot" / f"{TINY.name}.png").is_file()
    path = tmp_path / "fewshot" / f"{TINY.name}.json"
    edited = {**results, "miou": dict.fromkeys(rows, 0.5)}
    path.write_text(json.dumps(edited))
    assert run_few_shot(TINY, tmp_path)["miou"]["++"] == 0.5
    assert "| real + relative | 50.0 |" in results_table(tmp_path)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_mixes_are_scored_with_their_control(tuning, tmp_path):
    results = run_mixing_ratios(dataclasses.replace(TINY, tuning=tuning), tmp_path)
    longer = {"real only, 3 x steps", "freemask, share 0.25, 3 x steps"}
    assert {"real only", "relative, share 0.25", *longer} < results["miou"].keys()
    assert results["agreement"].keys() == {"right", "wrong"}


def test_a_folder_of_real_images_is_resized_and_split(tmp_path):
    folder = write_dataset("night", tmp_path / "real", train=9, val=2)
    data = from_folder(folder, 3, 0, tmp_path / "data")
    assert data.labelled[0].shape == (3, *REAL_SIZE, 3)
    sets = [data.labelled[0], data.val[0], data.unlabelled]
    assert [len(images) for images in sets] == [3, 2, 2]
    images = np.concatenate(sets).reshape(7, -1)
    assert len(np.unique(images, axis=0)) == 7
    assert data.judge.label_space.names == data.classes
    other = from_folder(folder, 3, 1, tmp_path / "data")
    assert not np.array_equal(other.labelled[0], data.labelled[0])
    with pytest.raises(DatasetError, match="9 images, expected over 11"):
        from_folder(folder, 8, 0, tmp_path / "data")


def test_a_sheet_needs_no_segmenters(tmp_path):
    folder = write_dataset("night", tmp_path / "real", train=9, val=3)
    config = dataclasses.replace(TINY, data=str(folder))
    results = run_contact_sheet(config, tmp_path)
    assert results.keys() == {"right", "wrong", "judge on real images"}
    assert (tmp_path / "sheets" / f"{config.name}.png").is_file()
