"""Sizes of a CAT-Seg model."""

from dataclasses import dataclass
from typing import Literal

from loraseg.errors import ConfigError

__all__ = ["CATSegConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CATSegConfig:
    """Sizes of CLIP, aggregator and decoder; the defaults are the official ViT-B/16 model.

    Attributes:
        image_size: Side of the square CLIP input, pixels; a multiple of ``patch``.
        position_grid: Side of the grid of the positional embedding; it is resized (bicubic) if the
            grid ``image_size // patch`` differs.
        guidance_blocks: Vision blocks (0-based) whose outputs guide the two decoder stages;
            None for depth // 3 - 1 and 2 * depth // 3 - 1, at least 0.
        prompts: Number p of prompt templates per class; the input channels of the cost embedding.
        window: Side of the Swin windows; it must divide the grid or be at least the grid.
        pad_len: Length to which the class axis is padded, and number of classes that are selected
            if there are more; 0 for neither.
        pooling: Side of the average pooling before class attention, in training and evaluation.
        clip_attention_lora: "active" calls the q, k and v modules of CLIP; "inert" only reads
            their weights, so that adapters and hooks on them have no effect. SemLA's published
            adapters were trained and evaluated with inert modules (its copy of
            ``cat_seg/third_party/model_vpt.py``).

    Raises:
        ConfigError: A value is out of range.
    """

    image_size: int = 384
    patch: int = 16
    position_grid: int = 14
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    embed_dim: int = 512
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77
    vocab_size: int = 49408
    quick_gelu: bool = True
    guidance_blocks: tuple[int, int] | None = None
    guidance_dims: tuple[int, int] = (256, 128)
    prompts: int = 1
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    window: int = 12
    appearance_dim: int = 128
    text_dim: int = 128
    pad_len: int = 256
    pooling: tuple[int, int] = (2, 1)
    decoder_dims: tuple[int, int] = (64, 32)
    decoder_guidance_dims: tuple[int, int] = (32, 16)
    clip_attention_lora: Literal["active", "inert"] = "active"

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_divisions()

    @property
    def grid(self) -> int:
        """Side of the CLIP token grid; logits have side ``4 * grid``."""
        return self.image_size // self.patch

    @property
    def tapped_blocks(self) -> tuple[int, int]:
        """The two guidance blocks, with the defaults filled in."""
        if self.guidance_blocks is not None:
            return self.guidance_blocks
        depth = self.vision_layers
        return max(depth // 3 - 1, 0), max(2 * depth // 3 - 1, 0)

    def _check_ranges(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                lowest = 0 if name in ("pad_len", "guidance_blocks") else 1
                if isinstance(number, int) and number < lowest and name != "quick_gelu":
                    raise ConfigError(f"{name}: got {value!r}, expected at least {lowest}")
        if self.clip_attention_lora not in ("active", "inert"):
            raise ConfigError(
                f"clip_attention_lora: got {self.clip_attention_lora!r}, "
                f"expected 'active' or 'inert'"
            )
        if max(self.tapped_blocks) >= self.vision_layers:
            raise ConfigError(
                f"guidance_blocks: got {self.tapped_blocks}, expected blocks below "
                f"vision_layers = {self.vision_layers}"
            )
        if max(self.pooling) > self.grid:
            raise ConfigError(f"pooling: got {self.pooling}, expected at most the grid {self.grid}")

    def _check_divisions(self) -> None:
        pairs = (
            ("image_size", self.image_size, "patch", self.patch),
            ("vision_width", self.vision_width, "vision_heads", self.vision_heads),
            ("text_width", self.text_width, "text_heads", self.text_heads),
            ("hidden", self.hidden, "heads", self.heads),
        )
        for name, size, divisor_name, divisor in pairs:
            if size % divisor:
                raise ConfigError(
                    f"{name}: got {size}, expected a multiple of {divisor_name} = {divisor}"
                )
        if self.window < self.grid and self.grid % self.window:
            raise ConfigError(
                f"window: got {self.window}, expected a divisor of the grid {self.grid} "
                f"or at least {self.grid}"
            )
        for width in self.decoder_dims:
            if width % max(1, width // 16):
                raise ConfigError(
                    f"decoder_dims: got {self.decoder_dims}, expected widths that are multiples "
                    f"of width // 16"
                )
        inputs = (self.hidden, self.decoder_dims[0])
        for width, guidance_width in zip(inputs, self.decoder_guidance_dims, strict=True):
            if guidance_width >= width:
                raise ConfigError(
                    f"decoder_guidance_dims: got {self.decoder_guidance_dims}, expected less than "
                    f"the {inputs} channels that enter the two decoder stages"
                )
