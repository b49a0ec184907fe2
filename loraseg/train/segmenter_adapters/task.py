"""The task of a segmenter adapter: its settings, without the models they name."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from loraseg.library.card import Role
from loraseg.train.core.task import TrainingTask
from loraseg.train.segmenter_adapters.recipes import (
    RULES_WITHOUT_CLIP,
    AdapterRecipe,
    group_signature,
)

__all__ = ["SegmenterAdapterTask"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterAdapterTask(TrainingTask):
    """A segmenter adapter to train.

    Attributes:
        base: The frozen segmenter, see :func:`loraseg.segment.open_vocabulary.base.load_base`.
        encoder: CLIP model that embeds the training images for the centroid.
        recipe: Targets, rank and optimisation.
    """

    role: ClassVar[Role] = "segmenter"

    encoder: str = "miniature"
    recipe: AdapterRecipe

    def required_uris(self) -> tuple[str, ...]:
        """Return the paths and URIs that a worker must reach; model names are not among them."""
        encoder = (self.encoder,) if Path(self.encoder).is_absolute() else ()
        return *TrainingTask.required_uris(self), *encoder

    def group_key(self) -> object | None:
        """Return a key that is equal for tasks that share batches and CLIP features."""
        if self.data_order != "per_dataset" or self.recipe.targets not in RULES_WITHOUT_CLIP:
            return None
        data = (self.data, self.split, self.val_split, self.images, self.seed, self.skip_bad)
        return *data, self.base, self.encoder, group_signature(self.recipe)
