import pytest

from loraseg.adapters.targets.layer_report import LayerReport, LayerScore
from loraseg.adapters.targets.selection import (
    bottom_k,
    select_from_report,
    select_random,
    share_to_count,
)
from loraseg.adapters.targets.unet import attention_projections
from loraseg.errors import ConfigError
from tests.unit.tiny_diffusion import full_unet, tiny_sd


@pytest.fixture(scope="module")
def unet():
    return tiny_sd().unet


@pytest.fixture
def report(unet):
    projections = attention_projections(unet)
    scores = [
        LayerScore.from_projection(p, float(index % 7)) for index, p in enumerate(projections)
    ]
    other = LayerScore(name="time_embedding.linear_1", score=100.0, numel=256)
    return LayerReport(
        method="gradient",
        base_name="tiny",
        base_digest="ab" * 32,
        scores=(other, *scores),
        samples={},
        settings={},
    )


@pytest.mark.parametrize(
    ("layers", "share", "k"),
    [
        *((560, share, k) for share, k in ((1, 6), (2, 11), (3, 17), (5, 28), (10, 56))),
        *((128, share, k) for share, k in ((1, 1), (2, 3), (3, 4), (5, 6), (10, 13))),
        *((20, share, k) for share, k in ((1, 1), (100, 20))),
    ],
)
def test_counts_of_shares(layers, share, k):
    assert share_to_count(share / 100, layers) == k


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ConfigError, match=r"expected a number in \(0, 1\]"):
        share_to_count(share, 10)


def test_top_and_share_agree_and_ignore_other_layers(report):
    ranked = sorted(
        (score for score in report.scores if score.is_projection),
        key=lambda score: (-score.score, score.name),
    )
    names = tuple(score.name for score in ranked)
    assert select_from_report(report, top=5) == names[:5]
    assert select_from_report(report, share=0.1) == names[: max(1, round(len(names) * 0.1))]
    assert select_from_report(report, top=1, projections_only=False) == ("time_embedding.linear_1",)


def test_bottom_k(report):
    names = sorted((s.score, s.name) for s in report.scores if s.is_projection)
    assert bottom_k(report, 4) == tuple(name for _, name in names[:4])
    everything = bottom_k(report, len(report.scores), projections_only=False)
    assert everything[-1] == "time_embedding.linear_1"
    with pytest.raises(ConfigError, match="k = 0, expected 1 to"):
        bottom_k(report, 0)


@pytest.mark.parametrize("arguments", [{}, {"top": 2, "share": 0.1}])
def test_exactly_one_of_top_and_share(report, arguments):
    with pytest.raises(ConfigError, match="expected exactly one of them"):
        select_from_report(report, **arguments)


def test_random_selection_depends_on_the_seed_alone(unet):
    order = [p.name for p in attention_projections(unet)]
    first = select_random(unet, 9, 3)
    assert first == select_random(tiny_sd(seed=5).unet, 9, 3)
    assert first != select_random(unet, 9, 4)
    assert list(first) == sorted(set(first), key=order.index)
    assert len(first) == 9
    assert select_random(unet, len(order), 0) == tuple(order)
    for k in (0, len(order) + 1):
        with pytest.raises(ConfigError, match=f"k = {k}, expected 1 to {len(order)} projections"):
            select_random(unet, k, 0)


def test_every_projection_is_drawn_equally_often():
    unet = full_unet("sd1.4")
    names = [p.name for p in attention_projections(unet)]
    drawn = [name for seed in range(100) for name in select_random(unet, 32, seed)]
    counts = [drawn.count(name) for name in names]
    # Each count is binomial(100, 1/4): 6 standard deviations around 25.
    assert min(counts) > 0
    assert max(counts) < 51
