"""Adapters packed for mixing: a few large blocks instead of hundreds of small matrices.

All layers with one weight shape form a block, the scale is folded into the up side, and layers
whose update is exactly zero are left out (in SemLA's published adapters those of CLIP's attention,
which its code never calls). On disk a packed adapter is a safetensors file that is memory-mapped,
so that the processes of a machine share its pages and the system can evict them.
"""

import functools
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.cache_dir import publish_file
from loraseg.errors import AdapterMismatchError, IntegrityError
from loraseg.tensor_types import Tensor

__all__ = ["LayerBlock", "PackedAdapter", "WeightShape", "pack", "read_packed", "write_packed"]

# (d_out, d_in) of a weight.
WeightShape = tuple[int, int]

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class LayerBlock:
    """The updates of n layers with one weight shape: ``delta W_s = up[s].T @ down[s]``.

    Attributes:
        layers: Module names, sorted.
        down: A, (n, r, d_in).
        up: B transposed, with the scale folded in, (n, r, d_out). The rank precedes the width on
            both sides, so that several adapters stack into one contiguous matrix.
    """

    layers: tuple[str, ...]
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """The largest rank of the layers; lower ranks are padded with zeros."""
        return self.down.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedAdapter:
    """One adapter as blocks by weight shape; immutable, identified by its digest.

    Attributes:
        name: Display name.
        digest: Sha256 (hex) of the adapter's files.
        base_digest: Sha256 (hex) of the base weights it was trained on; None if unknown.
        blocks: Blocks by weight shape (d_out, d_in), ascending; empty if the adapter changes
            nothing.
    """

    name: str
    digest: str
    base_digest: str | None
    blocks: Mapping[WeightShape, LayerBlock]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", MappingProxyType(dict(self.blocks)))

    @property
    def rank(self) -> int:
        """The largest rank of any layer; 0 if the adapter changes nothing."""
        return max((block.rank for block in self.blocks.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Size of all blocks in bytes."""
        return sum(block.down.nbytes + block.up.nbytes for block in self.blocks.values())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "PackedAdapter":
        """Return the adapter on a device and in a dtype; tensors that match are shared."""
        blocks = {
            shape: LayerBlock(b.layers, b.down.to(device, dtype), b.up.to(device, dtype))
            for shape, b in self.blocks.items()
        }
        return PackedAdapter(
            name=self.name, digest=self.digest, base_digest=self.base_digest, blocks=blocks
        )


def pack(adapter: Adapter) -> PackedAdapter:
    """Pack an adapter for mixing, in the dtype and on the device of its pairs.

    Raises:
        AdapterMismatchError: The adapter is not a plain sum of low-rank products (DoRA, rsLoRA,
            trained biases or full modules).
    """
    reason = adapter.unsupported_features()
    if adapter.use_rslora:
        reason = "rsLoRA scaling (alpha / sqrt(r))"
    if reason is not None:
        raise AdapterMismatchError(
            f"adapter {adapter.name!r}: cannot be fused, it has {reason}; expected plain LoRA"
        )
    members: dict[WeightShape, list[str]] = {}
    for module in sorted(adapter.pairs):
        pair = adapter.pairs[module]
        if pair.scale and pair.down.any() and pair.up.any():
            members.setdefault((pair.up.shape[0], pair.down.shape[1]), []).append(module)
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
    """Write a file for :func:`read_packed`, atomically.

    Raises:
        OSError: The folder cannot be written.
    """
    blocks = packed.blocks.values()
    sides = [side.flatten() for block in blocks for side in (block.down, block.up)]
    row = torch.cat(sides) if sides else torch.zeros(0)
    layout = [[*shape, b.rank, list(b.layers)] for shape, b in packed.blocks.items()]
    header = {
        "format": str(_FORMAT),
        "name": packed.name,
        "digest": packed.digest,
        "base_digest": packed.base_digest or "",
        "blocks": json.dumps(layout),
        "checksum": _checksum(row),
    }
    publish_file(path, safetensors.torch.save({"row": row}, header))


def read_packed(path: Path) -> PackedAdapter:
    """Memory-map a file of :func:`write_packed` and verify its checksum.

    Raises:
        FileNotFoundError: The file does not exist.
        IntegrityError: The file is damaged, inconsistent or of another format.
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


# Adapters of one recipe share a layout, and parsing it takes longer than all other steps.
@functools.lru_cache(maxsize=64)
def _parse_layout(layout: str) -> tuple[tuple[WeightShape, int, tuple[str, ...]], ...]:
    """Return (shape, rank, layers) of every block, in order."""
    blocks: dict[WeightShape, tuple[WeightShape, int, tuple[str, ...]]] = {}
    for d_out, d_in, rank, layers in json.loads(layout):
        shape = (int(d_out), int(d_in))
        if shape in blocks or layers != sorted({str(layer) for layer in layers}) or rank < 1:
            raise ValueError(f"block {shape}: duplicate, without rank, or with unsorted layers")
        blocks[shape] = shape, int(rank), tuple(layers)
    return tuple(blocks.values())


def _split_blocks(row: Tensor, layout: str) -> dict[WeightShape, LayerBlock]:
    """Return views of the row: each block's down side, then its up side."""
    if not row.is_floating_point():
        raise ValueError(f"{row.dtype}, expected a floating-point dtype")
    blocks: dict[WeightShape, LayerBlock] = {}
    start = 0
    for (d_out, d_in), rank, layers in _parse_layout(layout):
        middle = start + len(layers) * rank * d_in
        stop = middle + len(layers) * rank * d_out
        if stop > len(row):
            raise ValueError(f"{len(row)} values, expected at least {stop}")
        down = row[start:middle].view(len(layers), rank, d_in)
        up = row[middle:stop].view(len(layers), rank, d_out)
        blocks[d_out, d_in] = LayerBlock(layers, down, up)
        start = stop
    if start != len(row):
        raise ValueError(f"{len(row)} values, expected {start}")
    return blocks


def _checksum(row: Tensor) -> str:
    """Return a checksum against damaged disks; digests are verified when weights are fetched."""
    return f"{zlib.crc32(memoryview(row.view(torch.uint8).numpy())):08x}"  # pyright: ignore[reportArgumentType]
