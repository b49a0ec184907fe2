"""What holds wherever pictures are decoded; for the endpoint's client too, which loads no torch."""

import struct
import zlib

from PIL import Image

__all__ = ["DECODE_ERRORS", "MAX_PIXELS"]

# Below Pillow's own limit (89 million), so that ours is the message that people see.
MAX_PIXELS = 64_000_000
# What Pillow raises on broken or hostile files: the tests cut and flip bytes of good ones.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
