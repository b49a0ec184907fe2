import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.packed import pack, read_packed, write_packed
from loraseg.errors import AdapterMismatchError, IntegrityError


def pair(d_in, d_out, rank, scale=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(
        torch.randn(rank, d_in, generator=generator),
        torch.randn(d_out, rank, generator=generator),
        scale,
    )


def make(**flags):
    pairs = {
        "b": pair(4, 6, 2),
        "a": pair(4, 6, 3, scale=2.0, seed=1),
        "c": pair(5, 5, 1),
        "zero_up": LoraPair(torch.ones(2, 4), torch.zeros(6, 2), 1.0),
        "zero_down": LoraPair(torch.zeros(2, 4), torch.ones(6, 2), 1.0),
        "zero_scale": pair(4, 6, 2, scale=0.0),
    }
    return Adapter(name="x", pairs=pairs, digest="12" * 32, base_digest="34" * 32, **flags)


def test_blocks_hold_the_scaled_products_by_shape():
    adapter, packed = make(), pack(make())
    assert list(packed.blocks) == [(5, 5), (6, 4)]
    assert packed.blocks[6, 4].layers == ("a", "b")
    assert (packed.rank, packed.blocks[6, 4].rank) == (3, 3)
    for block in packed.blocks.values():
        for site, down, up in zip(block.layers, block.down, block.up, strict=True):
            torch.testing.assert_close(up.T @ down, adapter.pairs[site].delta())
    assert packed.nbytes == 4 * (2 * 3 * (4 + 6) + 1 * (5 + 5))


def test_layers_without_an_update_are_left_out():
    nothing = Adapter(
        name="n", pairs={"a": LoraPair(torch.ones(1, 2), torch.zeros(3, 1), 1.0)}, digest="0"
    )
    packed = pack(nothing)
    assert (dict(packed.blocks), packed.rank, packed.nbytes) == ({}, 0, 0)
    assert not any(
        site.startswith("zero") for b in pack(make()).blocks.values() for site in b.layers
    )


@pytest.mark.parametrize(
    ("flags", "reason"),
    [({"use_dora": True}, "DoRA"), ({"use_rslora": True}, "rsLoRA"), ({"bias": "all"}, "biases")],
)
def test_refuses_adapters_that_are_not_plain_lora(flags, reason):
    with pytest.raises(AdapterMismatchError, match=f"'x': cannot be fused.*{reason}"):
        pack(make(**flags))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_memory_mapped_and_keeps_every_bit(tmp_path, dtype):
    packed, path = pack(make()).to("cpu", dtype), tmp_path / "deep" / "x.safetensors"
    write_packed(path, packed)
    again = read_packed(path)
    assert (again.name, again.digest, again.base_digest) == ("x", "12" * 32, "34" * 32)
    assert list(again.blocks) == list(packed.blocks)
    for shape, block in packed.blocks.items():
        assert again.blocks[shape].layers == block.layers
        assert torch.equal(again.blocks[shape].down, block.down)
        assert torch.equal(again.blocks[shape].up, block.up)
    with open("/proc/self/maps") as maps:  # noqa: PTH123 - a file of the kernel
        assert str(path) in maps.read()
    path.unlink()  # the mapping outlives the file
    assert torch.equal(again.blocks[5, 5].down, packed.blocks[5, 5].down)
    assert [p.name for p in path.parent.iterdir()] == []


def _with(path, tensors=None, **header):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    save_file(tensors or load_file(path), path, {**metadata, **header})


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_packed(path, pack(make()))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="differ from its checksum"):
        read_packed(path)
    for broken in (whole[:-5], whole[:4], b"", b"\0" * 100):
        path.write_bytes(broken)
        with pytest.raises(IntegrityError, match="not a packed adapter"):
            read_packed(path)
    path.write_bytes(whole)
    _with(path, format="2")
    with pytest.raises(IntegrityError, match="format 2"):
        read_packed(path)
    path.write_bytes(whole)
    row = load_file(path)["row"]
    _with(path, {"row": row.view(torch.int32)})
    with pytest.raises(IntegrityError, match="expected a floating-point dtype"):
        read_packed(path)
    path.write_bytes(whole)
    for blocks in (
        '[[5, 5, 1, ["c"]], [6, 4, 3, ["b", "a"]]]',
        '[[5, 5, 1, ["c"]], [6, 4, 3, ["a", "a"]]]',
        '[[5, 5, 1, ["c"]], [6, 4, 3, "ab"]]',
        '[[5, 5, 1, ["c"]], [5, 5, 1, ["d"]]]',
        '[[5, 5, -1, ["c"]]]',
        '[[6, 4, 3, ["a"]], [5, 5, 1, ["c"]]]',
        '[[6, 4, 9, ["a", "b"]]]',
        "[7]",
    ):
        path.write_bytes(whole)
        _with(path, blocks=blocks)
        with pytest.raises(IntegrityError, match="not a packed adapter"):
            read_packed(path)
    with pytest.raises(FileNotFoundError):
        read_packed(tmp_path / "nowhere")


def test_name_and_base_can_be_replaced():
    packed = dataclasses.replace(pack(make()), name="y")
    assert packed.name == "y"
    assert list(packed.blocks) == [(5, 5), (6, 4)]
