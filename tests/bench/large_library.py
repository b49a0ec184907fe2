"""Libraries of any number of adapters that are already cached on the local disk.

Centroids lie among the embeddings of rendered scenes; every adapter has different weights. Packed
files are on the local disk, so that the work per image is measured and not the first download of
an adapter.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loraseg.adapters import PackedAdapter
from loraseg.adapters.packed import LayerBlock
from loraseg.backbones.clip import ClipEncoder
from loraseg.inference.disk_cache import AdapterDiskCache
from loraseg.library import AdapterCard, BaseModelInfo, CatalogEntry, Centroid
from loraseg.library.records import HEAD_KEY, CatalogHead, snapshot_key
from loraseg.library.snapshot import encode_snapshot
from loraseg.miniature.world.render import DOMAINS, render
from loraseg.seeding import numpy_generator
from loraseg.storage import open_store

__all__ = ["entries", "publish_catalog", "scene_embeddings", "scenes", "write_packed_adapters"]

_LARGEST = 10_000


def scenes(key: str, count: int = 8) -> list[np.ndarray]:
    """Return ``count`` uint8 scenes of different domains."""
    random = numpy_generator(0, "bench", key)
    names = random.permutation(sorted(DOMAINS))[:count]
    return [render(str(name), 1, 0, "bench", key)[0][0] for name in names]


def scene_embeddings(encoder: ClipEncoder) -> np.ndarray:
    """Return embeddings (200, d) of scenes, from which centroids are made."""
    return np.concatenate([encoder.encode_images(scenes(f"known {n}")) for n in range(25)])


def entries(
    embeddings: np.ndarray, count: int, *, base_digest: str = "00" * 32, encoder_id: str = "bench"
) -> list[CatalogEntry]:
    """Return entries whose centroids lie among ``embeddings`` (n, d)."""
    random = numpy_generator(0, "bench", "centroids", count)
    spread = 0.5 * embeddings.std(axis=0)
    rows = embeddings[random.integers(0, len(embeddings), count)]
    rows = (rows + spread * random.standard_normal(rows.shape)).astype(np.float64)
    base = BaseModelInfo("bench", base_digest)
    return [_entry(number, row, base, encoder_id) for number, row in enumerate(rows)]


def _entry(number: int, vector: np.ndarray, base: BaseModelInfo, encoder_id: str) -> CatalogEntry:
    centroid = Centroid(
        encoder_id=encoder_id, normalised=False, vector=vector, count=None, spread=None
    )
    card = AdapterCard(
        name=f"a{number:05d}",
        role="segmenter",
        base=base,
        label_space=("road",),
        centroids=(centroid,),
    )
    return CatalogEntry(
        version=1,
        digest=f"{number:064x}",
        card=card,
        current=True,
        record_digest="00" * 32,
        size_bytes=0,
    )


def write_packed_adapters(
    folder: AdapterDiskCache, published: Sequence[CatalogEntry], template: PackedAdapter
) -> None:
    """Write an adapter for every entry, each slightly different from ``template``."""
    for number, entry in enumerate(published):
        scaled = {
            shape: LayerBlock(block.layers, block.down, block.up * (1 + number / _LARGEST))
            for shape, block in template.blocks.items()
        }
        folder.put(replace(template, digest=entry.digest, blocks=scaled))


def publish_catalog(folder: Path, published: Sequence[CatalogEntry]) -> str:
    """Write a catalog of the entries, without the adapters' files, and return the library's URI."""
    uri = folder.as_uri()
    store, snapshot = open_store(uri), encode_snapshot(published)
    store.put(snapshot_key(1), snapshot)
    store.put(HEAD_KEY, CatalogHead.from_snapshot(1, snapshot).to_bytes())
    return uri
