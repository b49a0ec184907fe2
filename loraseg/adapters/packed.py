"""An adapter laid out for mixing: few large blocks instead of hundreds of small matrices.

All layers of one weight shape form a block, scaling is folded into the up side, and layers whose
correction is exactly zero are left out (those of published SemLA adapters' CLIP attention are,
methods B.1). On disk it is a safetensors file that is mapped into memory, so that the processes of
one machine share its pages and the system may take them back.
"""

import functools
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.errors import AdapterMismatchError, IntegrityError
from loraseg.tensor_types import Tensor

__all__ = ["LayerBlock", "PackedAdapter", "WeightShape", "pack", "read_packed", "write_packed"]

# (d_out, d_in) of a weight.
WeightShape = tuple[int, int]

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class LayerBlock:
    """The corrections of n layers of one weight shape: ``delta W_s = up[s].T @ down[s]``.

    Attributes:
        layers: Module names, sorted.
        down: A, (n, r, d_in).
        up: B transposed, scaling folded in, (n, r, d_out). Both sides have the rank first, so that
            several adapters stack into one contiguous matrix.
    """

    layers: tuple[str, ...]
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """The largest rank of its layers; the others are padded with zeros."""
        return self.down.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedAdapter:
    """One adapter as blocks by weight shape; immutable, told apart by its digest.

    Attributes:
        name: What people call it.
        digest: sha256 (hex) of the adapter's files.
        base_digest: sha256 (hex) of the base weights it was trained on, None if unknown.
        blocks: By (d_out, d_in), in ascending order; empty if the adapter changes nothing.
    """

    name: str
    digest: str
    base_digest: str | None
    blocks: Mapping[WeightShape, LayerBlock]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", MappingProxyType(dict(self.blocks)))

    @property
    def rank(self) -> int:
        """The largest rank of any layer, 0 if the adapter changes nothing."""
        return max((block.rank for block in self.blocks.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.down.nbytes + block.up.nbytes for block in self.blocks.values())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "PackedAdapter":
        """Return it on a device and in a type; itself if it is so already."""
        blocks = {
            shape: LayerBlock(b.layers, b.down.to(device, dtype), b.up.to(device, dtype))
            for shape, b in self.blocks.items()
        }
        return PackedAdapter(
            name=self.name, digest=self.digest, base_digest=self.base_digest, blocks=blocks
        )


def pack(adapter: Adapter) -> PackedAdapter:
    """Lay an adapter out for mixing, in the type and on the device of its pairs.

    Raises:
        AdapterMismatchError: It is more than a sum of products or scaled otherwise (DoRA, rsLoRA,
            trained biases or whole modules).
    """
    reason = adapter.unsupported_features()
    if adapter.use_rslora:
        reason = "rsLoRA scaling (alpha / sqrt(r))"
    if reason is not None:
        raise AdapterMismatchError(
            f"adapter {adapter.name!r}: cannot be fused, it has {reason}; expected plain LoRA"
        )
    members: dict[WeightShape, list[str]] = {}
    for site in sorted(adapter.pairs):
        pair = adapter.pairs[site]
        if pair.scale and pair.down.any() and pair.up.any():
            members.setdefault((pair.up.shape[0], pair.down.shape[1]), []).append(site)
    return PackedAdapter(
        name=adapter.name,
        digest=adapter.digest,
        base_digest=adapter.base_digest,
        blocks={
            s: _build_block(members[s], [adapter.pairs[m] for m in members[s]], s)
            for s in sorted(members)
        },
    )


def _build_block(layers: list[str], pairs: list[LoraPair], shape: WeightShape) -> LayerBlock:
    rank = max(pair.rank for pair in pairs)
    down = pairs[0].down.new_zeros(len(pairs), rank, shape[1])
    up = pairs[0].down.new_zeros(len(pairs), rank, shape[0])
    for index, pair in enumerate(pairs):
        down[index, : pair.rank] = pair.down
        torch.mul(pair.up.T, pair.scale, out=up[index, : pair.rank])
    return LayerBlock(tuple(layers), down, up)


def write_packed(path: Path, packed: PackedAdapter) -> None:
    """Write a file that :func:`read_packed` reads, whole or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    blocks = packed.blocks.values()
    parts = [side.flatten() for block in blocks for side in (block.down, block.up)]
    row = torch.cat(parts) if parts else torch.zeros(0)
    layout = [[*shape, b.rank, list(b.layers)] for shape, b in packed.blocks.items()]
    header = {
        "format": str(_FORMAT),
        "name": packed.name,
        "digest": packed.digest,
        "base_digest": packed.base_digest or "",
        "blocks": json.dumps(layout),
        "checksum": _checksum(row),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(safetensors.torch.save({"row": row}, header))
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def read_packed(path: Path) -> PackedAdapter:
    """Map a file of :func:`write_packed` into memory and check that its bytes are whole.

    Raises:
        FileNotFoundError: There is no such file.
        IntegrityError: It is damaged, of another format, or does not fit together.
    """
    try:
        with safe_open(str(path), "pt") as file:
            header: Mapping[str, str] = file.metadata() or {}
            row: Tensor = file.get_tensor("row")
        if header["format"] != str(_FORMAT):
            raise IntegrityError(f"{path}: got format {header['format']}, expected {_FORMAT}")
        if _checksum(row) != header["checksum"]:
            raise IntegrityError(f"{path}: its bytes differ from its checksum")
        return PackedAdapter(
            name=header["name"],
            digest=header["digest"],
            base_digest=header["base_digest"] or None,
            blocks=_split_blocks(row, header["blocks"]),
        )
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"{path}: not a packed adapter: {error}") from error


# Adapters of one recipe share one layout, and reading it takes longer than all the rest.
@functools.lru_cache(maxsize=64)
def _parse_layout(layout: str) -> tuple[tuple[WeightShape, int, tuple[str, ...]], ...]:
    """Return (shape, rank, sites) of every block, in order."""
    blocks: dict[WeightShape, tuple[WeightShape, int, tuple[str, ...]]] = {}
    for d_out, d_in, rank, sites in json.loads(layout):
        shape = (int(d_out), int(d_in))
        if shape in blocks or sites != sorted({str(site) for site in sites}) or rank < 1:
            raise ValueError(f"block {shape}: twice, without rank, or its sites are not in order")
        blocks[shape] = shape, int(rank), tuple(sites)
    return tuple(blocks.values())


def _split_blocks(row: Tensor, layout: str) -> dict[WeightShape, LayerBlock]:
    """Return views of the row: each block's down side, then its up side."""
    if not row.is_floating_point():
        raise ValueError(f"{row.dtype}, expected a floating point type")
    blocks: dict[WeightShape, LayerBlock] = {}
    start = 0
    for (d_out, d_in), rank, sites in _parse_layout(layout):
        middle = start + len(sites) * rank * d_in
        stop = middle + len(sites) * rank * d_out
        if stop > len(row):
            raise ValueError(f"{len(row)} values, expected at least {stop}")
        down = row[start:middle].view(len(sites), rank, d_in)
        blocks[d_out, d_in] = LayerBlock(
            sites, down, row[middle:stop].view(len(sites), rank, d_out)
        )
        start = stop
    if start != len(row):
        raise ValueError(f"{len(row)} values, expected {start}")
    return blocks


def _checksum(row: Tensor) -> str:
    """Guard against broken disks. The weights' own digest was checked when they were fetched."""
    return f"{zlib.crc32(memoryview(row.view(torch.uint8).numpy())):08x}"  # pyright: ignore[reportArgumentType]
