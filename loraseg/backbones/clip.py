"""The CLIP that embeds images for retrieval, from open_clip or a local file.

SemLA (arXiv 2503.21780), domain embeddings from CLIP; in its code
``domain_orchestrator/embedding.py``, ``ClipEmbeddingModel``: ViT-L/14, projected image features,
not normalised.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn

from loraseg.backbones.bpe import BpeTokenizer
from loraseg.backbones.tokenizer import WordTokenizer
from loraseg.backbones.weights import WeightSource, resolve_weights
from loraseg.compat import prepare_torchvision
from loraseg.errors import ConfigError, DatasetError, IntegrityError
from loraseg.tensor_types import Float, Int, Tensor, ndarray

__all__ = ["ClipEncoder", "Preprocessing", "Tokenizer", "load_clip", "word_tokenizer"]

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_MODEL_AND_WEIGHTS = re.compile(r"(?P<model>[\w.-]+)=(?P<weights>.+)", re.DOTALL)


@runtime_checkable
class Tokenizer(Protocol):
    """Converts texts to token ids; the end-of-text token has the largest id of a row."""

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "n l"]:
        """Return one row of ids per text."""
        ...


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize the shortest edge to ``size`` (bicubic), centre crop, then (x / 255 - mean) / std.

    As in OpenAI's CLIP (``clip/clip.py``, ``_transform``).
    """

    size: int
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    def __call__(self, image: ndarray) -> Float[ndarray, "3 s s"]:
        """Return the float32 pixels of one uint8 RGB image (h, w, 3)."""
        size = self.size
        height, width = image.shape[:2]
        short = min(height, width)
        if short != size:
            target = (int(size * width / short), int(size * height / short))
            image = np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC))
        top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
        crop = image[top : top + size, left : left + size].astype(np.float32) / 255
        scaled = (crop - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return scaled.transpose(2, 0, 1)


class ClipEncoder:
    """Embeds images and texts into CLIP's joint space; embeddings are NOT normalised."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        *,
        name: str,
        digest: str,
        batch_size: int = 32,
    ) -> None:
        """Wrap an ``open_clip.CLIP``.

        Args:
            model: The model; it is set to evaluation mode.
            tokenizer: The tokenizer of the model.
            preprocessing: The preprocessing of images.
            name: The spec that it was loaded from.
            digest: Sha256 (hex) of the weights.
            batch_size: Images per forward pass.
        """
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.name = name
        self.digest = digest
        self.batch_size = batch_size

    @property
    def encoder_id(self) -> str:
        """Identifier of weights and preprocessing: embeddings with one id are comparable."""
        return f"clip:sha256-{self.digest[:16]}:edge{self.preprocessing.size}-bicubic-crop"

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.model.visual.output_dim)

    @torch.no_grad()
    def encode_images(self, images: Sequence[ndarray]) -> Float[ndarray, "n d"]:
        """Return float32 embeddings of uint8 RGB images (h, w, 3) of any sizes.

        Raises:
            DatasetError: An image is not a uint8 RGB array.
        """
        for index, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise DatasetError(
                    f"image {index}: {image.dtype} {image.shape}, expected uint8 (h, w, 3)"
                )
        device = next(self.model.parameters()).device
        rows = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(images), self.batch_size):
            batch = [self.preprocessing(image) for image in images[start : start + self.batch_size]]
            pixels = torch.from_numpy(np.stack(batch)).to(device)
            rows.append(self.model.encode_image(pixels, normalize=False).float().cpu().numpy())
        return np.concatenate(rows)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[ndarray, "n d"]:
        """Return float32 embeddings of texts, not normalised."""
        device = next(self.model.parameters()).device
        ids = self.tokenizer(texts).to(device)
        return self.model.encode_text(ids, normalize=False).float().cpu().numpy()


def load_clip(spec: str) -> ClipEncoder:
    """Load the index encoder.

    Args:
        spec: ``miniature``, an open_clip pair such as ``ViT-L-14/openai`` (open_clip may download
            it), ``model=weights`` such as ``ViT-B-32-quickgelu=clip.pt``, or a weight file of
            :func:`~loraseg.backbones.weights.resolve_weights` with its config in the header.

    Raises:
        ConfigError: The spec is malformed, or the file does not exist.
        IntegrityError: The weights do not fit the model.
        StoreError: The store of the file cannot be read.
    """
    named = _MODEL_AND_WEIGHTS.fullmatch(spec)
    if named is not None and not Path(spec).exists():
        return _from_weights(spec, named["model"], resolve_weights(named["weights"]))
    if _is_open_clip_pair(spec):
        return _from_open_clip(spec, *spec.split("/"))
    return _from_own_file(resolve_weights(spec, miniature="clip"))


def word_tokenizer(vocabulary: str, vocab_size: int, context_length: int) -> WordTokenizer:
    """Build a word tokenizer from a JSON list of words and the sizes of the embedding table."""
    words = json.loads(vocabulary)
    # Padding, start and end take three rows; the remaining ones are the buckets.
    buckets = vocab_size - len(words) - 3
    return WordTokenizer(words, context_length=context_length, buckets=buckets)


def _from_own_file(source: WeightSource) -> ClipEncoder:
    try:
        with safe_open(str(source.path), framework="pt") as file:
            metadata = file.metadata() or {}
        config = json.loads(metadata["config"])
        text = config["text_cfg"]
        size = config["vision_cfg"]["image_size"]
        mean, std = _floats(config.get("mean", _MEAN)), _floats(config.get("std", _STD))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"{source.path}: the header contains no CLIP config; for weights of open_clip give "
            f"the model name too: 'ViT-B-32={source.name}'"
        ) from error
    model = _build(config, source.path)
    state = safetensors.torch.load_file(source.path)
    _load(model, {key: value.float() for key, value in state.items()}, source.path)
    tokenizer: Tokenizer
    if "vocabulary" in metadata:
        tokenizer = word_tokenizer(
            metadata["vocabulary"], text["vocab_size"], text["context_length"]
        )
    else:
        tokenizer = BpeTokenizer(text.get("context_length", 77))
    return ClipEncoder(
        model, tokenizer, Preprocessing(size, mean, std), name=source.name, digest=source.digest
    )


def _floats(values: Sequence[float | int]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _build(config: dict[str, Any], path: Path) -> nn.Module:
    prepare_torchvision()
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    try:
        return CLIP(
            config["embed_dim"],
            CLIPVisionCfg(**config["vision_cfg"]),
            CLIPTextCfg(**config["text_cfg"]),
            quick_gelu=config.get("quick_gelu", False),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: invalid CLIP config: {error}") from error


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise IntegrityError(f"{path}: the weights do not fit the CLIP: {error}") from error


def _is_open_clip_pair(spec: str) -> bool:
    return spec.count("/") == 1 and "://" not in spec and not Path(spec).exists()


def _from_open_clip(spec: str, model_name: str, tag: str) -> ClipEncoder:
    prepare_torchvision()
    import open_clip

    pairs = [f"{name}/{pretrained}" for name, pretrained in open_clip.list_pretrained()]
    if spec not in pairs:
        near = difflib.get_close_matches(spec, pairs, n=3, cutoff=0.5)
        raise ConfigError(
            f"CLIP {spec!r}: neither a file nor a model/pretrained pair of open_clip; "
            f"near: {', '.join(near) or 'none'}"
        )
    model = open_clip.create_model(model_name, pretrained=tag)
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return _wrap(spec, model, digest.hexdigest())


def _from_weights(spec: str, model_name: str, source: WeightSource) -> ClipEncoder:
    prepare_torchvision()
    import open_clip

    if model_name not in open_clip.list_models():
        near = difflib.get_close_matches(model_name, open_clip.list_models(), n=3)
        raise ConfigError(
            f"CLIP {spec!r}: open_clip has no model {model_name!r}; near: {', '.join(near)}"
        )
    try:
        model = open_clip.create_model(model_name, pretrained=str(source.path))
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError) as error:
        raise IntegrityError(
            f"{source.path}: the weights do not fit open_clip's {model_name}: {error}"
        ) from error
    return _wrap(spec, model, source.digest)


def _wrap(spec: str, model: Any, digest: str) -> ClipEncoder:
    size = model.visual.image_size
    edge = size if isinstance(size, int) else size[0]
    mean = _floats(getattr(model.visual, "image_mean", None) or _MEAN)
    std = _floats(getattr(model.visual, "image_std", None) or _STD)
    tokenizer = BpeTokenizer(model.context_length)
    return ClipEncoder(model, tokenizer, Preprocessing(edge, mean, std), name=spec, digest=digest)
