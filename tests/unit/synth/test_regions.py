import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from loraseg.errors import DatasetError, StageError
from loraseg.synth.conditioning import Condition
from loraseg.synth.regions import Regions, token_grid


def regions(seed=0, shape=(24, 36), samples=2, downsampling="nearest"):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (samples, *shape), generator=generator).to(torch.uint8)
    labels[labels == 4] = 255
    classes = torch.randint(-1, 4, (samples, 11), generator=generator)
    classes[:, 0] = -1
    return Regions(labels, classes, downsampling)


def condition(regions=None, token_classes=(-1, 0, -1), downsampling="nearest"):
    regions = np.zeros((4, 4), np.uint8) if regions is None else regions
    return Condition("a", np.array(token_classes), regions, regions, (0,), (), downsampling)


@pytest.mark.parametrize("grid", [(24, 36), (12, 18), (7, 5), (3, 5), (48, 30)])
def test_nearest_equals_that_of_torch(grid):
    batch = regions()
    cells = interpolate(batch.labels[:, None].float(), size=grid, mode="nearest").flatten(1)
    mask = batch.mask(*grid)
    assert mask.shape == (2, 1, grid[0] * grid[1], 11)
    for sample in range(2):
        for token, index in enumerate(batch.token_classes[sample].tolist()):
            always = torch.ones_like(cells[0], dtype=torch.bool)
            expected = always if index < 0 else cells[sample] == index
            assert torch.equal(mask[sample, 0, :, token], expected)


@pytest.mark.parametrize("grid", [(12, 18), (6, 9), (5, 7)])
def test_max_attends_to_every_class_in_a_cell(grid):
    batch = regions(downsampling="max", shape=(24, 36))
    mask = batch.mask(*grid).reshape(2, *grid, 11)
    rows, columns = grid
    for sample, i, j in np.ndindex(2, rows, columns):
        top, bottom = i * 24 // rows, -(-(i + 1) * 24 // rows)
        left, right = j * 36 // columns, -(-(j + 1) * 36 // columns)
        inside = set(batch.labels[sample, top:bottom, left:right].flatten().tolist())
        expected = [c in {-1, *inside} for c in batch.token_classes[sample].tolist()]
        assert mask[sample, i, j].tolist() == expected


def test_max_keeps_objects_thinner_than_a_cell():
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[0, :, 33] = 1
    classes = torch.tensor([[-1, 0, 1]])
    assert not Regions(labels, classes).mask(8, 8)[..., 2].any()
    assert Regions(labels, classes, "max").mask(8, 8)[0, 0, :, 2].sum() == 8


@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from(["nearest", "max"]),
)
def test_every_position_attends_to_a_token(seed, shape, grid, downsampling):
    assert regions(seed, shape, 1, downsampling).mask(*grid).any(dim=-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bias_is_the_mask_with_aligned_rows(dtype):
    batch = regions()
    bias = batch.bias(12, 18, dtype)
    assert bias.dtype == dtype
    assert torch.equal(bias == 0, batch.mask(12, 18))
    assert torch.equal(bias == float("-inf"), ~batch.mask(12, 18))
    assert bias.stride(-1) == 1
    assert all(step % 16 == 0 for step in bias.stride()[:-1])


def test_masks_are_cached():
    batch = regions()
    assert batch.mask(12, 18) is batch.mask(12, 18)
    assert batch.bias(12, 18, torch.float32) is batch.bias(12, 18, torch.float32)


def test_stack_keeps_the_order():
    conditions = [
        condition(np.full((4, 4), i, np.uint8), token_classes=(-1, i, -1)) for i in (2, 0)
    ]
    stacked = Regions.stack(conditions)
    assert stacked.labels[:, 0, 0].tolist() == [2, 0]
    assert stacked.token_classes[:, 1].tolist() == [2, 0]
    assert len(stacked) == 2


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (condition(np.zeros((4, 5), np.uint8)), r"condition 1 .*\(4, 5\).*\(4, 4\)"),
        (condition(token_classes=(-1, 0)), r"condition 1 .*\(2,\).*\(3,\)"),
        (condition(downsampling="max"), "condition 1 .*max.*nearest"),
    ],
)
def test_conditions_of_a_batch_must_have_equal_shapes(other, match):
    with pytest.raises(DatasetError, match=match):
        Regions.stack([condition(), other])


def test_refuses_empty_batches_and_samples_without_shared_tokens():
    with pytest.raises(DatasetError, match="no conditions"):
        Regions.stack([])
    with pytest.raises(DatasetError, match="sample 1: every token belongs to a class"):
        Regions(torch.zeros(2, 3, 3, dtype=torch.uint8), torch.tensor([[-1, 0], [0, 0]]))
    with pytest.raises(DatasetError, match="regions of 2 samples, but tokens of 1"):
        Regions(torch.zeros(2, 3, 3, dtype=torch.uint8), torch.tensor([[-1, 0]]))


def test_grid_equals_the_levels_of_a_unet():
    # diffusers halves by a 3x3 convolution of stride 2 and padding 1.
    for height in range(5, 97):
        for width in range(5, 97, 3):
            size = (height, width)
            for _ in range(4):
                assert token_grid(size[0] * size[1], (height, width)) == size
                size = tuple((side + 2 - 3) // 2 + 1 for side in size)


@pytest.mark.parametrize("latent", [(64, 64), (32, 96), (96, 40)])
def test_grid_follows_the_formula_if_levels_divide_evenly(latent):
    height, width = latent
    for factor in (1, 2, 4, 8):
        tokens = height * width // factor**2
        rows = round(height * math.sqrt(tokens / (height * width)))
        assert token_grid(tokens, latent) == (rows, tokens // rows)


def test_refuses_token_counts_that_match_no_level():
    for tokens in (0, 7, 65):
        with pytest.raises(StageError, match=rf"{tokens} query tokens, .* \(8, 8\)"):
            token_grid(tokens, (8, 8))
