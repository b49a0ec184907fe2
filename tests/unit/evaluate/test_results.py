import json
from pathlib import Path
from statistics import harmonic_mean

import pytest

from loraseg.errors import ConfigError
from loraseg.evaluate.leave_one_out import MethodScore, TargetScores
from loraseg.evaluate.methods import METHODS
from loraseg.evaluate.output import write_results
from loraseg.evaluate.results import (
    EvaluationResults,
    gap_closed,
    hmeans,
    results_table,
)
from loraseg.evaluate.seed_summary import summarise_seeds
from loraseg.evaluate.tuning import Hyperparameters

# SemLA's table of leave-one-out results, columns acdc-rain, acdc-fog and a150.
PUBLISHED = {
    "acdc-rain": (0.465, 0.674, 0.677, 0.709),
    "acdc-fog": (0.471, 0.697, 0.719, 0.700),
    "a150": (0.378, 0.373, 0.382, 0.540),
}


def scores(name, zero_shot, uniform, semla, oracle=None):
    values = {"zero_shot": zero_shot, "uniform": uniform, "semla": semla}
    if oracle is not None:
        values["oracle"] = oracle
    return TargetScores(
        name=name,
        family=name.split("-")[0],
        classes=("road", "car"),
        images=4,
        data_digest="d",
        setting=Hyperparameters(k=5, temperature=0.05),
        methods={method: MethodScore(miou, (miou, None)) for method, miou in values.items()},
        weights={"cs": 0.75, "bdd": 0.25},
        distances={"cs": 8.0, "bdd": 9.0},
    )


@pytest.fixture
def results():
    targets = tuple(scores(name, *row) for name, row in PUBLISHED.items())
    return EvaluationResults(provenance={"seed": 0}, tuning={}, targets=targets, isolated=("a150",))


def test_hmeans_are_harmonic_means_of_the_scored_domains(results):
    means = hmeans(results.targets)
    assert list(means) == ["zero_shot", "uniform", "semla", "oracle"]
    for method, column in zip(means, zip(*PUBLISHED.values(), strict=True), strict=True):
        assert means[method] == pytest.approx(harmonic_mean(column), abs=1e-12)


def test_the_papers_gap_is_68_per_cent():
    published = scores(
        "all",
        *(METHODS[name].published_hmean for name in ("zero_shot", "uniform", "semla", "oracle")),
    )
    assert gap_closed([published]) == pytest.approx(0.68, abs=0.005)


def test_gap_needs_an_oracle_that_is_better():
    assert gap_closed([scores("a", 0.5, 0.5, 0.5, 0.4)]) is None
    assert gap_closed([scores("a", 0.5, 0.5, 0.5)]) is None
    with_oracle = scores("a", 0.2, 0.3, 0.3, 0.4)
    assert gap_closed([with_oracle, scores("b", 0.9, 0.9, 0.1)]) == pytest.approx(0.5)


def test_summary_has_figures_with_and_without_isolated_domains(results):
    summary = results.summary()
    assert summary["hmean_without_lonely"]["semla"] == pytest.approx(harmonic_mean([0.677, 0.719]))
    assert summary["semla_ahead_of_uniform"] == 3


def test_json_is_deterministic_and_strict(results):
    text = results.to_json()
    assert text == results.to_json()
    content = json.loads(text, parse_constant=pytest.fail)
    assert [target["name"] for target in content["targets"]] == list(PUBLISHED)
    assert content["targets"][0]["methods"]["semla"] == {"miou": 0.677, "iou": [0.677, None]}
    assert content["targets"][0]["setting"] == {"k": 5, "temperature": 0.05}


def test_table_has_rows_for_domains_means_and_paper(results):
    lines = results_table(results).splitlines()
    assert lines[0].split()[:5] == ["domain", "zero-shot", "uniform", "SemLA", "oracle"]
    row = ["acdc-rain", "46.5", "67.4", "67.7", "70.9", "5", "0.05", "cs", "0.75"]
    assert lines[2].split() == row
    means = [f"{100 * harmonic_mean(c):.1f}" for c in zip(*PUBLISHED.values(), strict=True)]
    assert any(line.split() == ["h-mean", *means] for line in lines)
    assert any(line.startswith("h-mean without a150") for line in lines)
    paper = next(line for line in lines if line.startswith("paper"))
    assert paper.split()[3:7] == ["39.4", "51.9", "54.2", "61.1"]
    assert "of the gap" in lines[-1]
    assert len({line.rstrip().count("\t") for line in lines}) == 1


def test_output_has_json_table_and_report(results, tmp_path):
    report = Path(write_results(results, str(tmp_path / "out")))
    assert report == tmp_path / "out" / "report.html"
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == [
        "report.html",
        "results.json",
        "table.txt",
    ]
    assert (tmp_path / "out" / "results.json").read_text() == results.to_json()
    assert "acdc-fog" in report.read_text()


def test_mean_and_deviation_over_seeds(results, tmp_path):
    paths = []
    for seed, semla in enumerate((0.5, 0.6, 0.7)):
        run = EvaluationResults(
            provenance={}, tuning={}, targets=(scores("a", 0.4, 0.45, semla, 0.8),)
        )
        paths.append(tmp_path / f"{seed}.json")
        paths[-1].write_text(run.to_json())
    lines = summarise_seeds(paths).splitlines()
    assert lines[0].split() == ["run", "zero-shot", "uniform", "SemLA", "oracle", "gap", "closed"]
    assert lines[4].split() == ["mean", "40.0", "45.0", "60.0", "80.0", "50", "%"]
    assert lines[5].split() == ["standard", "deviation", "0.0", "0.0", "10.0", "0.0", "25", "%"]
    assert lines[6].split() == ["paper", "39.4", "51.9", "54.2", "61.1", "68", "%"]


@pytest.mark.parametrize("content", ["", "[]", '{"summary": {}}', '{"summary": {"hmean": {}}}'])
def test_seed_summary_refuses_other_files(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match=r"x\.json: not the results"):
        summarise_seeds([tmp_path / "x.json"])
    with pytest.raises(ConfigError, match="cannot be read"):
        summarise_seeds([tmp_path / "absent.json"])
    with pytest.raises(ConfigError, match="at least one"):
        summarise_seeds([])
