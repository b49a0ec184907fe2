import os

import pytest
import torch

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.packed import pack
from loraseg.errors import IntegrityError
from loraseg.segment.pack_folder import PackFolder


def make(number, size=64):
    pairs = {"a": LoraPair(torch.full((1, size), number + 1.0), torch.ones(size, 1), 1.0)}
    return pack(Adapter(name=str(number), pairs=pairs, digest=f"{number:064x}"))


def test_gives_back_what_was_put_to_any_process(tmp_path):
    folder = PackFolder(tmp_path / "packed")
    assert folder.get(make(1).digest) is None
    folder.put(make(1))
    again = PackFolder(tmp_path / "packed").get(make(1).digest)
    assert torch.equal(again.blocks[64, 64].down, make(1).blocks[64, 64].down)


def test_the_longest_unused_go_first(tmp_path):
    one = PackFolder(tmp_path / "size")
    one.put(make(0))
    size = next((tmp_path / "size").iterdir()).stat().st_size
    folder = PackFolder(tmp_path / "packed", limit_bytes=3 * size)
    kept = [folder.put(make(number)) for number in range(3)]
    for age, number in enumerate((1, 2, 0)):
        os.utime(tmp_path / "packed" / f"{number:064x}.safetensors", (age, age))
    folder.put(make(3))
    there = [number for number in range(4) if folder.get(f"{number:064x}")]
    assert there == [0, 3]  # down to nine tenths of the limit
    assert torch.equal(kept[1].blocks[64, 64].down, make(1).blocks[64, 64].down)


def test_a_damaged_or_exchanged_file_counts_as_missing(tmp_path, caplog):
    folder = PackFolder(tmp_path)
    folder.put(make(1))
    path = tmp_path / f"{1:064x}.safetensors"
    path.rename(tmp_path / f"{2:064x}.safetensors")
    assert folder.get(f"{2:064x}") is None
    assert "holds adapter" in caplog.text
    path.write_bytes(b"nonsense")
    assert folder.get(f"{1:064x}") is None
    assert "not usable" in caplog.text


def test_a_disk_that_cannot_be_written_costs_only_time(tmp_path, caplog):
    (tmp_path / "packed").write_text("a file where the folder should be")
    packed = PackFolder(tmp_path / "packed").put(make(1))
    assert packed.digest == f"{1:064x}"
    assert "not kept" in caplog.text


@pytest.mark.parametrize("digest", ["../../etc/passwd", "", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_only_digests_name_files(tmp_path, digest):
    with pytest.raises(IntegrityError, match="64 hex digits"):
        PackFolder(tmp_path).get(digest)


def test_what_killed_writers_left_goes_with_time(tmp_path):
    folder = PackFolder(tmp_path)
    old, new = (tmp_path / f".{2:064x}.safetensors.{end}" for end in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    folder.put(make(1))
    assert (old.exists(), new.exists()) == (False, True)


def test_a_folder_that_cannot_be_written_still_serves(tmp_path, monkeypatch):
    folder = PackFolder(tmp_path)
    folder.put(make(1))

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    assert folder.get(make(1).digest) is not None
