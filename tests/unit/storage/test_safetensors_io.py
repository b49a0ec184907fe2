import subprocess
import sys

import safetensors.torch
import torch
from safetensors import safe_open

from loraseg.storage.safetensors_io import encode_safetensors

_WRITE = """
import hashlib, torch
from loraseg.storage.safetensors_io import encode_safetensors
tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(3, dtype=torch.float16)}
header = {name: name * 3 for name in "xyzuvw"}
print(hashlib.sha256(encode_safetensors(tensors, header)).hexdigest())
"""


def test_the_library_reads_what_was_written(tmp_path):
    tensors = {"b": torch.randn(3, 5).T, "a": torch.ones(3, dtype=torch.float16)}
    header = {"format": "x", "config": '{"k": "ü"}'}
    path = tmp_path / "f.safetensors"
    path.write_bytes(encode_safetensors(tensors, header))
    loaded = safetensors.torch.load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == header
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0


def test_other_processes_write_the_same_bytes():
    runs = {subprocess.check_output([sys.executable, "-c", _WRITE], text=True) for _ in range(3)}
    assert len(runs) == 1
