import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from loraseg.miniature.models.catseg import checks
from loraseg.miniature.models.catseg.checks import domain_iou
from loraseg.miniature.models.clip.checks import clip_report
from loraseg.miniature.models.weights_io import WEIGHTS, read_clip
from loraseg.miniature.world.render import BASE_DOMAINS, CLASSES, DOMAINS
from loraseg.segment.open_vocabulary.catseg.checkpoint import load_catseg

FILES = ("clip.safetensors", "catseg.safetensors")


@pytest.fixture(scope="module")
def report():
    return json.loads((WEIGHTS / "gates.json").read_text())


def test_the_weights_are_small_and_half_precision():
    assert sum((WEIGHTS / name).stat().st_size for name in FILES) <= 8e6
    for name in FILES:
        with safe_open(WEIGHTS / name, "pt") as file:
            kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert kinds == {torch.float16}


def test_the_report_covers_all_domains_and_classes(report):
    assert set(report["catseg"]["miou_by_domain"]) == set(DOMAINS)
    assert set(report["clip"]["dense_presence_auc"]) == set(CLASSES)
    assert report["checks"]


def test_the_clip_has_the_figures_of_the_report(report):
    small = clip_report(read_clip(WEIGHTS / "clip.safetensors"), seed=1, scenes=8)
    expected = report["clip"]
    assert small["domain_centroid_accuracy"] > expected["domain_centroid_accuracy"] - 0.15
    mean = np.mean(list(small["dense_presence_auc"].values()))
    assert mean == pytest.approx(np.mean(list(expected["dense_presence_auc"].values())), abs=0.03)


def test_the_catseg_has_the_figures_of_the_report(report):
    model = load_catseg(WEIGHTS / "catseg.safetensors")
    miou, iou = domain_iou(model, BASE_DOMAINS[0], CLASSES, seed=1, scenes=20)
    assert miou == pytest.approx(report["catseg"]["miou_by_domain"][BASE_DOMAINS[0]], abs=0.08)
    assert iou.shape == (12,)


def test_a_report_names_the_controls(monkeypatch):
    # The other domains would only take time.
    monkeypatch.setattr(checks, "DOMAINS", {name: DOMAINS[name] for name in BASE_DOMAINS})
    model = load_catseg(WEIGHTS / "catseg.safetensors")
    domains = checks.catseg_report(model, scenes=1)
    assert set(domains["held_out_iou_renamed"]) == {"photo", "night", "car"}
    assert set(domains["held_out_iou"]) == set(domains["miou_by_domain"]) == set(BASE_DOMAINS)
