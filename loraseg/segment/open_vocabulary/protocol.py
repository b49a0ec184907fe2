"""What training and inference need of an open-vocabulary segmenter, whatever its network.

Retrieval and fusion know only the linear layers of a base. Everything else that depends on the
network is behind this protocol; CAT-Seg implements it in
:class:`~loraseg.segment.open_vocabulary.base.SegmentationBase`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from loraseg.tensor_types import Float, Int, Tensor, UInt8

__all__ = ["OpenVocabularyBase"]


@runtime_checkable
class OpenVocabularyBase(Protocol):
    """A frozen segmenter that scores pixels for classes given by name.

    Shapes: b images, t classes, p prompts per class, d the width of text features, n the side of
    the network's input.
    """

    @property
    def name(self) -> str:
        """The name or path that the user gave."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of the weights, hex; adapters record it."""
        ...

    @property
    def model(self) -> nn.Module:
        """The network; adapters act on its linear layers."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type that the network computes in."""
        ...

    @property
    def input_size(self) -> int:
        """Side n of the square input in pixels."""
        ...

    @property
    def window(self) -> int:
        """Side of the windows of sliding inference and of tiles, in pixels."""
        ...

    @property
    def pad_multiple(self) -> int:
        """Plain inference pads images to a multiple of this; 1 pads nothing."""
        ...

    @property
    def prompts(self) -> tuple[str, ...]:
        """Templates with one ``{}`` that class names are inserted into."""
        ...

    @property
    def clip_attention_lora(self) -> Literal["active", "inert"]:
        """Return "active", or "inert" if pairs on CLIP's attention have no effect."""
        ...

    def linears(self) -> Mapping[str, nn.Linear]:
        """Return the layers that an adapter may change, by their full name."""
        ...

    def target_modules(self, rule: str = "semla") -> tuple[str, ...]:
        """Return the layers that a rule of a recipe adapts, in model order.

        Raises:
            ConfigError: The rule is unknown.
            AdapterMismatchError: The network has no such layer.
        """
        ...

    def adapts_images(self, modules: Sequence[str]) -> bool:
        """Return whether :meth:`encode_images` depends on any of these layers."""
        ...

    def adapts_text(self, modules: Sequence[str]) -> bool:
        """Return whether :meth:`encode_tokens` depends on any of these layers."""
        ...

    def normalise(self, images: Tensor) -> Float[Tensor, "*b 3 h w"]:
        """Return the network's input for RGB pixels of 0 to 255, on the images' device."""
        ...

    def tokenize(self, classes: Sequence[str]) -> Int[Tensor, "t p l"]:
        """Return token ids of class names, on the CPU.

        Raises:
            ConfigError: There is no class, one is blank, or one occurs twice.
        """
        ...

    def encode_tokens(
        self, ids: Int[Tensor, "t p l"], *, groups: int | None = None
    ) -> Float[Tensor, "*m t p d"]:
        """Return text features; with ``groups``, once per adapter mix along a first axis."""
        ...

    def encode_images(self, images: Float[Tensor, "b 3 n n"]) -> Any:
        """Return the features of normalised images that :meth:`decode` takes."""
        ...

    def decode(self, features: Any, text: Float[Tensor, "b t p d"]) -> Float[Tensor, "b t h w"]:
        """Return logits from image features and each image's text features."""
        ...

    def forward(
        self,
        images: Float[Tensor, "b 3 n n"],
        text: Float[Tensor, "t p d"] | Float[Tensor, "b t p d"],
    ) -> Float[Tensor, "b t h w"]:
        """Return logits of normalised images; the text features are common or one per image."""
        ...

    def loss(
        self,
        logits: Float[Tensor, "b t h w"],
        labels: UInt8[Tensor, "b H W"],
        *,
        mask_ignored: bool = False,
    ) -> Float[Tensor, ""]:
        """Return the training loss.

        Args:
            logits: In float32.
            labels: Class ids, 255 = ignore.
            mask_ignored: Leave ignored pixels out of the loss.

        Raises:
            DatasetError: A label is neither a class nor 255.
            StageError: ``mask_ignored`` is set and every pixel is ignored.
        """
        ...
