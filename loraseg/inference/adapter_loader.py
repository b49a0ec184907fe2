"""Load adapters from the disk of this machine, or else from their library."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from loraseg.adapters.packed import PackedAdapter, pack
from loraseg.adapters.peft_io import load_adapter
from loraseg.cache_dir import cache_dir
from loraseg.errors import AdapterMismatchError, IntegrityError, StoreError
from loraseg.fuse.bank import check_fits
from loraseg.inference.adapter_ref import AdapterRef
from loraseg.inference.disk_cache import AdapterDiskCache
from loraseg.library.catalog import Library
from loraseg.segment.open_vocabulary.protocol import OpenVocabularyBase

__all__ = ["AdapterLoader"]


class AdapterLoader:
    """Reads verified adapters for one base. Safe for threads and processes.

    An adapter is fetched once for all processes of a machine. All its bytes are checked against the
    digests of the catalog before it is packed and cached.
    """

    # After a store could not be reached, requests for adapters that are not on this machine fail at
    # once for this time, instead of each waiting for the store.
    CIRCUIT_OPEN_S: ClassVar[float] = 2.0

    def __init__(
        self,
        libraries: Mapping[str, Library],
        base: OpenVocabularyBase,
        disk_cache: AdapterDiskCache | None = None,
    ) -> None:
        """Read from libraries.

        Args:
            libraries: Libraries by the name that references (:class:`AdapterRef`) use.
            base: Adapters must fit its layers, and get its device and dtype.
            disk_cache: By default the folder ``packed`` in the user's cache.
        """
        self._libraries = dict(libraries)
        self._base = base
        self._disk_cache = disk_cache or AdapterDiskCache(cache_dir("packed"))
        self._circuit_open_until = dict.fromkeys(libraries, 0.0)
        self._linears = base.linears()

    def __call__(self, ref: AdapterRef) -> PackedAdapter:
        """Return an adapter that fits the base.

        Raises:
            IntegrityError: A stored object is missing or differs from its digest.
            AdapterMismatchError: It was trained on another base, or does not fit its layers.
            StoreError: The store cannot be reached.
        """
        if ref.base_digest != self._base.digest:
            raise AdapterMismatchError(
                f"adapter {ref.name!r} was trained on base {ref.base_digest}, expected "
                f"{self._base.digest}"
            )
        packed = self._disk_cache.get_or_create(ref.digest, lambda: self._fetch(ref))
        if packed.digest != ref.digest:
            raise IntegrityError(
                f"adapter {ref.name!r}: got the bytes of {packed.digest}, expected {ref.digest}"
            )
        check_fits(packed, self._linears)
        # The same files may be published under several names, and need not name a base.
        named = replace(packed, name=ref.name, base_digest=ref.base_digest)
        # On a GPU, cached adapters stay there. On a CPU they stay memory-mapped if the dtype of the
        # file is that of the base.
        return named.to(self._base.device, self._base.dtype)

    def _fetch(self, ref: AdapterRef) -> PackedAdapter:
        if time.monotonic() < self._circuit_open_until[ref.library]:
            raise StoreError(
                f"library {ref.library!r}: its store could not be reached a moment ago"
            )
        try:
            files, _ = self._libraries[ref.library].load_entry(ref)
        except StoreError:
            self._circuit_open_until[ref.library] = time.monotonic() + self.CIRCUIT_OPEN_S
            raise
        try:
            return pack(load_adapter(files, name=ref.name))
        except IntegrityError as error:  # undamaged files that are not an adapter
            raise AdapterMismatchError(f"adapter {ref.name!r}: {error}") from error
