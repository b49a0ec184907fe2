"""Cost aggregation of CAT-Seg: cost volume, aggregation layers and decoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loraseg.segment.open_vocabulary.catseg.chunking import apply_chunked
from loraseg.segment.open_vocabulary.catseg.class_attention import ClassLayer
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.decoder import Up
from loraseg.segment.open_vocabulary.catseg.swin import SwinPair
from loraseg.tensor_types import Float

__all__ = ["Aggregator"]

_UNSELECTED_LOGIT = -100.0


class AggregatorLayer(nn.Module):
    """Spatial aggregation (:class:`SwinPair`), then class aggregation (:class:`ClassLayer`)."""

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        self.swin_block = SwinPair(
            config.hidden,
            config.appearance_dim,
            config.heads,
            grid=config.grid,
            window=config.window,
        )
        self.attention = ClassLayer(
            config.hidden,
            config.text_dim,
            config.heads,
            pad_len=config.pad_len,
            pooling=config.pooling,
        )

    def forward(
        self,
        x: Float[Tensor, "b t g g c"],
        appearance: Float[Tensor, "b g g a"],
        text: Float[Tensor, "b t e"],
    ) -> Float[Tensor, "b t g g c"]:
        x = apply_chunked(lambda chunk: self.swin_block(chunk, appearance), x)
        return self.attention(x, text)


def _projection_with_relu(projection: nn.Module) -> nn.Sequential:
    return nn.Sequential(projection, nn.ReLU())


class Aggregator(nn.Module):
    """Computes one logit map per class from dense image features and class texts.

    ::

        C[t, p, i] = <D_i, E_tp> / (|D_i| |E_tp|)           cost volume
        x_t        = conv7x7(C_t)                           embedding, h channels
        x          = class(spatial(x, a), e)                for each of the layers
        logits     = decode(x, g1, g2)

    * D: dense image features (d, g, g) at position i; E: text features of class t under prompt p.
    * a = ReLU(conv3x3(D)): appearance guidance; e = ReLU(linear(normalise(mean_p E))): text
      guidance.
    * spatial, class: :class:`~loraseg.segment.open_vocabulary.catseg.swin.SwinPair` and
      :class:`~loraseg.segment.open_vocabulary.catseg.class_attention.ClassLayer`.
    * g1, g2: upsampled outputs of two CLIP blocks, which guide the two decoder stages.

    CAT-Seg (CVPR 2024, arXiv 2303.11797), "Spatial Cost Aggregation", "Class Cost Aggregation" and
    "CAT-Seg Decoder"; official code: ``cat_seg/modeling/transformer/model.py``, ``Aggregator``.

    Differences from the official code: none in the function. The classes run in chunks on the CPU,
    layers take the guidance as a second input, and cosines are computed in float32 at least.
    """

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        self.pad_len = config.pad_len
        self.conv1 = nn.Conv2d(config.prompts, config.hidden, 7, padding=3)
        self.guidance_projection = _projection_with_relu(
            nn.Conv2d(config.embed_dim, config.appearance_dim, 3, padding=1)
        )
        self.text_guidance_projection = _projection_with_relu(
            nn.Linear(config.embed_dim, config.text_dim)
        )
        self.decoder_guidance_projection = nn.ModuleList(
            _projection_with_relu(nn.Conv2d(inputs, outputs, 3, padding=1))
            for inputs, outputs in zip(
                config.guidance_dims, config.decoder_guidance_dims, strict=True
            )
        )
        self.layers = nn.ModuleList(AggregatorLayer(config) for _ in range(config.layers))
        first, second = config.decoder_dims
        self.decoder1 = Up(config.hidden, first, config.decoder_guidance_dims[0])
        self.decoder2 = Up(first, second, config.decoder_guidance_dims[1])
        self.head = nn.Conv2d(second, 1, 3, padding=1)

    def forward(
        self,
        features: Float[Tensor, "b d g g"],
        text: Float[Tensor, "b t p d"],
        guidance: Sequence[Tensor],
    ) -> Float[Tensor, "b t s s"]:
        """Return logits of side s = 4 g.

        Args:
            features: Dense image features, not normalised.
            text: Text features of t classes under p prompts.
            guidance: The two upsampled block outputs, at sides 2 g and 4 g.
        """
        # Cosines of classes differ by less than the precision of bfloat16, in which the selection
        # would be arbitrary.
        dtype = torch.promote_types(features.dtype, torch.float32)
        unit_text = nn.functional.normalize(text.to(dtype), dim=-1)
        unit_features = nn.functional.normalize(features.to(dtype), dim=1)
        cost = torch.einsum("bdhw,btpd->btphw", unit_features, unit_text)
        classes = text.shape[1]
        selected = None
        if 0 < self.pad_len < classes:
            # As in the official code, prompts are normalised before their mean only in this case.
            selected = cost.amax(dim=(2, 3, 4)).topk(self.pad_len, dim=1).indices
            cost, text = _gather_classes(cost, selected), _gather_classes(unit_text, selected)
        logits = self._aggregate(cost, features, text, guidance)
        if selected is None:
            return logits
        all_logits = logits.new_full((len(logits), classes, *logits.shape[2:]), _UNSELECTED_LOGIT)
        return all_logits.scatter(1, selected[..., None, None].expand_as(logits), logits)

    def _aggregate(
        self, cost: Tensor, features: Tensor, text: Tensor, guidance: Sequence[Tensor]
    ) -> Tensor:
        batch, classes = cost.shape[:2]
        appearance = self.guidance_projection(features).permute(0, 2, 3, 1)
        mean_text = nn.functional.normalize(text.mean(dim=2), dim=-1)
        text_guidance = self.text_guidance_projection(mean_text.to(features.dtype))
        x = (
            self.conv1(cost.flatten(0, 1).to(features.dtype))
            .permute(0, 2, 3, 1)
            .unflatten(0, (batch, classes))
        )
        for layer in self.layers:
            x = layer(x, appearance, text_guidance)
        first, second = (
            up.fold(project(guide))
            for up, project, guide in zip(
                (self.decoder1, self.decoder2),
                self.decoder_guidance_projection,
                guidance,
                strict=True,
            )
        )

        def decode(chunk: Tensor) -> Tensor:
            maps = chunk.flatten(0, 1).permute(0, 3, 1, 2)
            maps = self.head(self.decoder2(self.decoder1(maps, first), second))
            return maps.view(*chunk.shape[:2], *maps.shape[2:])

        return apply_chunked(decode, x)


def _gather_classes(x: Tensor, selected: Tensor) -> Tensor:
    """Return the selected classes (b, k) of each image along axis 1 of x (b, t, ...)."""
    index = selected.reshape(*selected.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
