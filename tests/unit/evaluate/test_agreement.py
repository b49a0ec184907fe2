import numpy as np
import pytest

from loraseg.errors import DatasetError
from loraseg.evaluate.agreement import measure_agreement

NAMES = ("sky", "road", "car")


def scenes():
    masks = np.array([[[0, 0], [1, 1]], [[0, 2], [1, 255]]], np.uint8)
    images = np.repeat(masks[..., None], 3, -1)
    return images, masks


def test_iou_equals_a_manual_count():
    images, masks = scenes()
    predicted = np.array([[[0, 0], [1, 2]], [[0, 2], [1, 0]]], np.uint8)
    result = measure_agreement(lambda _: predicted, images, masks, NAMES)
    # sky 3 of 3; road 2 of 3 labelled; car 1 of 2; the ignored pixel does not count.
    assert result.classes == pytest.approx({"sky": 1.0, "road": 2 / 3, "car": 1 / 2}, abs=1e-12)
    assert result.right == pytest.approx((1 + 2 / 3 + 1 / 2) / 3, abs=1e-12)


def test_wrong_masks_are_those_of_the_previous_image():
    _, masks = scenes()
    masks = masks % 255
    images = np.repeat(masks[..., None], 3, -1)
    result = measure_agreement(lambda images: images[..., 0], images, masks, NAMES)
    assert result.right == 1.0
    reordered = measure_agreement(lambda images: images[..., 0], images, masks[::-1], NAMES)
    assert result.wrong == reordered.right < 1.0


def test_a_single_image_has_no_wrong_mask():
    images, masks = scenes()
    with pytest.raises(DatasetError, match="expected at least two of equal size"):
        measure_agreement(lambda images: images[..., 0], images[:1], masks[:1], NAMES)
