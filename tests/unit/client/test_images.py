import io

import numpy as np
import pytest
from PIL import Image

from loraseg.client.images import decode_map, prepare_upload
from loraseg.errors import DatasetError

IMAGE = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)


def encoded(image=IMAGE, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


@pytest.mark.parametrize("image", [IMAGE, IMAGE[:, ::-1], np.asfortranarray(IMAGE)])
def test_arrays_are_encoded_losslessly(image):
    upload = prepare_upload(image)
    with Image.open(io.BytesIO(upload.data)) as sent:
        assert (np.asarray(sent) == image).all()
    assert (upload.content_type, upload.shapes, upload.pixels) == ("image/png", {(7, 5)}, 35)


def test_files_are_sent_unchanged(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(format="JPEG"))
    for image in (path, str(path), path.read_bytes()):
        upload = prepare_upload(image)
        assert upload.data == path.read_bytes()
        assert upload.content_type == "image/jpeg"
        # The EXIF orientation may rotate it.
        assert upload.shapes == {(7, 5), (5, 7)}


@pytest.mark.parametrize(
    "image",
    [IMAGE[..., 0], IMAGE.astype(np.float32), IMAGE[:0], np.zeros((2, 2, 4), np.uint8)],
)
def test_other_arrays_are_rejected(image):
    with pytest.raises(DatasetError, match=r"expected uint8 \(height, width, 3\)"):
        prepare_upload(image)


def test_errors_name_the_file(tmp_path):
    (tmp_path / "x.png").write_bytes(b"GIF89a")
    for image, reason in (
        (tmp_path / "x.png", "x.png: not a PNG or JPEG"),
        (tmp_path / "absent.png", "absent.png: no such file"),
        (tmp_path, "cannot be read"),
        (b"", "the image: not a PNG or JPEG"),
        (encoded(np.zeros((8001, 8000, 3), np.uint8), compress_level=1), "8000 x 8001 pixels"),
    ):
        with pytest.raises(DatasetError, match=reason):
            prepare_upload(image)


def test_maps_are_decoded_only_with_the_expected_shape():
    labels = IMAGE[..., 0]
    indexed = Image.fromarray(labels)
    indexed.putpalette(bytes(range(256)) * 3)
    buffer = io.BytesIO()
    indexed.save(buffer, format="PNG")
    for png in (encoded(labels), buffer.getvalue()):
        assert (decode_map(png, frozenset({(7, 5)})) == labels).all()
        with pytest.raises(ValueError, match="5 x 7"):
            decode_map(png, frozenset({(5, 7)}))
    for broken in (b"", encoded(labels)[:50], encoded(labels, format="JPEG"), encoded()):
        with pytest.raises(ValueError, match="not the expected PNG"):
            decode_map(broken, frozenset({(7, 5)}))
