"""The dataset layouts, one module each. A new layout is a module and a line of ``READERS``."""

from loraseg.data.datasets import Reader
from loraseg.data.readers.folder import FOLDER_READER

__all__ = ["READERS"]

# The first reader that recognises a folder opens it.
READERS: tuple[Reader, ...] = (FOLDER_READER,)
