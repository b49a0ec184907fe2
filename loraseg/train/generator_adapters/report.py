"""What a generator draws in the course of its training: grids, and one HTML page at the end."""

import base64
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from loraseg.backbones.diffusion import DiffusionBase
from loraseg.library import AdapterCard
from loraseg.reports.templates import html_template
from loraseg.segment.render import encode_png
from loraseg.synth.conditioning import Conditioner
from loraseg.synth.generator import Generator as ImageGenerator
from loraseg.synth.generator_adapter import GeneratorAdapter
from loraseg.synth.sampling import SamplingConfig
from loraseg.synth.sheet import SheetRow, contact_sheet
from loraseg.tensor_types import ndarray
from loraseg.train.generator_adapters.recipes import GeneratorRecipe
from loraseg.train.generator_adapters.training import TrainedGenerator

__all__ = ["SampleGrid", "encoders_on_device", "render_generator_report"]

_TEMPLATES = Path(__file__).parents[1] / "templates"
_IMAGES = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleGrid:
    """Draws a few masks with the adapter as it is.

    Attributes:
        base: The generator; nothing of the training is in its UNet.
        conditioner: Of the training.
        recipe: Says how to sample.
        examples: (name, image, mask) of the size that is trained on.
        frozen_adapters: Adapters that act beside the one that is trained.
        seed: Decides the noise, the same for every grid.
    """

    base: DiffusionBase
    conditioner: Conditioner
    recipe: GeneratorRecipe
    examples: Sequence[tuple[str, ndarray, ndarray]]
    frozen_adapters: Sequence[GeneratorAdapter] = ()
    seed: int = 0

    def render(self, kept: TrainedGenerator) -> bytes:
        """Return a PNG with a row for each mask: the mask, its image, generated ones."""
        recipe = self.recipe
        adapters = [*self.frozen_adapters, kept.adapter(self.base, recipe)]
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
            for one in generator.generate([(name, mask) for name, _, mask in self.examples]):
                row = pictures.setdefault(one.mask_name, [])
                row.append((f"generated {len(row) + 1}", one.image))
        rows = [
            SheetRow(title=name, mask=mask, pictures=[("image", image), *pictures[name]])
            for name, image, mask in self.examples
        ]
        return encode_png(contact_sheet(rows, self.conditioner.label_space))


@contextmanager
def encoders_on_device(base: DiffusionBase) -> Generator[None, None, None]:
    """Have VAE and text encoders where the UNet is; at the end they are on the CPU."""
    parts: list[Any] = [base.vae, *base.text_encoders]
    try:
        for part in parts:
            part.to(base.device)
        yield
    finally:
        for part in parts:
            part.to("cpu")


def render_generator_report(card: AdapterCard, pictures: Mapping[int, bytes]) -> str:
    """Return one HTML page that needs neither network nor script.

    Args:
        card: Of the adapter that is published.
        pictures: PNG by step.
    """
    training = card.training
    images = training.images if training else 0
    return html_template(_TEMPLATES, "generator.html.j2").render(
        title=f"Generator adapter {card.name}",
        summary=f"Trained on {images} images, on base {card.base.name}.",
        losses=[(name, f"{value:.4f}") for name, value in sorted(card.metrics.items())],
        pictures=[
            {"step": step, "uri": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
            for step, png in sorted(pictures.items())
        ],
        settings=_flatten({**card.recipe, "base digest": card.base.digest}),
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flatten(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", str(value)))
    return lines
