"""Where a machine's adapters come from: its own disk if they are there, else their library."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import nn

from loraseg.adapters.packed import PackedAdapter, pack
from loraseg.adapters.peft_io import load_adapter
from loraseg.cache_folder import cache_folder
from loraseg.engine.adapter_ref import AdapterRef
from loraseg.errors import AdapterMismatchError, IntegrityError, StoreError
from loraseg.fuse.bank import check_fits
from loraseg.library.catalog import Library
from loraseg.segment.base import SegmentationBase
from loraseg.segment.pack_folder import PackFolder

__all__ = ["AdapterSource"]


class AdapterSource:
    """Reads verified adapters for one base. Safe for any number of threads and processes.

    An adapter is fetched once for all processes of a machine; every byte is checked against the
    digests of the catalog before it is laid out and kept.
    """

    # A store that could not be reached is left alone for so long: whoever waits for adapters that
    # are not on this machine is told at once, instead of all of them waiting for the store.
    PAUSE_S: ClassVar[float] = 2.0

    def __init__(
        self,
        libraries: Mapping[str, Library],
        base: SegmentationBase,
        folder: PackFolder | None = None,
    ) -> None:
        """Read from ``libraries``, by the names that references use.

        Args:
            libraries: Where adapters are fetched.
            base: Its device and type are those of what is read; its layers must be there.
            folder: Where they are kept; by default ``packed`` in the user's cache.
        """
        self._libraries = dict(libraries)
        self._base = base
        self._folder = folder or PackFolder(cache_folder("packed"))
        self._down_until = dict.fromkeys(libraries, 0.0)
        self._linears = {
            name: layer
            for name, layer in base.model.named_modules()
            if isinstance(layer, nn.Linear)
        }

    def __call__(self, ref: AdapterRef) -> PackedAdapter:
        """Return an adapter that fits the base.

        Raises:
            IntegrityError: A stored object is missing or differs from its digest.
            AdapterMismatchError: It was trained on another base, or is no adapter for this one.
            StoreError: The store cannot be reached.
        """
        if ref.base_digest != self._base.digest:
            raise AdapterMismatchError(
                f"adapter {ref.name!r} was trained on base {ref.base_digest}, expected "
                f"{self._base.digest}"
            )
        packed = self._folder.fetch(ref.digest, lambda: self._fetched(ref))
        if packed.digest != ref.digest:
            raise IntegrityError(
                f"adapter {ref.name!r}: got the bytes of {packed.digest}, expected {ref.digest}"
            )
        check_fits(packed, self._linears)
        # The same files may be published under several names, and know no base.
        named = replace(packed, name=ref.name, base_digest=ref.base_digest)
        # On a GPU, what is hot stays there. In the type of the file it stays a mapping of it.
        return named.to(self._base.device, self._base.dtype)

    def _fetched(self, ref: AdapterRef) -> PackedAdapter:
        if time.monotonic() < self._down_until[ref.library]:
            raise StoreError(f"library {ref.library!r}: its store could not be reached just now")
        try:
            files, _ = self._libraries[ref.library].load_entry(ref)
        except StoreError:
            self._down_until[ref.library] = time.monotonic() + self.PAUSE_S
            raise
        try:
            return pack(load_adapter(files, name=ref.name))
        except IntegrityError as error:  # whole, but never was an adapter
            raise AdapterMismatchError(f"adapter {ref.name!r}: {error}") from error
