"""Crops, their latents and prompts, and batches that depend on the step only."""

import numpy as np
import pytest
import torch
from PIL import Image

from loraseg.data import LabelSpace, load_pair, open_dataset, write_classes
from loraseg.errors import ConfigError, DatasetError
from loraseg.synth.conditioning import Conditioner, ConditioningConfig
from loraseg.train.core.shuffling import shuffled_index
from loraseg.train.generator_adapters.crops import CroppedImages, ViewConfig
from loraseg.train.generator_adapters.samples import CropConditions, DrawConfig
from tests.tiny_training import write_domain
from tests.unit.tiny_diffusion import tiny_tokenizer
from tests.unit.train.tiny_generator import denoising_data, tiny_generator, tiny_recipe


@pytest.fixture(scope="module")
def base():
    return tiny_generator()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def data(base, folder):
    return denoising_data(folder, base, tiny_recipe())


def same(one, other):
    return (
        torch.equal(one.latents, other.latents)
        and torch.equal(one.noise, other.noise)
        and torch.equal(one.timesteps, other.timesteps)
        and torch.equal(one.text.hidden, other.text.hidden)
        and torch.equal(one.regions.labels, other.regions.labels)
        and torch.equal(one.regions.token_classes, other.regions.token_classes)
    )


def test_a_batch_depends_on_seed_keys_and_step_only(base, folder, data):
    again = denoising_data(folder, base, tiny_recipe())
    assert same(data.batch(5, 4), again.batch(5, 4))
    again.batch(2, 3)
    assert same(data.batch(5, 4), again.batch(5, 4))
    for other in ({"seed": 1}, {"keys": ("u",)}):
        assert not same(
            data.batch(5, 4), denoising_data(folder, base, tiny_recipe(), **other).batch(5, 4)
        )
    assert not same(data.batch(5, 4), data.batch(6, 4))


def test_microbatches_divide_the_batch(data):
    whole = data.batch(3, 7)
    parts = list(data.microbatches(3, 7, 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    labels = torch.cat([part.regions.labels for part in parts])
    assert torch.equal(labels, whole.regions.labels)


def test_every_crop_occurs_once_per_epoch():
    order = [shuffled_index(position, 5, 0, "k") for position in range(15)]
    assert [sorted(order[start : start + 5]) for start in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert order[:5] != order[5:10]


def test_latents_prompts_and_regions_are_those_of_the_image(base, folder, data):
    dataset = open_dataset(folder / "fog")
    samples = dataset.samples("train")
    conditioner = Conditioner(base.tokenizers, dataset.label_space, ConditioningConfig())
    flips = set()
    for draw in data.draw_samples(0, 12):
        batch = data.collate([draw])
        image, mask = load_pair(dataset, samples[draw.crop])
        image = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
        mask = np.asarray(Image.fromarray(mask).resize((32, 32), Image.Resampling.NEAREST))
        if draw.flipped:
            image, mask = image[:, ::-1], mask[:, ::-1]
        condition = conditioner(np.ascontiguousarray(mask))
        latents = base.encode_images(torch.from_numpy(image.copy())[None])
        torch.testing.assert_close(batch.latents, latents, rtol=0, atol=1e-6)
        expected = base.encode_text([condition.prompt]).hidden
        torch.testing.assert_close(batch.text.hidden, expected, rtol=0, atol=1e-6)
        assert (batch.regions.labels[0].numpy() == condition.regions).all()
        assert (batch.regions.token_classes[0].numpy() == condition.token_classes).all()
        flips.add(draw.flipped)
    assert flips == {True, False}


def test_draws_have_the_configured_shares(base, folder):
    recipe = tiny_recipe(draws={"flip": 0.25, "caption_dropout": 0.5})
    draws = denoising_data(folder, base, recipe).draw_samples(0, 2000)
    assert np.mean([draw.flipped for draw in draws]) == pytest.approx(0.25, abs=0.05)
    assert np.mean([draw.captioned for draw in draws]) == pytest.approx(0.5, abs=0.05)
    steps = np.array([draw.timestep for draw in draws])
    assert (steps.min(), steps.max()) >= (0, 990)
    assert steps.max() < 1000
    assert steps.mean() == pytest.approx(499.5, abs=25)


def test_a_dropped_caption_removes_prompt_and_regions(base, folder):
    batch = denoising_data(folder, base, tiny_recipe(draws={"caption_dropout": 1.0})).batch(0, 2)
    expected = base.encode_unconditional().hidden.expand(2, -1, -1)
    torch.testing.assert_close(batch.text.hidden, expected, rtol=0, atol=1e-6)
    assert batch.regions.mask(8, 8).all()


def test_without_regions_there_are_none(base, folder):
    assert (
        denoising_data(folder, base, tiny_recipe(draws={"regions": False})).batch(0, 2).regions
        is None
    )


def test_noise_is_normal_and_differs_between_samples(data):
    noise = torch.cat([data.batch(step, 4).noise for step in range(20)]).flatten()
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert noise.unique().numel() > 0.99 * noise.numel()


def test_scored_levels_cover_all_crops(data):
    draws = data.fixed_samples(4, 9)
    assert sorted({draw.timestep for draw in draws}) == [125, 375, 625, 875]
    assert len(draws) == 4 * len(data)
    assert len({draw.keys for draw in draws}) == len(draws)
    assert {draw.crop for draw in data.fixed_samples(4, 2)} == {0, 1}


def views_of(folder, **config):
    dataset = open_dataset(folder)
    return CroppedImages(dataset, dataset.samples("train"), ViewConfig(**config), keys=("v",))


def test_crops_are_parts_of_the_image_and_reproducible(tmp_path):
    write_domain(tmp_path, "fog")
    views, again = (views_of(tmp_path, size=(24, 40), fit="crop", crops=3) for _ in range(2))
    dataset = open_dataset(tmp_path)
    assert len(views.crops) == 12
    corners = set()
    for view in views.crops:
        image, mask = views.load(view)
        assert image.shape == (24, 40, 3)
        assert all(np.array_equal(a, b) for a, b in zip((image, mask), again.load(view), strict=1))
        whole, labels = load_pair(dataset, view.sample)
        windows = np.lib.stride_tricks.sliding_window_view(whole, (24, 40, 3))[:, :, 0]
        (place, *_) = np.argwhere((windows == image).all(axis=(2, 3, 4)))
        assert np.array_equal(labels[place[0] :, place[1] :][:24, :40], mask)
        corners.add(tuple(place))
    assert len(corners) > 6


def test_a_small_image_is_enlarged_before_it_is_cropped(tmp_path):
    write_domain(tmp_path, "fog", side=64)
    views = views_of(tmp_path, size=(100, 70), fit="crop", crops=1)
    image, mask = views.load(views.crops[0])
    assert (image.shape, mask.shape) == ((100, 70, 3), (100, 70))


def test_a_crop_without_labels_moves_to_labelled_pixels(tmp_path):
    write_domain(tmp_path, "fog")
    for path in (tmp_path / "masks" / "train").iterdir():
        mask = np.full((64, 64), 255, np.uint8)
        mask[61, 2] = 1
        Image.fromarray(mask).save(path)
    views = views_of(tmp_path, size=(16, 16), fit="crop", crops=4)
    assert all((views.load(view)[1] == 1).sum() == 1 for view in views.crops)


def conditions_of(folder, names=None):
    if names is not None:
        write_classes(folder / "classes.json", LabelSpace(tuple(names)))
    views = views_of(folder, size=(32, 32))
    space = open_dataset(folder).label_space
    return CropConditions(views, Conditioner((tiny_tokenizer(),), space, ConditioningConfig()))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.full((64, 64), 7, np.uint8), r"0\.png"),
        (np.full((64, 64), 255, np.uint8), r"0\.png: every pixel is ignored"),
        (np.zeros((8, 8), np.uint8), r"0\.png: 8 x 8 pixels"),
    ],
)
def test_unusable_masks_are_reported(tmp_path, mask, reason):
    write_domain(tmp_path, "fog")
    Image.fromarray(mask).save(tmp_path / "masks" / "train" / "0.png")
    with pytest.raises(DatasetError, match=reason):
        conditions_of(tmp_path)


def test_class_names_without_tokens_are_reported(tmp_path):
    write_domain(tmp_path, "fog")
    with pytest.raises(DatasetError, match=r"class 1 \('<\|endoftext\|>'\)"):
        conditions_of(tmp_path, ["sky", "<|endoftext|>", "car"])


def test_two_hundred_classes_fit_by_leaving_out_the_smallest(tmp_path):
    write_domain(tmp_path, "fog")
    mask = np.arange(200, dtype=np.uint8).repeat(10)[: 31 * 64].reshape(-1, 64)
    mask = np.vstack([mask, np.full((64 - len(mask), 64), 199, np.uint8)])
    Image.fromarray(mask).save(tmp_path / "masks" / "train" / "0.png")
    conditions = conditions_of(tmp_path, [f"road {index}" for index in range(200)])
    assert 199 in conditions.token_classes(0, captioned=True)
    assert len(set(conditions.token_classes(0, captioned=True))) < 60


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ViewConfig(size=(0, 8)), "size"),
        (lambda: ViewConfig(crops=0), "crops 0"),
        (lambda: DrawConfig(flip=1.5), "flip: got 1.5"),
        (lambda: DrawConfig(caption_dropout=-0.1), "caption_dropout"),
    ],
)
def test_settings_out_of_range_are_refused(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()
