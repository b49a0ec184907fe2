"""Files of closed-set segmenters, and the frozen segmenter that is loaded from one.

A file is a single safetensors file: the tensors, named as in the library that the network comes
from, and a header with the network config, the class names and the format. The judge of the
miniature has an older header with the width of a U-Net; it is still read.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from loraseg.config import build, to_dict
from loraseg.data.labels import LabelSpace
from loraseg.errors import MALFORMED_INPUT_ERRORS, ConfigError, IntegrityError
from loraseg.segment.closed_set.networks import ClosedSetNetwork, NetworkConfig, build_network
from loraseg.storage import local_path, open_parent_store
from loraseg.storage.safetensors_io import encode_safetensors
from loraseg.tensor_types import Float, UInt8, ndarray

__all__ = [
    "ClosedSetSegmenter",
    "decode_closed_set_segmenter",
    "encode_closed_set_segmenter",
    "load_closed_set_segmenter",
]

_FORMAT = "loraseg-segmenter-1"


@dataclass(frozen=True, slots=True, eq=False)
class ClosedSetSegmenter:
    """A trained segmenter, frozen.

    Images are processed one by one, so that a prediction does not depend on other images and
    memory is limited to the class maps of one image.

    Attributes:
        network: The network, in evaluation mode.
        name: Name of the network.
        digest: Sha256 (hex) of the file.
        label_space: The classes.
    """

    network: ClosedSetNetwork
    name: str
    digest: str
    label_space: LabelSpace

    def log_probabilities(self, images: UInt8[ndarray, "n h w 3"]) -> Float[Tensor, "n c h w"]:
        """Return the log-probability of each class at each pixel, float32.

        Args:
            images: RGB; any height and width.
        """
        maps = [self._log_softmax(image) for image in images]
        if not maps:
            return torch.empty(0, len(self.label_space), *images.shape[1:3])
        return torch.stack(maps)

    def labels(self, images: UInt8[ndarray, "n h w 3"]) -> UInt8[ndarray, "n h w"]:
        """Return the most probable class of each pixel; the lowest id on ties."""
        labels = torch.empty(images.shape[:3], dtype=torch.uint8)
        for i, image in enumerate(images):
            labels[i] = self._log_softmax(image).argmax(0)
        return labels.numpy()

    def _log_softmax(self, image: UInt8[ndarray, "h w 3"]) -> Tensor:
        with torch.inference_mode():
            pixels = self.network.normalise(torch.tensor(image)[None])
            return self.network(pixels)[0].float().log_softmax(0)


def encode_closed_set_segmenter(
    network: ClosedSetNetwork, class_names: Sequence[str], *, dtype: torch.dtype | None = None
) -> bytes:
    """Return the bytes of a segmenter's file; equal networks give equal bytes.

    Args:
        network: The network.
        class_names: One name per class.
        dtype: Stored dtype of floating-point tensors; None keeps theirs.

    Raises:
        ConfigError: The number of names differs from the number of classes.
        DatasetError: The names are not a valid label space.
    """
    names = LabelSpace(tuple(class_names)).names
    if len(names) != network.classes:
        raise ConfigError(f"{len(names)} class names for a network of {network.classes} classes")
    header = {
        "format": _FORMAT,
        "network": json.dumps(to_dict(network.config), sort_keys=True),
        "classes": json.dumps(names, ensure_ascii=False),
    }
    tensors = {
        name: value.to(dtype) if dtype and value.is_floating_point() else value
        for name, value in network.body.state_dict().items()
    }
    return encode_safetensors(tensors, header)


def load_closed_set_segmenter(
    spec: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ClosedSetSegmenter:
    """Load a segmenter from a file or a store.

    Args:
        spec: A path, ``file:///path`` or ``s3://bucket/key``.
        device: Device of the network.
        dtype: Dtype of the network.

    Raises:
        ConfigError: The file does not exist, or the spec is malformed.
        IntegrityError: The file is not a segmenter.
        StoreError: The store cannot be reached or lacks the object.
    """
    return decode_closed_set_segmenter(_read_bytes(str(spec)), str(spec), device, dtype)


def decode_closed_set_segmenter(
    data: bytes, where: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ClosedSetSegmenter:
    """Decode the bytes of a segmenter's file.

    Args:
        data: The bytes of :func:`encode_closed_set_segmenter`.
        where: Name of the file in error messages.
        device: Device of the network.
        dtype: Dtype of the network.

    Raises:
        IntegrityError: The bytes are not a segmenter, or a value is not finite.
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
    """Raise ValueError unless the tensors fit the network and are finite."""
    # On the meta device, so that a malicious config cannot allocate memory.
    with torch.device("meta"):
        expected = build_network(config, classes).body.state_dict()
    if unmatched := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"tensor {unmatched[0]!r} is missing or unknown")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )
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
        store, key = open_parent_store(spec)
        return store.get(key)
    path = local_path(spec)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"segmenter {spec!r}: cannot read {path}: {error.strerror}; expected a path, "
            "file:///path or s3://bucket/key"
        ) from error
