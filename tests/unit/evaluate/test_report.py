from statistics import harmonic_mean

import numpy as np
import pytest

from loraseg.evaluate.leave_one_out import MethodScore, ScoredExample, TargetScores
from loraseg.evaluate.report import build_report
from loraseg.evaluate.results import EvaluationResults
from loraseg.evaluate.tuning import Hyperparameters
from loraseg.reports.page import render_report

MIOU = {
    "fog": {"zero_shot": 0.4, "uniform": 0.45, "semla": 0.5, "oracle": 0.6},
    "night": {"zero_shot": 0.3, "uniform": 0.35, "semla": 0.34, "oracle": 0.5},
}


def target(name, examples=()):
    return TargetScores(
        name=name,
        family=name,
        classes=("road", "car"),
        images=4,
        data_digest="ab12",
        setting=Hyperparameters(k=2, temperature=0.05),
        methods={
            method: MethodScore(miou, (miou + 0.1, None)) for method, miou in MIOU[name].items()
        },
        weights={other: 1.0 for other in MIOU if other != name},
        distances={other: 2.0 for other in MIOU if other != name},
        examples=examples,
    )


@pytest.fixture
def results():
    labels = np.array([[0, 1], [1, 255]], np.uint8)
    example = ScoredExample(
        sample="0003",
        image=np.zeros((2, 2, 3), np.uint8),
        label=labels,
        predictions={"semla": np.zeros((2, 2), np.uint8)},
        retrieved=(("night", 1.0, 2.0),),
    )
    return EvaluationResults(
        provenance={"seed": 3, "config": {"grid": {"k": [1, 2]}}, "encoder": "clip:x"},
        tuning={},
        targets=(target("fog", (example,)), target("night")),
        isolated=("night",),
    )


def test_tiles_show_the_means_and_the_gap(results):
    means = {method: harmonic_mean([MIOU[name][method] for name in MIOU]) for method in MIOU["fog"]}
    gap = (means["semla"] - means["zero_shot"]) / (means["oracle"] - means["zero_shot"])
    assert [tile.value for tile in build_report(results).tiles] == [
        *(f"{100 * means[method]:.1f}" for method in ("zero_shot", "uniform", "semla")),
        f"{100 * gap:.0f} %",
    ]


def test_sections_are_tables_weights_classes_examples_and_settings(results):
    sections = {section.title: section.blocks for section in build_report(results).sections}
    assert list(sections) == [
        "mIoU by domain",
        "Without night",
        "Mixing weights",
        "IoU by class, zero-shot",
        "IoU by class, SemLA",
        "IoU by class, SemLA minus zero-shot",
        "Examples",
        "Settings and origin",
    ]
    assert sections["Mixing weights"][0].weights == [[None, 1.0], [1.0, None]]
    gains = sections["IoU by class, SemLA minus zero-shot"][0].values
    assert gains == [[pytest.approx(0.1), None], [pytest.approx(0.04), None]]


def test_examples_have_the_miou_of_their_image(results):
    sections = {section.title: section.blocks for section in build_report(results).sections}
    (example,) = sections["Examples"]
    assert [prediction.title for prediction in example.predictions] == ["truth", "SemLA"]
    # road: 1 of 3 predicted pixels; car: none of 2.
    assert example.predictions[1].score == pytest.approx((1 / 3 + 0) / 2)


def test_page_names_settings_data_and_papers(results):
    html = render_report(build_report(results))
    for text in ("grid.k", "1, 2", "ab12 (4 images)", "arxiv.org/abs/2503.21780", "clip:x"):
        assert text in html
