"""The model against a naive implementation of CAT-Seg: outputs and gradients."""

import pytest
import torch

from loraseg.segment.open_vocabulary.catseg.official import load_official_checkpoint
from loraseg.segment.open_vocabulary.losses import catseg_bce
from tests.unit.segment.open_vocabulary.catseg import naive_catseg
from tests.unit.segment.open_vocabulary.catseg.official_layout import Sizes, random_state

CLIP_HEADS, HEADS = 2, 2


def make(sizes, pad_len, dtype=torch.float64):
    state = {key: value.to(dtype) for key, value in random_state(sizes).items()}
    model = load_official_checkpoint(
        {key: value.clone() for key, value in state.items()},
        vision_heads=CLIP_HEADS,
        text_heads=CLIP_HEADS,
        heads=HEADS,
        image_size=sizes.grid * sizes.patch,
        pad_len=pad_len,
    )
    return state, model.to(dtype)


def inputs(sizes, classes, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    side = sizes.grid * sizes.patch
    images = torch.randn(batch, 3, side, side, generator=generator, dtype=dtype)
    text = torch.randn(classes, sizes.prompts, sizes.embed, generator=generator, dtype=dtype)
    label = torch.randint(0, classes, (batch, 11, 9), generator=generator)
    label[:, :3, :4] = 255
    return images, text, label


def naive(state, images, text, sizes, pad_len, pool):
    return naive_catseg.forward(
        state,
        images,
        text,
        clip_heads=CLIP_HEADS,
        heads=HEADS,
        window=sizes.window,
        pad_len=pad_len,
        pool=pool,
        guidance_blocks=(0, 1),
    )


CASES = {
    "t_below_pad": (Sizes(), 3, 6),
    "t_is_pad": (Sizes(), 6, 6),
    "t_above_pad": (Sizes(), 8, 6),
    "window_is_grid": (Sizes(window=4), 3, 6),
    "three_prompts": (Sizes(prompts=3), 3, 6),
    "three_prompts_above_pad": (Sizes(prompts=3), 8, 6),
    "four_windows_a_side": (Sizes(grid=6, window=2, positions=6), 2, 4),
    "odd_shift": (Sizes(grid=6, window=3, positions=5), 2, 4),
    "one_class": (Sizes(), 1, 6),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_forward_and_gradients_equal_the_naive_implementation(case, training):
    sizes, classes, pad_len = CASES[case]
    state, model = make(sizes, pad_len)
    model.train(training)
    images, text, label = inputs(sizes, classes)
    leaves = {k: v.requires_grad_() for k, v in state.items() if not k.endswith("attn_mask")}
    images_2, text_2 = images.clone().requires_grad_(), text.clone().requires_grad_()
    expected = naive(leaves, images_2, text_2, sizes, pad_len, 2 if training else 1)
    naive_catseg.loss(expected, label, 255, False).backward()

    images.requires_grad_()
    text.requires_grad_()
    got = model(images, text)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    catseg_bce(got, label).backward()
    torch.testing.assert_close(images.grad, images_2.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(text.grad, text_2.grad, rtol=1e-8, atol=1e-10)
    assert_gradients_equal(model, leaves)


def assert_gradients_equal(model, leaves):
    checked = 0
    for name, parameter in model.named_parameters():
        stem, _, last = name.rpartition(".")
        part = stem.rpartition(".")[2]
        if part in ("q_proj", "k_proj", "v_proj"):
            owner = stem.rpartition(".")[0]
            if last == "weight":
                expected = leaves[f"{owner}.{part}_weight"].grad
            else:
                whole = leaves[f"{owner}.in_proj_bias"].grad
                expected = None if whole is None else whole.chunk(3)["qkv".index(part[0])]
        else:
            expected = leaves[name].grad
        if parameter.grad is None:
            assert expected is None or not expected.any(), name
            continue
        expected = torch.zeros_like(parameter) if expected is None else expected
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=1e-10, msg=name)
        checked += 1
    assert checked > 100


@pytest.mark.parametrize("classes", [5, 256, 258])
def test_the_official_padding_of_256_in_float32(classes):
    sizes = Sizes(layers_aggregator=1)
    state, model = make(sizes, 256, torch.float32)
    images, text, _ = inputs(sizes, classes, batch=1, dtype=torch.float32)
    with torch.no_grad():
        expected = naive(state, images, text, sizes, 256, 1)
        got = model(images, text)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert int((got == -100).all(dim=(2, 3)).sum()) == max(classes - 256, 0)


def test_classes_are_selected_per_image():
    sizes = Sizes()
    _, model = make(sizes, 2)
    images, text, _ = inputs(sizes, 12, batch=6)
    images = images + 3 * images[:, :, :1, :1]  # colours far apart
    with torch.no_grad():
        together = model(images, text)
        apart = torch.cat([model(image[None], text) for image in images])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-10)
    cut = (together == -100).all(dim=(2, 3))
    assert cut.sum(dim=1).tolist() == [10] * 6
    assert len({tuple(row.tolist()) for row in cut}) > 1


def test_class_order_is_irrelevant_and_text_can_differ_between_images():
    sizes = Sizes()
    _, model = make(sizes, 6)
    images, text, _ = inputs(sizes, 4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        plain = model(images, text)
        permuted = model(images, text[order])
        per_image = model(images, torch.stack([text, text[order]]))
    torch.testing.assert_close(permuted, plain[:, order], rtol=0, atol=1e-10)
    torch.testing.assert_close(per_image[0], plain[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(per_image[1], permuted[1], rtol=0, atol=1e-10)


def test_text_encoder_equals_the_naive_implementation_and_ignores_tokens_after_the_end():
    sizes = Sizes()
    state, model = make(sizes, 6)
    ids = torch.tensor([[18, 3, 4, 19, 0, 0, 0], [18, 5, 19, 7, 19, 2, 0], [18, 9, 9, 9, 9, 19, 0]])
    with torch.no_grad():
        expected = naive_catseg.encode_text(state, ids, CLIP_HEADS)
        got = model.encode_text(ids)
        longer = model.encode_text(torch.nn.functional.pad(ids, (0, 2), value=1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(longer, got, rtol=0, atol=1e-11)


@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_the_naive_mean(masked):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 3, (2, 7, 13), generator=generator)
    label[0, :4] = 255
    expected = naive_catseg.loss(logits, label, 255, masked)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    actual = catseg_bce(logits, label.to(torch.uint8), mask_ignored=masked)
    (gradient,) = torch.autograd.grad(actual, logits)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
