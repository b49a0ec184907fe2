"""A cache of latents and encoded prompts in a store, shared by all runs.

Stored as float32, so that a resumed run uses identical values: 64 KB per image of 512 x 512 and
flip, a quarter of a megabyte per prompt of SD 1.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from loraseg.backbones.diffusion import DiffusionBase, TextEncoding
from loraseg.errors import StoreError
from loraseg.storage import SHORT_RETRY_TIMEOUT_S, ObjectStore
from loraseg.storage.safetensors_io import encode_safetensors
from loraseg.storage.store import ObjectNotFoundError
from loraseg.tensor_types import Float, Tensor
from loraseg.train.generator_adapters.crops import Crop, CroppedImages

__all__ = ["TensorCache", "cached_latents", "cached_text"]

logger = logging.getLogger(__name__)

# Part of every key: raise it when the same images or prompts would give other values.
_FORMAT = 1
_CHUNK_SIZE = 32


class TensorCache:
    """Tensors by the values that decide them. A failing store only makes them be recomputed.

    Any number of workers may share a store: objects are written atomically, with equal content.
    """

    def __init__(self, store: ObjectStore) -> None:
        """Store tensors below the root of ``store``."""
        self._store = store.with_retry_timeout(SHORT_RETRY_TIMEOUT_S)

    def get_or_compute(
        self, kind: str, key_values: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the tensors of a key, computed and stored if they are missing or damaged.

        Args:
            kind: First part of the key.
            key_values: JSON values that decide the result.
            compute: Computes the tensors; they are returned and stored on the CPU.
        """
        text = json.dumps(key_values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        key = f"{kind}/{digest[:2]}/{digest}.safetensors"
        stored = self._load(key)
        if stored is not None:
            return stored
        tensors = {name: tensor.detach().cpu() for name, tensor in compute().items()}
        try:
            self._store.put(key, _pack(tensors))
        except StoreError as error:
            logger.warning("%s: not stored: %s", key, error)
        return tensors

    def _load(self, key: str) -> dict[str, Tensor] | None:
        try:
            data = self._store.get(key)
            return _unpack(data)
        except ObjectNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("%s: damaged, computed again: %s", key, error)
        except StoreError as error:
            logger.warning("%s: cannot be read, computed again: %s", key, error)
        return None


def cached_latents(
    cache: TensorCache,
    base: DiffusionBase,
    images: CroppedImages,
    crops: Sequence[Crop],
    *,
    flips: bool,
) -> Float[Tensor, "n f c y x"]:
    """Return the latents of crops on the CPU: the mode of the VAE's posterior.

    Each crop is encoded alone, so that its latents do not depend on other crops.

    Args:
        cache: The cache.
        base: The generator; its VAE encodes on its device.
        images: Loads the crops.
        crops: At least one crop.
        flips: Also return the latents of mirror images (f = 2 instead of 1).
    """
    shards: list[Tensor] = []
    for start in range(0, len(crops), _CHUNK_SIZE):
        part = crops[start : start + _CHUNK_SIZE]

        def encode(part: Sequence[Crop] = part) -> dict[str, Tensor]:
            return {"latents": torch.stack([_encode(base, images, crop, flips) for crop in part])}

        key_values = {
            **_encoder_key(base),
            "views": [images.fingerprint(crop) for crop in part],
            "flips": flips,
        }
        shards.append(cache.get_or_compute("latents", key_values, encode)["latents"])
    return torch.cat(shards)


def cached_text(cache: TensorCache, base: DiffusionBase, prompts: Sequence[str]) -> TextEncoding:
    """Return the encodings of prompts on the CPU, with a last row for the empty prompt.

    Args:
        cache: The cache.
        base: The generator; its text encoders encode on their device.
        prompts: Distinct prompts.
    """
    shards: list[dict[str, Tensor]] = []
    for start in range(0, len(prompts), _CHUNK_SIZE):
        part = prompts[start : start + _CHUNK_SIZE]

        def encode(part: Sequence[str] = part) -> dict[str, Tensor]:
            return _concatenate([_text_tensors(base.encode_text([prompt])) for prompt in part])

        key_values = {**_encoder_key(base), "prompts": list(part)}
        shards.append(cache.get_or_compute("text", key_values, encode))
    empty = cache.get_or_compute(
        "text",
        {**_encoder_key(base), "prompts": None},
        lambda: _text_tensors(base.encode_unconditional()),
    )
    rows = _concatenate([*shards, empty])
    return TextEncoding(rows["hidden"], rows.get("pooled"))


def _encoder_key(base: DiffusionBase) -> dict[str, Any]:
    # A GPU rounds differently: its tensors must not reach a run on the CPU.
    kind = {"device": base.device.type, "dtype": str(base.dtype)}
    return {"format": _FORMAT, "base": base.digest, **kind}


def _encode(base: DiffusionBase, images: CroppedImages, crop: Crop, flips: bool) -> Tensor:
    image = torch.from_numpy(images.load(crop)[0])[None]
    forms = (image, image.flip(2)) if flips else (image,)
    return torch.cat([base.encode_images(form, None).float().cpu() for form in forms])


def _text_tensors(text: TextEncoding) -> dict[str, Tensor]:
    named = {"hidden": text.hidden, "pooled": text.pooled}
    return {name: value.float().cpu() for name, value in named.items() if value is not None}


def _concatenate(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file with the sha256 of its values in the header."""
    values = _payload(encode_safetensors(tensors, {}))
    return encode_safetensors(tensors, {"sha256": hashlib.sha256(values).hexdigest()})


def _unpack(data: bytes) -> dict[str, Tensor]:
    size = int.from_bytes(data[:8], "little")
    expected = json.loads(data[8 : 8 + size])["__metadata__"]["sha256"]
    if hashlib.sha256(_payload(data)).hexdigest() != expected:
        raise ValueError("its values differ from their digest")
    return safetensors.torch.load(data)


def _payload(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]
