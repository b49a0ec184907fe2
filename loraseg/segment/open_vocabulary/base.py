"""CAT-Seg as the frozen base of adapters: model, tokenizer, prompts and pixel statistics."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loraseg.adapters.targets.catseg import target_modules
from loraseg.backbones.bpe import BpeTokenizer
from loraseg.backbones.clip import Tokenizer, word_tokenizer
from loraseg.backbones.tokenizer import WordTokenizer
from loraseg.backbones.weights import WeightSource, resolve_weights
from loraseg.data.labels import IGNORE
from loraseg.errors import ConfigError, IntegrityError
from loraseg.segment.open_vocabulary.catseg.checkpoint import (
    encode_catseg,
    is_catseg_file,
    load_catseg,
    read_metadata,
)
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.segment.open_vocabulary.catseg.official import load_official_checkpoint
from loraseg.segment.open_vocabulary.losses import catseg_bce
from loraseg.storage import open_parent_store
from loraseg.tensor_types import Float, Int, UInt8

__all__ = ["PROMPT", "ImageFeatures", "SegmentationBase", "check_classes", "load_base", "save_base"]

PROMPT = "A photo of a {} in the scene"
# CAT-Seg, cat_seg/cat_seg_model.py: clip_pixel_mean and clip_pixel_std, for pixels of 0 to 255.
_MEAN = (122.7709383, 116.7460125, 104.09373615)
_STD = (68.5005327, 66.6321579, 70.3231630)
_CLIP = "sem_seg_head.predictor.clip_model."
_NUMERIC_FIELDS = ("window", "pad_multiple", "mean", "std")


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Input of the aggregator: CLIP's dense features (grid g), and guidance at 2 g and 4 g."""

    features: Float[Tensor, "b d g g"]
    guidance: tuple[Float[Tensor, "b _ g2 g2"], Float[Tensor, "b _ g4 g4"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationBase:
    """A CAT-Seg with everything that inference and training need beside its weights.

    Implements :class:`~loraseg.segment.open_vocabulary.protocol.OpenVocabularyBase`.

    Attributes:
        name: The name or path that the user gave.
        digest: sha256 of the weight file, hex; adapters record it.
        model: The network.
        tokenizer: Tokenizer of its text encoder.
        prompt: Template with one ``{}``.
        mean: Mean of RGB pixels of 0 to 255.
        std: Standard deviation of RGB pixels of 0 to 255.
        window: Side of the windows of sliding inference, in pixels of its canvas.
        pad_multiple: Plain inference pads images on the right and below to a multiple of this and
            stretches the padding in, as the official code does with 32; 1 pads nothing.
        more_prompts: Additional templates of a model with several prompts per class.
    """

    name: str
    digest: str
    model: CATSeg
    tokenizer: Tokenizer
    prompt: str = PROMPT
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    window: int = 384
    pad_multiple: int = 32
    more_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = self.model.config.prompts
        if len(self.prompts) != expected or any(p.count("{}") != 1 for p in self.prompts):
            raise ConfigError(
                f"prompt: got {self.prompts}, expected {expected} template(s) with one {{}} each"
            )
        if min(self.window, self.pad_multiple) < 1:
            raise ConfigError(
                f"window {self.window}, pad_multiple {self.pad_multiple}: expected at least 1"
            )

    @property
    def prompts(self) -> tuple[str, ...]:
        """All templates."""
        return (self.prompt, *self.more_prompts)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.upsample1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type that the model computes in."""
        return self.model.upsample1.weight.dtype

    @property
    def input_size(self) -> int:
        """Side of CLIP's square input in pixels."""
        return self.model.config.image_size

    @property
    def clip_attention_lora(self) -> Literal["active", "inert"]:
        """Return "active", or "inert" if pairs on CLIP's attention have no effect."""
        return self.model.config.clip_attention_lora

    def linears(self) -> dict[str, nn.Linear]:
        """Return all linear layers by their full name."""
        modules = self.model.named_modules()
        return {name: module for name, module in modules if isinstance(module, nn.Linear)}

    def target_modules(self, rule: str = "semla") -> tuple[str, ...]:
        """Return the layers of a rule, see :mod:`loraseg.adapters.targets.catseg`.

        Raises:
            ConfigError: The rule is unknown.
            AdapterMismatchError: The model has no such layer.
        """
        return target_modules(self.model, rule)

    def adapts_images(self, modules: Sequence[str]) -> bool:
        """Return whether one of these layers is in CLIP's image encoder."""
        return any(name.startswith(_CLIP + "visual.") for name in modules)

    def adapts_text(self, modules: Sequence[str]) -> bool:
        """Return whether one of these layers is in CLIP's text encoder."""
        return any(name.startswith(_CLIP + "transformer.") for name in modules)

    def tokenize(self, classes: Sequence[str]) -> Int[Tensor, "t p l"]:
        """Return token ids of every class in every prompt, on the CPU.

        Only the first of a name's synonyms ("car, automobile") is used, as in CAT-Seg
        (cat_seg_predictor.py: class_embeddings).

        Raises:
            ConfigError: There is no class, one is blank, or one occurs twice.
        """
        check_classes(classes)
        names = [name.split(", ")[0] for name in classes]
        texts = [prompt.replace("{}", name) for name in names for prompt in self.prompts]
        return self.tokenizer(texts).unflatten(0, (len(names), len(self.prompts)))

    def encode_tokens(
        self, ids: Int[Tensor, "t p l"], *, groups: int | None = None
    ) -> Float[Tensor, "*m t p d"]:
        """Return L2-normalised text features; gradients flow into the text encoder.

        Args:
            ids: Token ids of :meth:`tokenize`.
            groups: Encode the ids this many times, once per adapter mix in use; the result has the
                groups as first axis.
        """
        features = self.model.encode_text(ids.flatten(0, 1), groups)
        return features.unflatten(-2, ids.shape[:2])

    def encode_classes(self, classes: Sequence[str]) -> Float[Tensor, "t p d"]:
        """Return L2-normalised text features of class names.

        Raises:
            ConfigError: As in :meth:`tokenize`.
        """
        return self.encode_tokens(self.tokenize(classes))

    def encode_images(self, images: Float[Tensor, "b 3 n n"]) -> ImageFeatures:
        """Run everything before the aggregator on normalised images."""
        return ImageFeatures(*self.model.encode_images(images))

    def decode(
        self, features: ImageFeatures, text: Float[Tensor, "b t p d"]
    ) -> Float[Tensor, "b t h w"]:
        """Run the aggregator; logits are at four times the CLIP grid."""
        return self.model.aggregator(features.features, text, features.guidance)

    def forward(
        self,
        images: Float[Tensor, "b 3 n n"],
        text: Float[Tensor, "t p d"] | Float[Tensor, "b t p d"],
    ) -> Float[Tensor, "b t h w"]:
        """Return logits at four times the CLIP grid.

        Raises:
            ConfigError: A size disagrees with the model's config.
        """
        return self.model(images, text)

    def loss(
        self,
        logits: Float[Tensor, "b t h w"],
        labels: UInt8[Tensor, "b H W"],
        *,
        mask_ignored: bool = False,
    ) -> Float[Tensor, ""]:
        """Return CAT-Seg's loss, see :func:`loraseg.segment.open_vocabulary.losses.catseg_bce`.

        Raises:
            DatasetError: A label is neither a class nor 255.
            StageError: ``mask_ignored`` is set and every pixel is ignored.
        """
        return catseg_bce(logits, labels, IGNORE, mask_ignored=mask_ignored)

    def normalise(self, images: Tensor) -> Float[Tensor, "*b 3 h w"]:
        """Return (x - mean) / std of RGB pixels (..., 3, h, w) of 0 to 255, on their device."""
        pixels = images.float()
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (pixels - mean) / std


def check_classes(classes: Sequence[str]) -> None:
    """Check a list of class names.

    Raises:
        ConfigError: There is no class, one is blank, or one occurs twice.
    """
    if isinstance(classes, str) or not classes:
        raise ConfigError(f"classes: got {classes!r}, expected a list of at least one name")
    # Only the first of a name's synonyms is used; that one must not be blank.
    blank = [name for name in classes if not name.split(", ")[0].strip()]
    doubled = sorted(name for name, count in Counter(classes).items() if count > 1)
    if blank or doubled:
        raise ConfigError(
            f"classes: expected distinct, non-blank names; doubled {doubled}, blank {len(blank)}"
        )


def load_base(spec: str = "miniature", **overrides: Any) -> SegmentationBase:
    """Load a frozen segmenter.

    Args:
        spec: ``miniature``, or a weight file as :func:`~loraseg.backbones.weights.resolve_weights`
            takes it: a ``.safetensors`` of :func:`save_base`, or an official CAT-Seg checkpoint.
        overrides: Fields of :class:`~loraseg.segment.open_vocabulary.catseg.config.CATSegConfig`,
            such as ``clip_attention_lora="inert"``.

    Raises:
        ConfigError: There is no such file, or an override is wrong.
        IntegrityError: The file is not a CAT-Seg checkpoint.
    """
    source = resolve_weights(spec)
    if is_catseg_file(source.path):
        return _load_own_file(source, overrides)
    model = load_official_checkpoint(source.path, **overrides)
    return SegmentationBase(
        name=source.name,
        digest=source.digest,
        model=model.float(),
        tokenizer=BpeTokenizer(model.config.context_length),
    )


def save_base(
    base: SegmentationBase,
    uri: str | Path,
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a base as a file that :func:`load_base` reads.

    Args:
        base: Its name and digest are not written; they follow from the file.
        uri: Path or store URI of a ``.safetensors`` file, replaced atomically.
        metadata: Additional strings of the header, such as the training recipe.
        dtype: Stored type of the weights; None keeps theirs.

    Raises:
        ConfigError: The URI names no file.
        StoreError: The store cannot be written.
    """
    header = {
        **(metadata or {}),
        "prompt": base.prompt,
        "more_prompts": json.dumps(base.more_prompts),
        "mean": json.dumps([value / 255 for value in base.mean]),
        "std": json.dumps([value / 255 for value in base.std]),
        "window": json.dumps(base.window),
        "pad_multiple": json.dumps(base.pad_multiple),
    }
    if isinstance(base.tokenizer, WordTokenizer):
        header["vocabulary"] = json.dumps(base.tokenizer.vocabulary)
    store, key = open_parent_store(str(uri))
    store.put(key, encode_catseg(base.model, header, dtype=dtype))


def _load_own_file(source: WeightSource, overrides: dict[str, Any]) -> SegmentationBase:
    model = load_catseg(source.path, **overrides)
    config = model.config
    metadata = read_metadata(source.path)
    tokenizer: Tokenizer
    try:
        if "vocabulary" in metadata:
            tokenizer = word_tokenizer(
                metadata["vocabulary"], config.vocab_size, config.context_length
            )
        else:
            tokenizer = BpeTokenizer(config.context_length)
        numbers = {key: json.loads(metadata[key]) for key in _NUMERIC_FIELDS if key in metadata}
        return SegmentationBase(
            name=source.name,
            digest=source.digest,
            model=model,
            tokenizer=tokenizer,
            prompt=metadata.get("prompt", PROMPT),
            more_prompts=tuple(json.loads(metadata.get("more_prompts", "[]"))),
            window=int(numbers.get("window", config.image_size)),
            pad_multiple=int(numbers.get("pad_multiple", 1)),
            mean=_to_byte_range(numbers["mean"]) if "mean" in numbers else _MEAN,
            std=_to_byte_range(numbers["std"]) if "std" in numbers else _STD,
        )
    except (ValueError, TypeError) as error:
        raise IntegrityError(
            f"{source.path}: the header does not describe a base: {error}"
        ) from error


def _to_byte_range(values: Sequence[float | int]) -> tuple[float, ...]:
    """Convert statistics of pixels of 0 to 1 to pixels of 0 to 255."""
    red, green, blue = (255 * float(value) for value in values)
    return red, green, blue
