"""Latents and encoded prompts, computed once and kept in a store for every later run.

Kept as float32, so that a resumed run computes with the very numbers of the first: 64 KB an image
of 512 x 512 and flip, a quarter of a megabyte a prompt of SD 1.
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

# Part of every key: raise it when the same images or prompts would give other numbers.
_FORMAT = 1
_CHUNK_SIZE = 32


class TensorCache:
    """Tensors by what they were made from. A store that fails costs time, never the run.

    Any number of workers may use one store: whole objects are written, and all of them write the
    same.
    """

    def __init__(self, store: ObjectStore) -> None:
        """Keep what is made below the root of ``store``."""
        self._store = store.with_retry_timeout(SHORT_RETRY_TIMEOUT_S)

    def get_or_compute(
        self, kind: str, key_values: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return what ``compute`` returns, from the store if it is there and whole.

        Args:
            kind: First part of the key.
            key_values: JSON values that decide the result.
            compute: Called when there is nothing to find; its tensors are stored from the CPU.
        """
        text = json.dumps(key_values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        key = f"{kind}/{digest[:2]}/{digest}.safetensors"
        found = self._load(key)
        if found is not None:
            return found
        tensors = {name: tensor.detach().cpu() for name, tensor in compute().items()}
        try:
            self._store.put(key, _pack(tensors))
        except StoreError as error:
            logger.warning("%s: not kept: %s", key, error)
        return tensors

    def _load(self, key: str) -> dict[str, Tensor] | None:
        try:
            data = self._store.get(key)
            return _unpack(data)
        except ObjectNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("%s: damaged, computed anew: %s", key, error)
        except StoreError as error:
            logger.warning("%s: cannot be read, computed anew: %s", key, error)
        return None


def cached_latents(
    cache: TensorCache,
    base: DiffusionBase,
    images: CroppedImages,
    crops: Sequence[Crop],
    *,
    flips: bool,
) -> Float[Tensor, "n f c y x"]:
    """Return the latents of views on the CPU: the posterior's mode, as they are and flipped.

    Each image is encoded alone, so that its latents depend on no other.

    Args:
        cache: Where they are kept.
        base: Its VAE is where it encodes.
        images: What the views are of.
        crops: At least one.
        flips: Whether flipped ones are wanted too (f = 2), else f = 1.
    """
    shards: list[Tensor] = []
    for start in range(0, len(crops), _CHUNK_SIZE):
        part = crops[start : start + _CHUNK_SIZE]

        def make(part: Sequence[Crop] = part) -> dict[str, Tensor]:
            return {"latents": torch.stack([_encode(base, images, one, flips) for one in part])}

        made_of = {
            **_encoder_key(base),
            "views": [images.fingerprint(view) for view in part],
            "flips": flips,
        }
        shards.append(cache.get_or_compute("latents", made_of, make)["latents"])
    return torch.cat(shards)


def cached_text(cache: TensorCache, base: DiffusionBase, prompts: Sequence[str]) -> TextEncoding:
    """Return the encodings of prompts on the CPU, after them the row of no prompt.

    Args:
        cache: Where they are kept.
        base: Its text encoders are where they encode.
        prompts: Distinct.
    """
    shards: list[dict[str, Tensor]] = []
    for start in range(0, len(prompts), _CHUNK_SIZE):
        part = prompts[start : start + _CHUNK_SIZE]

        def make(part: Sequence[str] = part) -> dict[str, Tensor]:
            return _concatenate([_text_tensors(base.encode_text([prompt])) for prompt in part])

        made_of = {**_encoder_key(base), "prompts": list(part)}
        shards.append(cache.get_or_compute("text", made_of, make))
    empty = cache.get_or_compute(
        "text",
        {**_encoder_key(base), "prompts": None},
        lambda: _text_tensors(base.encode_unconditional()),
    )
    rows = _concatenate([*shards, empty])
    return TextEncoding(rows["hidden"], rows.get("pooled"))


def _encoder_key(base: DiffusionBase) -> dict[str, Any]:
    # A GPU rounds otherwise: what it made must not reach a run on the CPU.
    kind = {"device": base.device.type, "dtype": str(base.dtype)}
    return {"format": _FORMAT, "base": base.digest, **kind}


def _encode(base: DiffusionBase, views: CroppedImages, view: Crop, flips: bool) -> Tensor:
    image = torch.from_numpy(views.load(view)[0])[None]
    forms = (image, image.flip(2)) if flips else (image,)
    return torch.cat([base.encode_images(form, None).float().cpu() for form in forms])


def _text_tensors(text: TextEncoding) -> dict[str, Tensor]:
    named = {"hidden": text.hidden, "pooled": text.pooled}
    return {name: value.float().cpu() for name, value in named.items() if value is not None}


def _concatenate(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file that holds the sha256 of its own values."""
    values = _payload(encode_safetensors(tensors, {}))
    return encode_safetensors(tensors, {"sha256": hashlib.sha256(values).hexdigest()})


def _unpack(data: bytes) -> dict[str, Tensor]:
    size = int.from_bytes(data[:8], "little")
    stated = json.loads(data[8 : 8 + size])["__metadata__"]["sha256"]
    if hashlib.sha256(_payload(data)).hexdigest() != stated:
        raise ValueError("its values differ from their digest")
    return safetensors.torch.load(data)


def _payload(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]
