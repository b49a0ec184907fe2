"""The CAT-Seg model: CLIP towers, two upsamplers, aggregator (methods A.3 to A.5)."""

from torch import Tensor, nn

from loraseg.errors import ConfigError
from loraseg.segment.open_vocabulary.catseg.aggregator import Aggregator
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.towers import ClipTowers
from loraseg.tensor_types import Float, Int

__all__ = ["CATSeg"]


class CATSegPredictor(nn.Module):
    """Holds CLIP and aggregator under the names of the official checkpoints."""

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        self.clip_model = ClipTowers(config)
        self.transformer = Aggregator(config)


class CATSegHead(nn.Module):
    """Holds the predictor under the name of the official checkpoints."""

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        self.predictor = CATSegPredictor(config)


class CATSeg(nn.Module):
    """CAT-Seg (CVPR 2024, CLIP only) at any size.

    Module and parameter names are those of the official checkpoints, so that LoRA targets are
    called as in published adapters; only CLIP's fused ``in_proj_bias`` is split over q, k and v.
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
        """Return L2-normalised text features, one a row of token ids.

        Args:
            token_ids: Prompts; on the CPU they need no synchronisation with a device.
            groups: Encode the rows this many times, with the groups as leading axis of every
                layer call, for layers that treat each group by another adapter mix.

        Returns:
            (t, d); with ``groups`` (groups, t, d).

        Raises:
            ConfigError: There is no row or no group, or a row is longer than the context.
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
            text: Text features of t >= 1 classes under p prompts, for all images or each its own.

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
        """Return what the aggregator sees of images: dense features and two guidance maps.

        The guidance maps are at two and four times the CLIP grid.
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
        want = (len(images), config.prompts, config.embed_dim)
        if (text.shape[0], *text.shape[2:]) != want or not text.shape[1]:
            raise ConfigError(
                f"text features of shape {tuple(text.shape)}: expected {want[0]} images, at least "
                f"one class, {want[1]} prompts, width {want[2]}"
            )
