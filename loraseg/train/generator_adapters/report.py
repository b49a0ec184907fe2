"""Sample grids drawn during the training of a generator, and the HTML report at the end."""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from loraseg.backbones.diffusion import DiffusionBase
from loraseg.data.drawing import encode_png
from loraseg.library import AdapterCard
from loraseg.reports.page import HtmlReport, Section, StatTile, render_report
from loraseg.reports.pictures import PictureSheet
from loraseg.reports.settings import KeyValues, flatten
from loraseg.reports.tables import Notes
from loraseg.synth.conditioning import Conditioner
from loraseg.synth.generator import Generator as ImageGenerator
from loraseg.synth.generator_adapter import GeneratorAdapter
from loraseg.synth.sampling import SamplingConfig
from loraseg.synth.sheet import SheetRow, contact_sheet
from loraseg.tensor_types import ndarray
from loraseg.train.generator_adapters.recipes import GeneratorRecipe
from loraseg.train.generator_adapters.training import TrainedGenerator

__all__ = ["SampleGrid", "encoders_on_device", "render_generator_report"]

_IMAGES = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleGrid:
    """Generates images of a few masks with the current weights of an adapter.

    Attributes:
        base: The generator, without the adapter.
        conditioner: Conditioner of the training.
        recipe: Sampling steps, guidance and regions.
        examples: (name, image, mask) at the training size: (h, w, 3) and (h, w) uint8.
        frozen_adapters: Adapters that are applied together with the one in training.
        seed: Seed of the noise, the same for every grid.
    """

    base: DiffusionBase
    conditioner: Conditioner
    recipe: GeneratorRecipe
    examples: Sequence[tuple[str, ndarray, ndarray]]
    frozen_adapters: Sequence[GeneratorAdapter] = ()
    seed: int = 0

    def render(self, trained: TrainedGenerator) -> bytes:
        """Return a PNG with a row for each mask: the mask, its image, generated images."""
        recipe = self.recipe
        adapters = [*self.frozen_adapters, trained.adapter(self.base, recipe)]
        config = SamplingConfig(
            images=_IMAGES,
            steps=recipe.grid.steps,
            guidance=recipe.grid.guidance,
            scheduler="ddim",
            seed=self.seed,
            batch=_IMAGES * len(self.examples),
            regions=recipe.draws.regions,
        )
        pictures: dict[str, list[tuple[str, ndarray]]] = {}
        with encoders_on_device(self.base):
            generator = ImageGenerator(
                self.base, self.conditioner, adapters=adapters, config=config
            )
            for sample in generator.generate([(name, mask) for name, _, mask in self.examples]):
                row = pictures.setdefault(sample.mask_name, [])
                row.append((f"generated {len(row) + 1}", sample.image))
        rows = [
            SheetRow(title=name, mask=mask, pictures=[("image", image), *pictures[name]])
            for name, image, mask in self.examples
        ]
        return encode_png(contact_sheet(rows, self.conditioner.label_space))


@contextmanager
def encoders_on_device(base: DiffusionBase) -> Generator[None, None, None]:
    """Move VAE and text encoders to the UNet's device, and to the CPU on exit."""
    encoders: list[Any] = [base.vae, *base.text_encoders]
    try:
        for encoder in encoders:
            encoder.to(base.device)
        yield
    finally:
        for encoder in encoders:
            encoder.to("cpu")


def render_generator_report(card: AdapterCard, pictures: Mapping[int, bytes]) -> str:
    """Return a self-contained HTML page.

    Args:
        card: Card of the published adapter.
        pictures: PNG file of a sample grid by step.
    """
    images = card.training.images if card.training else 0
    metrics = {name: f"{value:.4f}" for name, value in sorted(card.metrics.items())}
    sheets = [
        PictureSheet(
            png=png,
            alt=f"Masks, their images and generated images after {step} steps",
            caption=f"After {step} steps",
        )
        for step, png in sorted(pictures.items())
    ]
    return render_report(
        HtmlReport(
            title=f"Generator adapter {card.name}",
            summary=f"Trained on {images} images, on base {card.base.name}.",
            tiles=[StatTile(label=name, value=value) for name, value in metrics.items()],
            sections=[
                Section(
                    title="Loss",
                    note="Mean squared error of the prediction, always with the same noise."
                    if metrics
                    else "",
                    blocks=[
                        KeyValues(rows=list(metrics.items()))
                        if metrics
                        else Notes(["Not measured."])
                    ],
                ),
                Section(
                    title="Sample grids during training",
                    blocks=sheets or [Notes(["None: the recipe sets no interval (grid.every)."])],
                ),
                Section(
                    title="Settings",
                    blocks=[
                        KeyValues(rows=flatten({**card.recipe, "base digest": card.base.digest}))
                    ],
                ),
            ],
        )
    )
