import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from loraseg.data.images import read_image
from loraseg.data.labels import LabelSpace
from loraseg.data.masks import decode_mask, encode_mask, read_mask, write_mask
from loraseg.errors import DatasetError

IDS = np.array([[0, 1, 2], [3, 255, 0]], dtype=np.uint8)
SPACE = LabelSpace(("road", "sky", "car", "pole"))


def png(width, height, depth, color_type, rows):
    """Write a PNG by hand, one packed byte string a row, as an oracle apart from Pillow."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def save_image(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("space", [None, SPACE])
def test_round_trip(tmp_path, space):
    write_mask(tmp_path / "m.png", IDS, space)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", classes=4), IDS)


def test_palette_shows_the_class_colours():
    colors = np.asarray(Image.open(io.BytesIO(encode_mask(IDS, SPACE))).convert("RGB"))
    for place in np.ndindex(2, 3):
        if IDS[place] != 255:
            np.testing.assert_array_equal(colors[place], SPACE.palette[IDS[place]])


@pytest.mark.parametrize(
    ("depth", "rows", "expected"),
    [
        (1, [b"\xa0"], [[1, 0, 1]]),
        (2, [b"\x6c"], [[1, 2, 3]]),
        (4, [b"\x0c\x70"], [[0, 12, 7]]),
        (8, [b"\x00\x11\xff"], [[0, 17, 255]]),
        (16, [b"\x00\x05\x00\xff\x00\x00"], [[5, 255, 0]]),
    ],
)
def test_grey_of_any_depth_is_read_as_ids(tmp_path, depth, rows, expected):
    (tmp_path / "m.png").write_bytes(png(3, 1, depth, 0, rows))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), expected)


def test_ids_of_palette_images_are_indices_not_colours(tmp_path):
    image = Image.fromarray(IDS)
    image.putpalette(bytes(range(255, -1, -1)) * 3)
    np.testing.assert_array_equal(read_mask(save_image(tmp_path / "m.png", image)), IDS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_refuses_colours(tmp_path, mode):
    path = save_image(tmp_path / "m.png", Image.new(mode, (4, 4)))
    with pytest.raises(DatasetError, match=rf"m\.png: a mask of mode {mode}; expected one channel"):
        read_mask(path)


def test_refuses_jpeg_and_large_ids(tmp_path):
    path = save_image(tmp_path / "m.png", Image.new("L", (4, 4)), format="JPEG")
    with pytest.raises(DatasetError, match=r"a JPEG mask has no exact ids; expected a PNG"):
        read_mask(path)
    path.write_bytes(png(2, 1, 16, 0, [b"\x00\x05\xff\xff"]))
    with pytest.raises(DatasetError, match=r"m\.png: ids from 5 to 65535; expected 0 to 255"):
        read_mask(path)


def test_refuses_ids_outside_the_list(tmp_path):
    write_mask(tmp_path / "m.png", IDS)
    with pytest.raises(DatasetError, match=r"m\.png: ids \[2, 3\] outside .* 0 to 1 or 255"):
        read_mask(tmp_path / "m.png", classes=2)
    with pytest.raises(DatasetError, match=r"mask: ids \[2, 3\] outside the class list"):
        encode_mask(IDS, LabelSpace(("road", "sky")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_cut_off_file_is_refused(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    path = save_image(tmp_path / "x", Image.fromarray(noise), format=kind)
    whole = path.read_bytes()
    tail = 22 if kind == "PNG" else 2  # checksums and end marker: no pixel is lost without them
    for length in range(0, len(whole) - tail - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=r"x: the (image|PNG|JPEG) is (neither|broken)"):
            read_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_files_are_read_or_refused_but_never_crash(tmp_path, kind):
    generator = np.random.default_rng(1)
    noise = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = save_image(tmp_path / "x", Image.fromarray(noise), format=kind)
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    for _ in range(300):
        damaged = whole.copy()
        places = generator.integers(0, len(whole), 3)
        damaged[places] = generator.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(DatasetError):
            assert read_image(path).ndim == 3


@pytest.mark.parametrize("side", [8_001, 10_000, 60_000])
def test_decompression_bombs_are_refused_unopened(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, 8, 0, []))
    with pytest.raises(DatasetError, match=r"bomb\.png: .*pixels"):
        read_image(path)


def test_pixel_limit(tmp_path):
    path = save_image(tmp_path / "x.png", Image.new("RGB", (10, 10)))
    assert read_image(path, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(DatasetError, match="10 x 10 pixels; from 1 to 99"):
        read_image(path, max_pixels=99)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(tmp_path, kind):
    path = save_image(tmp_path / "x.png", Image.new("RGB", (4, 4)), format=kind)
    with pytest.raises(DatasetError, match="neither a PNG nor a JPEG"):
        read_image(path)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode)
    path = save_image(tmp_path / "x", image, format="JPEG" if mode == "CMYK" else "PNG")
    rgb = read_image(path)
    assert rgb.shape == (3, 5, 3)
    assert rgb.min() >= 254


def test_sixteen_bit_grey_keeps_its_upper_half(tmp_path):
    (tmp_path / "x.png").write_bytes(png(2, 1, 16, 0, [b"\x12\x34\xff\x00"]))
    np.testing.assert_array_equal(read_image(tmp_path / "x.png")[0, :, 0], [0x12, 0xFF])


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated by 90 degrees clockwise
    path = save_image(tmp_path / "x.png", Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(pixels, -1))


def test_missing_file(tmp_path):
    with pytest.raises(DatasetError, match=r"none\.png: no such file"):
        read_image(tmp_path / "none.png")


def test_bytes_are_read_like_files(tmp_path):
    for image in (
        Image.fromarray(np.array([[0, 3], [255, 1]], np.uint8)),
        Image.fromarray(np.array([[0, 1]], np.uint8) * 255).convert("1"),
    ):
        image.save(tmp_path / "a.png")
        data = (tmp_path / "a.png").read_bytes()
        assert np.array_equal(decode_mask(data, where="a"), read_mask(tmp_path / "a.png"))
    with pytest.raises(DatasetError, match=r"here: ids \[3\] outside"):
        decode_mask(encode_mask(np.full((2, 2), 3, np.uint8)), where="here", classes=2)
    for broken in (b"", b"\x89PNG\r\n\x1a\n", data[:40]):
        with pytest.raises(DatasetError, match="here: not a complete PNG"):
            decode_mask(broken, where="here")
