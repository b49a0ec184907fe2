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


def test_configurations_differ_and_the_main_ones_come_first():
    configs = study_configs(range(3))
    assert len({config.name for config in configs}) == len(configs)
    assert [config.labelled for config in configs[:4]] == [16, 64, 256, generator.ALL_SCENES]
    assert {config.seed for config in configs} == {0, 1, 2}


def test_a_configuration_is_trained_and_scored_once(tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "_MASKS", 2)
    config = GeneratorStudyConfig(labelled=2, seed=0, steps=1, rank=1, layers="matchmask")
    write_scenes(config, tmp_path)
    results = run_study_config(config, tmp_path)
    assert 0 <= results["ruled"]["wrong"] <= 1
    assert 0 <= results["free"]["right"] <= 1
    assert results["parameters"] > 0
    monkeypatch.setattr(generator, "load_diffusion", None)
    assert run_study_config(config, tmp_path) == results


def test_table_gives_mean_and_sample_deviation_over_seeds(tmp_path):
    (tmp_path / "cells").mkdir()
    for seed, right in ((0, 0.2), (1, 0.4)):
        config = GeneratorStudyConfig(labelled=16, seed=seed)
        agreement = {"right": right, "wrong": 0.1, "classes": {}}
        results = {**asdict(config), "parameters": 1234, "ruled": agreement, "free": agreement}
        (tmp_path / "cells" / f"{config.name}.json").write_text(json.dumps(results))
    (row,) = results_table(tmp_path).splitlines()[2:]
    assert "| 1,234 | 2 | 30.0 ± 14.1 | 10.0 ± 0.0 | 30.0 ± 14.1 |" in row
