"""The file of a closed-set segmenter, and the frozen segmenter that is read from it.

One safetensors file: the tensors under the names of the library that the network comes from, and a
header that tells the network, its classes and the format. Nothing else is needed to use it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from loraseg.config import build, to_dict
from loraseg.data.labels import LabelSpace
from loraseg.errors import MALFORMED_INPUT_ERRORS, ConfigError, IntegrityError
from loraseg.segment.closed_set.networks import ClosedSetNetwork, NetworkConfig, build_network
from loraseg.storage import open_store
from loraseg.storage.safetensors_io import encode_safetensors
from loraseg.tensor_types import Float, UInt8, ndarray

__all__ = [
    "ClosedSetSegmenter",
    "decode_closed_set_segmenter",
    "encode_closed_set_segmenter",
    "load_closed_set_segmenter",
    "save_closed_set_segmenter",
]

_FORMAT = "loraseg-segmenter-1"


@dataclass(frozen=True, slots=True, eq=False)
class ClosedSetSegmenter:
    """A trained segmenter, frozen.

    Images go through it one by one, so that what it says of an image does not depend on the images
    beside it and memory stays at one image's classes.

    Attributes:
        network: In evaluation mode.
        name: The network's name.
        digest: sha256 of the file's bytes, hex.
        label_space: Its classes.
    """

    network: ClosedSetNetwork
    name: str
    digest: str
    label_space: LabelSpace

    def log_probabilities(self, images: UInt8[ndarray, "n h w 3"]) -> Float[Tensor, "n c h w"]:
        """Return the logarithm of each class's probability at each pixel, float32.

        Args:
            images: RGB; any height and width.
        """
        maps = [self._log_softmax(image) for image in images]
        if not maps:
            return torch.empty(0, len(self.label_space), *images.shape[1:3])
        return torch.stack(maps)

    def labels(self, images: UInt8[ndarray, "n h w 3"]) -> UInt8[ndarray, "n h w"]:
        """Return the likeliest class of each pixel; the lowest id among equally likely ones."""
        labels = torch.empty(images.shape[:3], dtype=torch.uint8)
        for i, image in enumerate(images):
            labels[i] = self._log_softmax(image).argmax(0)
        return labels.numpy()

    def _log_softmax(self, image: UInt8[ndarray, "h w 3"]) -> Tensor:
        with torch.inference_mode():
            pixels = self.network.normalise(torch.tensor(image)[None])
            return self.network(pixels)[0].float().log_softmax(0)


def encode_closed_set_segmenter(network: ClosedSetNetwork, class_names: Sequence[str]) -> bytes:
    """Return the bytes of a segmenter's file; equal networks give equal bytes.

    Raises:
        ConfigError: The names are not as many as the network's classes.
        DatasetError: They are no label space.
    """
    names = LabelSpace(tuple(class_names)).names
    if len(names) != network.classes:
        raise ConfigError(f"{len(names)} class names for a network of {network.classes} classes")
    header = {
        "format": _FORMAT,
        "network": json.dumps(to_dict(network.config), sort_keys=True),
        "classes": json.dumps(names, ensure_ascii=False),
    }
    return encode_safetensors(network.body.state_dict(), header)


def save_closed_set_segmenter(
    network: ClosedSetNetwork, class_names: Sequence[str], path: str | Path
) -> str:
    """Write a segmenter's file whole, then rename it into place.

    Returns:
        The sha256 of its bytes, hex.

    Raises:
        ConfigError: The names are not as many as the network's classes.
        DatasetError: They are no label space.
    """
    data = encode_closed_set_segmenter(network, class_names)
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
    return hashlib.sha256(data).hexdigest()


def load_closed_set_segmenter(
    spec: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ClosedSetSegmenter:
    """Read a segmenter from a file or a store.

    Args:
        spec: A path, ``file:///path`` or ``s3://bucket/key``.
        device: Where to put it.
        dtype: What to compute in.

    Raises:
        ConfigError: There is no such file.
        IntegrityError: It is no segmenter's file.
        StoreError: The store cannot be reached or lacks the object.
    """
    return decode_closed_set_segmenter(_read_bytes(str(spec)), str(spec), device, dtype)


def decode_closed_set_segmenter(
    data: bytes, where: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ClosedSetSegmenter:
    """Make a segmenter of the bytes of its file.

    Files of :func:`loraseg.segment.closed_set.unet.unet_bytes`, such as the miniature's judge, are
    understood as well.

    Args:
        data: What :func:`segmenter_bytes` returned.
        where: Named in errors.
        device: Where to put it.
        dtype: What to compute in.

    Raises:
        IntegrityError: The bytes are no segmenter's file, or some number is not finite.
    """
    try:
        header = _header(data)
        config = _config(header, where)
        label_space = LabelSpace(_names(header))
        state = safetensors.torch.load(data)
        _check_fit(config, len(label_space), state)
    except (*MALFORMED_INPUT_ERRORS, SafetensorError, RuntimeError) as error:
        raise IntegrityError(f"{where}: not a segmenter: {str(error)[:300]}") from error
    network = build_network(config, len(label_space))
    network.body.load_state_dict({name: _to_float32(value) for name, value in state.items()})
    return ClosedSetSegmenter(
        network.to(device, dtype).eval().requires_grad_(False),
        config.name,
        hashlib.sha256(data).hexdigest(),
        label_space,
    )


def _check_fit(config: NetworkConfig, classes: int, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors are those of the network, and finite.

    Built without memory first: what a header claims is cheap, what the file holds must fit it.
    """
    with torch.device("meta"):
        expected = build_network(config, classes).body.state_dict()
    if odd := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"tensor {odd[0]!r} is missing or unknown")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected {expected[name].dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")


def _to_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _header(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    if size > len(data):
        raise ValueError("no safetensors header")
    return json.loads(data[8 : 8 + size])["__metadata__"]


def _config(header: Mapping[str, str], where: str) -> NetworkConfig:
    if header.get("format") == _FORMAT:
        return build(NetworkConfig, json.loads(header["network"]), where=where)
    if "format" in header:
        raise ValueError(f"format {header['format']!r}, expected {_FORMAT!r}")
    return NetworkConfig(width=int(header["width"]))


def _names(header: Mapping[str, str]) -> tuple[str, ...]:
    names = json.loads(header["classes"])
    if not isinstance(names, list):
        raise TypeError(f"classes: got a {type(names).__name__}, expected a list of names")
    return tuple(names)


def _read_bytes(spec: str) -> bytes:
    if spec.startswith("s3://"):
        prefix, _, key = spec.rpartition("/")
        if not key or prefix in ("s3:", "s3:/"):
            raise ConfigError(f"segmenter {spec!r}: expected s3://bucket/key")
        return open_store(prefix).get(key)
    path = Path(unquote(urlsplit(spec).path) if spec.startswith("file://") else spec).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"segmenter {spec!r}: cannot read {path}: {error.strerror}; expected a path, "
            "file:///path or s3://bucket/key"
        ) from error
