"""The CAT-Seg model: CLIP towers, two guidance upsamplers, aggregator."""

from torch import Tensor, nn

from loraseg.errors import ConfigError
from loraseg.segment.open_vocabulary.catseg.aggregator import Aggregator
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.towers import ClipTowers
from loraseg.tensor_types import Float, Int

__all__ = ["CATSeg"]


class CATSegPredictor(nn.Module):
    """CLIP and aggregator, named as in the official checkpoints."""

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        self.clip_model = ClipTowers(config)
        self.transformer = Aggregator(config)


class CATSegHead(nn.Module):
    """The predictor, named as in the official checkpoints."""

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        self.predictor = CATSegPredictor(config)


class CATSeg(nn.Module):
    """CAT-Seg (Cho et al., CVPR 2024, arXiv 2303.11797) with CLIP features only, at any size.

    Module and parameter names are those of the official checkpoints (``cat_seg/cat_seg_model.py``,
    ``CATSeg``), so that LoRA targets have the names of published adapters. Only the fused
    ``in_proj_bias`` of CLIP is split into q, k and v.
    """

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        self.config = config
        self.sem_seg_head = CATSegHead(config)
        first, second = config.guidance_dims
        self.upsample1 = nn.ConvTranspose2d(config.vision_width, first, 2, 2)
        self.upsample2 = nn.ConvTranspose2d(config.vision_width, second, 4, 4)

    @property
    def clip(self) -> ClipTowers:
        """The two CLIP encoders."""
        return self.sem_seg_head.predictor.clip_model

    @property
    def aggregator(self) -> Aggregator:
        """Cost aggregation and decoder."""
        return self.sem_seg_head.predictor.transformer

    def encode_text(
        self, token_ids: Int[Tensor, "t l"], groups: int | None = None
    ) -> Float[Tensor, "t d"] | Float[Tensor, "g t d"]:
        """Return L2-normalised text features, one per row of token ids.

        Args:
            token_ids: Prompts; ids on the CPU avoid a device synchronisation.
            groups: Encode the rows this many times, with the groups as leading axis of every
                layer call, for layers that apply a different adapter mix to each group.

        Returns:
            (t, d); with ``groups`` (groups, t, d).

        Raises:
            ConfigError: There are no rows or groups, or the rows are longer than the context.
        """
        rows, length = token_ids.shape
        if not rows or not 0 < length <= self.config.context_length:
            raise ConfigError(
                f"token ids of shape {(rows, length)}: expected at least one row of 1 to "
                f"{self.config.context_length} tokens"
            )
        if groups is not None and groups < 1:
            raise ConfigError(f"groups: got {groups}, expected at least 1")
        features = self.clip.encode_text(token_ids, groups or 1)
        return features[0] if groups is None else features

    def forward(
        self,
        images: Float[Tensor, "b 3 s s"],
        text: Float[Tensor, "t p d"] | Float[Tensor, "b t p d"],
    ) -> Float[Tensor, "b t g4 g4"]:
        """Return logits at four times the CLIP grid.

        Args:
            images: Normalised RGB of side ``config.image_size``.
            text: Text features of t >= 1 classes under p prompts, shared or one set per image.

        Raises:
            ConfigError: A size disagrees with the config.
        """
        bank = text[None].expand(len(images), -1, -1, -1) if text.dim() == 3 else text
        self._check(images, bank)
        features, guidance = self.encode_images(images)
        return self.aggregator(features, bank, guidance)

    def encode_images(
        self, images: Float[Tensor, "b 3 s s"]
    ) -> tuple[Float[Tensor, "b d g g"], tuple[Tensor, Tensor]]:
        """Return dense image features and the two decoder guidance maps.

        The guidance maps are (b, g1, 2 g, 2 g) and (b, g2, 4 g, 4 g), with g1, g2 from
        ``config.guidance_dims``.
        """
        features, taps = self.clip.visual(images)
        return features, (self.upsample1(taps[0]), self.upsample2(taps[1]))

    def _check(self, images: Tensor, text: Tensor) -> None:
        config = self.config
        side = config.image_size
        if images.shape[1:] != (3, side, side):
            raise ConfigError(
                f"images of shape {tuple(images.shape)}: expected (b, 3, {side}, {side})"
            )
        batch, prompts, width = len(images), config.prompts, config.embed_dim
        if (text.shape[0], *text.shape[2:]) != (batch, prompts, width) or not text.shape[1]:
            raise ConfigError(
                f"text features of shape {tuple(text.shape)}: expected {batch} images, at least "
                f"one class, {prompts} prompts, width {width}"
            )
