"""Masks keep their image's name where that is safe, and never share one."""

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
    naming = MaskNamer()
    return {key: naming.assign(key) for key in sorted(keys)}


@pytest.mark.parametrize(
    ("key", "mask"),
    [
        ("a.jpg", "masks/a.png"),
        ("deep/er/a.b.JPEG", "masks/deep/er/a.b.png"),
        ("ein Bild mit Größe.png", "masks/ein Bild mit Größe.png"),
    ],
)
def test_a_mask_has_its_image_s_name(key, mask):
    assert names([key]) == {key: mask}
    assert plain_name(key) == mask


def test_of_images_that_differ_in_their_extension_the_first_has_the_name():
    found = names(["a.png", "a.jpg", "a-b.jpg", "a.k.jpg", "a.k.png", "a/b.png"])
    assert found["a.jpg"] == "masks/a.png"
    assert found["a.png"] == f"masks/a~{key_id('a.png')}.png"
    assert found["a.k.jpg"] == "masks/a.k.png"
    assert found["a.k.png"] == f"masks/a.k~{key_id('a.k.png')}.png"
    assert found["a/b.png"] == "masks/a/b.png"


def test_a_name_that_is_taken_is_left_alone():
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
def test_a_key_that_not_every_store_holds_gets_a_digest(key):
    assert names([key]) == {key: f"masks/~{key_id(key)}.png"}


@pytest.mark.parametrize("key", ["notes.txt", "no extension", "a.png.gz"])
def test_a_key_that_does_not_look_like_an_image_keeps_all_of_its_name(key):
    assert names([key]) == {key: f"masks/{key}~{key_id(key)}.png"}


def test_a_key_cannot_take_the_name_of_another_one_s_digest():
    imitation = f"a~{key_id('a.png')}.jpg"
    found = names(["a.jpg", "a.png", imitation, f"~{key_id('../x')}.png", "../x"])
    assert len(set(found.values())) == 5
    assert found[imitation] == f"masks/a~{key_id('a.png')}.jpg~{key_id(imitation)}.png"


@given(st.sets(KEYS, max_size=12))
def test_no_two_keys_share_a_mask_that_every_store_can_hold(keys):
    masks = set(names(keys).values())
    assert len(masks) == len(keys)
    for mask in masks:
        check_key(mask)
    # As files: none is a folder of another.
    for one, other in itertools.permutations(masks, 2):
        assert not other.startswith(f"{one}/")


@given(st.sets(KEYS, max_size=12), st.randoms())
def test_what_is_done_before_changes_no_name_of_the_rest(keys, random):
    whole = names(keys)
    done = {key for key in keys if random.random() < 0.5}
    masks_done = {whole[key] for key in done}
    naming = MaskNamer()
    for key in sorted(keys):
        taken = key not in done and plain_name(key) in masks_done
        name = naming.assign(key, taken=taken)
        assert key in done or name == whole[key]
