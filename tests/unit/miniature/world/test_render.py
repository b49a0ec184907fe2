import numpy as np
import pytest

from loraseg.errors import ConfigError
from loraseg.miniature.world.batched_rng import BatchedRng
from loraseg.miniature.world.canvas import Scene
from loraseg.miniature.world.domains import BASE_DOMAINS, DOMAINS, FAMILIES, LABELLED_DOMAINS
from loraseg.miniature.world.render import CLASSES, presence, render
from loraseg.miniature.world.street import draw_street
from loraseg.miniature.world.top_down import draw_top_down

VIEWS = {"street": draw_street, "overhead": draw_top_down}


@pytest.mark.parametrize("domain", DOMAINS)
def test_images_and_masks_have_their_shapes(domain):
    images, masks = render(domain, 2, 0)
    assert images.shape == (2, 64, 64, 3)
    assert images.dtype == masks.dtype == np.uint8
    assert masks.shape == (2, 64, 64)
    assert masks.max() < len(CLASSES)
    assert images.std() > 5  # not a constant image


def test_an_image_does_not_depend_on_the_number_of_images():
    many, many_masks = render("rain", 70, 3)
    for count in (1, 3, 32, 33):
        images, masks = render("rain", count, 3)
        np.testing.assert_array_equal(images, many[:count])
        np.testing.assert_array_equal(masks, many_masks[:count])


def test_images_of_one_stream_differ():
    images, _ = render("clear-day", 70, 3)
    assert len(np.unique(images.reshape(70, -1), axis=0)) == 70


@pytest.mark.parametrize("other", [("clear-day", 4), ("clear-day", 3, "val"), ("overcast", 3)])
def test_another_stream_gives_other_scenes(other):
    assert (render("clear-day", 1, 3)[1] != render(*other[:1], 1, *other[1:])[1]).any()


def test_zero_scenes_can_be_rendered():
    images, masks = render("night", 0, 0)
    assert images.shape == (0, 64, 64, 3)
    assert masks.shape == (0, 64, 64)


def test_unknown_domain_and_negative_count_are_refused():
    with pytest.raises(ConfigError, match=r"unknown domain 'fogg'.*fog-light"):
        render("fogg", 1, 0)
    with pytest.raises(ConfigError, match="count -1"):
        render("rain", -1, 0)


def test_exactly_one_domain_has_a_family_of_its_own():
    assert len(DOMAINS) >= 24
    alone = [names for names in FAMILIES.values() if len(names) == 1]
    assert alone == [("negative",)]
    assert all(len(names) <= 3 for names in FAMILIES.values())
    assert set(BASE_DOMAINS) < set(LABELLED_DOMAINS) < set(DOMAINS)


def test_every_class_is_often_present_and_often_absent():
    share = presence(render("clear-day", 320, 1)[1]).mean(0)
    assert share.min() > 0.3
    assert share.max() < 0.85


def test_presence_counts_pixels():
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0].flat[:11] = 3
    masks[1].flat[:12] = 3
    assert presence(masks)[:, [0, 3, 4]].tolist() == [[True, False, False], [True, True, False]]


@pytest.mark.parametrize("domain", DOMAINS)
def test_effects_return_a_new_image_and_keep_the_scene(domain):
    rng = BatchedRng(np.random.default_rng(0), 4)
    scene = VIEWS[DOMAINS[domain].view](rng, DOMAINS[domain].palette)
    before = [array.copy() for array in vars(scene).values()]
    for effect in DOMAINS[domain].effects:
        image = effect(scene, rng)
        assert image.shape == scene.image.shape
        assert np.isfinite(image).all()
        for array, copy in zip(vars(scene).values(), before, strict=True):
            np.testing.assert_array_equal(array, copy)


def test_fog_hides_distant_pixels():
    rng = BatchedRng(np.random.default_rng(0), 8)
    scene = draw_street(rng, DOMAINS["fog-heavy"].palette)
    fogged = DOMAINS["fog-heavy"].effects[0](scene, rng)
    change = np.abs(fogged - np.float32([0.78, 0.79, 0.8])).mean(-1)
    near, far = scene.distance < 0.2, (scene.distance > 0.9)
    assert change[far].mean() < 0.5 * change[near].mean()


def test_night_keeps_lights():
    rng = BatchedRng(np.random.default_rng(1), 16)
    scene = draw_street(rng, DOMAINS["night"].palette)
    dark = DOMAINS["night"].effects[0](scene, rng)
    bright = scene.lights & (scene.image.max(-1) > 0.8)
    assert bright.any()
    assert dark[bright].max(-1).mean() > 0.6
    assert dark[~scene.lights].mean() < 0.35


def test_monochrome_domains_have_no_hue():
    for domain in ("noir", "thermal", "thermal-dim", "sketch"):
        images, _ = render(domain, 8, 0)
        means = images.reshape(-1, 3).astype(float).mean(0)
        assert np.ptp(means) < 1.0, domain


def test_scene_is_immutable():
    scene = Scene(*(np.zeros(1) for _ in range(4)))
    with pytest.raises(AttributeError, match="cannot assign"):
        scene.labels = np.ones(1)
