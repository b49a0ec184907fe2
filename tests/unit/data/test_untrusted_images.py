import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from loraseg import seeding
from loraseg.data.images import read_image
from loraseg.data.untrusted_images import decode_image, image_size
from loraseg.errors import DatasetError

NOISE = seeding.numpy_generator(0, "uploads").integers(0, 256, (37, 53, 3)).astype(np.uint8)


def encode_image(kind, image=None, **options):
    buffer = io.BytesIO()
    (Image.fromarray(NOISE) if image is None else image).save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    return b"\x89PNG\r\n\x1a\n" + png_chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    )


def rotated_jpeg(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode_image("JPEG", quality=95, exif=exif)


KINDS = {
    "png": encode_image("PNG"),
    "grey": encode_image("PNG", Image.fromarray(NOISE[..., 0])),
    "16-bit": encode_image("PNG", Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200)),
    "palette": encode_image("PNG", Image.fromarray(NOISE).quantize(16)),
    "palette with transparency": encode_image(
        "PNG", Image.fromarray(NOISE).quantize(16), transparency=bytes(range(16))
    ),
    "transparent": encode_image("PNG", Image.fromarray(NOISE).convert("RGBA")),
    "one bit": encode_image("PNG", Image.fromarray(NOISE).convert("1")),
    "animated": encode_image("PNG", save_all=True, append_images=[Image.fromarray(255 - NOISE)]),
    "jpeg": encode_image("JPEG"),
    "progressive": encode_image("JPEG", progressive=True),
    "cmyk": encode_image("JPEG", Image.fromarray(NOISE).convert("CMYK")),
    "grey jpeg": encode_image("JPEG", Image.fromarray(NOISE).convert("L")),
    "turned": rotated_jpeg(6),
    "mirrored": rotated_jpeg(2),
    "one pixel": encode_image("PNG", Image.fromarray(NOISE[:1, :1])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_the_file_reader(kind, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(KINDS[kind])
    assert np.array_equal(decode_image(KINDS[kind]), read_image(path))


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_known_from_the_header_alone(kind):
    data = KINDS[kind]
    assert image_size(data) == Image.open(io.BytesIO(data)).size
    assert image_size(memoryview(data)[:700]) == image_size(data)


@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_is_refused_as_a_dataset_error(kind):
    data = KINDS[kind]
    # The first frame alone is an image; and nothing follows a picture's data but its end mark.
    end_of_picture = data.index(b"fcTL", 100) if kind == "animated" else len(data) - 30
    for end in range(0, end_of_picture, 1 if end_of_picture < 200 else 97):
        with pytest.raises(DatasetError, match=r"neither a PNG nor a JPEG|broken or cut off"):
            decode_image(data[:end])


# Pillow passes over EXIF data that it cannot read, with a warning.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("kind", ["png", "16-bit", "palette", "jpeg", "progressive", "turned"])
def test_flipped_bytes_give_an_image_or_a_dataset_error(kind):
    generator = seeding.numpy_generator(1, "flips", kind)
    data = np.frombuffer(KINDS[kind], np.uint8)
    for _ in range(300):
        broken = data.copy()
        places = generator.integers(0, min(len(data), 700), size=3)
        broken[places] = generator.integers(0, 256, size=3)
        try:
            image = decode_image(broken.tobytes(), max_pixels=1_000_000)
        except DatasetError:
            continue
        assert image.ndim == 3
        assert image.dtype == np.uint8


@pytest.mark.parametrize(
    "data",
    [b"", b"\x89PNG", b"GIF89a" + bytes(50), b"<svg/>", b"RIFF\0\0\0\0WEBP", b"\xff\xd8" * 5000],
)
def test_other_formats_are_refused(data):
    with pytest.raises(DatasetError, match=r"neither|broken"):
        decode_image(data)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_size_is_refused_before_anything_is_decoded(width, height):
    with pytest.raises(DatasetError, match=f"{width} x {height}"):
        decode_image(png_header(width, height) + bytes(100), max_pixels=36_000_000)


def test_large_jpeg_header_is_refused():
    data = encode_image("JPEG")
    place = data.index(b"\xff\xc0")
    forged = data[: place + 5] + struct.pack(">HH", 60_000, 60_000) + data[place + 9 :]
    with pytest.raises(DatasetError, match="60000 x 60000"):
        decode_image(forged)


def test_second_header_cannot_enlarge_an_image():
    small, large = png_header(4, 4), png_header(5000, 5000)[8:]
    data = small + large + png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
    with pytest.raises(DatasetError, match=r"two sizes|broken"):
        decode_image(data)


def test_zip_bomb_in_a_text_chunk_is_refused_or_ignored():
    bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000), 9))
    data = KINDS["png"]
    with pytest.raises(DatasetError, match="broken"):
        decode_image(data[:33] + bomb + data[33:])


def test_jpeg_with_thousands_of_scans_is_rejected_quickly():
    data = encode_image("JPEG", Image.new("RGB", (2000, 2000)), progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 5000 + b"\xff\xd9"
    started = time.process_time()
    with pytest.raises(DatasetError, match="scans"):
        decode_image(bomb)
    assert time.process_time() - started < 1
