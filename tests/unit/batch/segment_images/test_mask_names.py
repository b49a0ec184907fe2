"""A mask has the name of its image where every store can hold it; no two masks share a name."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraseg.batch.segment_images.mask_names import MaskNamer, key_id, plain_name
from loraseg.storage.store import check_key

SEGMENTS = st.lists(
    st.sampled_from(["a", "b", ".", "..", "~", ".png", ".jpg", "-", "é", "\ud800", " ", "\n"]),
    min_size=1,
    max_size=5,
).map("".join)
KEYS = st.lists(SEGMENTS, min_size=1, max_size=3).map("/".join)


def names(keys):
    namer = MaskNamer()
    return {key: namer.assign(key) for key in sorted(keys)}


@pytest.mark.parametrize(
    ("key", "mask"),
    [
        ("a.jpg", "masks/a.png"),
        ("deep/er/a.b.JPEG", "masks/deep/er/a.b.png"),
        ("ein Bild mit Größe.png", "masks/ein Bild mit Größe.png"),
    ],
)
def test_a_mask_has_the_name_of_its_image(key, mask):
    assert names([key]) == {key: mask}
    assert plain_name(key) == mask


def test_of_two_images_that_differ_in_the_extension_the_first_gets_the_name():
    assigned = names(["a.png", "a.jpg", "a-b.jpg", "a.k.jpg", "a.k.png", "a/b.png"])
    assert assigned["a.jpg"] == "masks/a.png"
    assert assigned["a.png"] == f"masks/a~{key_id('a.png')}.png"
    assert assigned["a.k.jpg"] == "masks/a.k.png"
    assert assigned["a.k.png"] == f"masks/a.k~{key_id('a.k.png')}.png"
    assert assigned["a/b.png"] == "masks/a/b.png"


def test_a_taken_name_is_not_used_again():
    assert MaskNamer().assign("a.jpg", taken=True) == f"masks/a~{key_id('a.jpg')}.png"


@pytest.mark.parametrize(
    "key",
    [
        "../up.png",
        "a//b.png",
        "/root.png",
        "x" * 300 + ".png",
        "d/" * 400 + "a.png",
        "new\nline.png",
        "back\\slash.png",
        "half\udc80.png",
        ".loraseg-lock.png",
        "a.png/b.png",
        "a.png/notes.txt",
    ],
)
def test_a_key_that_not_every_store_can_hold_gets_a_digest(key):
    assert names([key]) == {key: f"masks/~{key_id(key)}.png"}


@pytest.mark.parametrize("key", ["notes.txt", "no extension", "a.png.gz"])
def test_a_key_without_an_image_extension_keeps_its_whole_name(key):
    assert names([key]) == {key: f"masks/{key}~{key_id(key)}.png"}


def test_a_key_cannot_imitate_the_digest_of_another():
    imitation = f"a~{key_id('a.png')}.jpg"
    assigned = names(["a.jpg", "a.png", imitation, f"~{key_id('../x')}.png", "../x"])
    assert len(set(assigned.values())) == 5
    assert assigned[imitation] == f"masks/a~{key_id('a.png')}.jpg~{key_id(imitation)}.png"


@given(st.sets(KEYS, max_size=12))
def test_no_two_keys_share_a_mask_that_every_store_can_hold(keys):
    masks = set(names(keys).values())
    assert len(masks) == len(keys)
    for mask in masks:
        check_key(mask)
    # As files: none is the folder of another.
    for mask, other in itertools.permutations(masks, 2):
        assert not other.startswith(f"{mask}/")


@given(st.sets(KEYS, max_size=12), st.randoms())
def test_completed_images_do_not_change_the_names_of_the_rest(keys, random):
    expected = names(keys)
    completed = {key for key in keys if random.random() < 0.5}
    completed_masks = {expected[key] for key in completed}
    namer = MaskNamer()
    for key in sorted(keys):
        taken = key not in completed and plain_name(key) in completed_masks
        name = namer.assign(key, taken=taken)
        assert key in completed or name == expected[key]
