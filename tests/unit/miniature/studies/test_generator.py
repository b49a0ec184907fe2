import json
from dataclasses import asdict

from loraseg.miniature.studies import generator
from loraseg.miniature.studies.generator import (
    GeneratorStudyConfig,
    results_table,
    run_study_config,
    study_configs,
    write_scenes,
)


def test_cells_differ_and_the_main_ones_come_first():
    work = study_configs(range(3))
    assert len({cell.name for cell in work}) == len(work)
    assert [cell.labelled for cell in work[:4]] == [16, 64, 256, generator.ALL_SCENES]
    assert {cell.seed for cell in work} == {0, 1, 2}


def test_cell_is_trained_judged_and_not_done_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "_MASKS", 2)
    cell = GeneratorStudyConfig(labelled=2, seed=0, steps=1, rank=1, layers="matchmask")
    write_scenes(cell, tmp_path)
    found = run_study_config(cell, tmp_path)
    assert 0 <= found["ruled"]["wrong"] <= 1
    assert 0 <= found["free"]["right"] <= 1
    assert found["parameters"] > 0
    monkeypatch.setattr(generator, "load_diffusion", None)
    assert run_study_config(cell, tmp_path) == found


def test_table_gives_mean_and_sample_deviation_over_seeds(tmp_path):
    (tmp_path / "cells").mkdir()
    for seed, right in ((0, 0.2), (1, 0.4)):
        cell = GeneratorStudyConfig(labelled=16, seed=seed)
        judged = {"right": right, "wrong": 0.1, "classes": {}}
        found = {**asdict(cell), "parameters": 1234, "ruled": judged, "free": judged}
        (tmp_path / "cells" / f"{cell.name}.json").write_text(json.dumps(found))
    (row,) = results_table(tmp_path).splitlines()[2:]
    assert "| 1,234 | 2 | 30.0 ± 14.1 | 10.0 ± 0.0 | 30.0 ± 14.1 |" in row
