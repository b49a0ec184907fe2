"""Limits and errors of image decoding. Also used by the client, so torch is not imported."""

import struct
import zlib

from PIL import Image

__all__ = ["DECODE_ERRORS", "MAX_PIXELS"]

# Below Pillow's limit (89 million), so that loraseg's own error message is shown.
MAX_PIXELS = 64_000_000
# Raised by Pillow for corrupt or hostile files; the tests truncate and modify valid files.
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
