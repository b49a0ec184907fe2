import math

import numpy as np
import pytest

from loraseg.adapters.targets.layer_report import LayerReport, LayerScore
from loraseg.adapters.targets.unet import attention_projections
from loraseg.errors import ConfigError
from loraseg.probes.tables import (
    block_of,
    compare_reports,
    format_comparison,
    format_report,
    group_layers,
    kind_of,
    resolution_of,
    spearman,
)
from tests.unit.tiny_diffusion import full_unet

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"


def layer(name, score, block=None, cross=None, part=None, factor=None):
    return LayerScore(
        name=name, score=score, numel=4, block=block, cross=cross, part=part, factor=factor
    )


def report(*scores, method="gradient", digest="ab" * 32):
    return LayerReport(
        method=method,
        base_name="tiny",
        base_digest=digest,
        scores=scores,
        samples={"views": 4, "epochs": 2},
        settings={},
    )


@pytest.fixture
def six_layers():
    return report(
        layer(f"{ATTENTION}.attn2.to_q", 0.8, "down_blocks.0", True, "q", 1),
        layer(f"{ATTENTION}.attn1.to_out.0", 0.2, "down_blocks.0", False, "out", 1),
        layer("down_blocks.0.resnets.0.time_emb_proj", 0.6),
        layer(
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 0.1, "mid_block", True, "v", 8
        ),
        layer("mid_block.resnets.0.conv1", 0.3),
        layer("conv_norm_out", 0.4),
    )


def rows(groups):
    return [(g.name, g.layers, g.mean, g.largest, g.leading) for g in groups]


def near(value):
    return pytest.approx(value, rel=1e-12)


def test_groups_by_block(six_layers):
    assert rows(group_layers(six_layers, block_of, 3)) == [
        ("down_blocks.0", 3, near(1.6 / 3), 0.8, 2),
        ("conv_norm_out", 1, near(0.4), 0.4, 1),
        ("mid_block", 2, near(0.2), 0.3, 0),
    ]


def test_groups_by_resolution(six_layers):
    # The time projection and the convolution have the resolution of their block's attention.
    assert rows(group_layers(six_layers, resolution_of(six_layers.scores), 1)) == [
        ("1/1", 3, near(1.6 / 3), 0.8, 1),
        ("-", 1, near(0.4), 0.4, 0),
        ("1/8", 2, near(0.2), 0.3, 0),
    ]


def test_groups_by_kind(six_layers):
    assert rows(group_layers(six_layers, kind_of, 6)) == [
        ("cross q", 1, 0.8, 0.8, 1),
        ("time", 1, 0.6, 0.6, 1),
        ("norm", 1, 0.4, 0.4, 1),
        ("conv", 1, 0.3, 0.3, 1),
        ("self out", 1, 0.2, 0.2, 1),
        ("cross v", 1, 0.1, 0.1, 1),
    ]


@pytest.mark.parametrize("name", ["sd1.4", "sd2.1", "sdxl"])
def test_every_layer_of_the_public_unets_has_a_kind(name):
    unet = full_unet(name)
    projections = {layer.name: layer for layer in attention_projections(unet)}
    kinds = {}
    for key, _ in unet.named_parameters():
        module = key.rpartition(".")[0]
        scored = (
            LayerScore.from_projection(projections[module], 1.0)
            if module in projections
            else layer(module, 1.0)
        )
        kinds.setdefault(kind_of(scored), set()).add(module)
    assert "other" not in kinds
    assert len(kinds["time"]) == 2 + sum("time_emb_proj" in n for n, _ in unet.named_modules())
    attention = sum(len(names) for kind, names in kinds.items() if kind.startswith(("cr", "self")))
    assert attention == len(projections)
    convolutions = {n for n, m in unet.named_modules() if type(m).__name__ == "Conv2d"}
    assert kinds["conv"] == {n for n in convolutions if "proj" not in n}


def test_text_shows_the_leading_layers_and_the_groups(six_layers):
    text = format_report(six_layers, 2)
    assert "gradient probe of tiny (abababababab): 6 layers; 2 epochs, 4 views" in text
    head = [line.split() for line in text.splitlines()[2:5]]
    assert head[0] == ["score", "kind", "resolution", "layer"]
    assert head[1] == ["1", "8.000e-01", "cross", "q", "1/1", f"{ATTENTION}.attn2.to_q"]
    assert head[2][-1] == "down_blocks.0.resnets.0.time_emb_proj"
    block = next(line for line in text.splitlines() if line.startswith("down_blocks.0 "))
    assert block.split() == ["down_blocks.0", "3", "5.333e-01", "8.000e-01", "2"]
    assert "in top 6" in format_report(six_layers, 100)
    with pytest.raises(ConfigError, match="k = 0"):
        format_report(six_layers, 0)


def test_agreement_of_leading_layers_and_ranks():
    first = report(
        *(layer(name, float(score)) for name, score in zip("abcdef", range(6, 0, -1), strict=True))
    )
    second = report(
        *(
            layer(name, float(score))
            for name, score in zip("abcdef", (6, 2, 5, 4, 3, 1), strict=True)
        )
    )
    agreement = compare_reports(first, second, (1, 2, 3, 6))
    assert agreement.overlaps == ((1, 1.0), (2, near(1 / 3)), (3, 0.5), (6, 1.0))
    # 1 - 6 sum d^2 / (n (n^2 - 1)): ranks of b, c, d, e differ by 3, 1, 1, 1.
    assert agreement.spearman == near(1 - 6 * 12 / (6 * 35))
    assert (agreement.layers, agreement.left_out) == (6, 0)


def test_agreement_covers_the_layers_that_both_score():
    first = report(layer("a", 3.0), layer("b", 9.0), layer("c", 1.0))
    second = report(layer("a", 3.0), layer("c", 1.0), layer("d", 7.0), method="other")
    agreement = compare_reports(first, second, (1,))
    assert (agreement.layers, agreement.left_out) == (2, 2)
    assert agreement.overlaps == ((1, 1.0),)
    assert agreement.spearman == near(1.0)
    assert "2 layers in both, 2 more in only one of them" in format_comparison(first, second)
    with pytest.raises(ConfigError, match="no layer in common"):
        compare_reports(first, report(layer("x", 1.0)))
    with pytest.raises(ConfigError, match="k = 3"):
        compare_reports(first, second, (3,))


def test_comparison_names_both_reports_and_their_agreement():
    first = report(*(layer(f"l{n}", float(n)) for n in range(12)))
    text = format_comparison(first, report(*first.scores, method="other", digest="cd" * 32))
    assert "gradient probe of tiny (abababababab)" in text
    assert "other probe of tiny (cdcdcdcdcdcd)" in text
    assert "Spearman correlation 1.000" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [["5", "1.000"], ["10", "1.000"]]
    flat = report(layer("l0", 1.0), layer("l1", 1.0))
    assert "Spearman correlation undefined" in format_comparison(first, flat)


def naive_ranks(values):
    """Mean of the positions (from 1) that equal values take in the sorted array."""
    return np.array([np.mean(np.flatnonzero(np.sort(values) == v) + 1) for v in values])


def test_spearman_is_the_correlation_of_mean_ranks():
    generator = np.random.default_rng(0)
    for count in (2, 5, 40):
        first, second = generator.integers(0, 6, (2, count)).astype(float)
        first[0], second[-1] = -1.0, 9.0  # neither is constant
        expected = np.corrcoef(naive_ranks(first), naive_ranks(second))[0, 1]
        assert spearman(first, second) == pytest.approx(expected)
    assert math.isnan(spearman(np.ones(3), np.arange(3.0)))
