"""Load a text-to-image base with its adapters and generate images from masks."""

from collections.abc import Sequence
from dataclasses import dataclass

from loraseg.backbones.device import best_device
from loraseg.backbones.diffusion import DiffusionBase, load_diffusion
from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError
from loraseg.inference.generator_adapters import LoadedGeneratorAdapter, load_generator_adapter
from loraseg.synth.conditioning import Conditioner, ConditioningConfig
from loraseg.synth.generator import GeneratedImage, Generator
from loraseg.synth.sampling import DTYPES, SamplingConfig
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["LoadedGenerator", "load_generator"]

_DEFAULT_CONDITIONING = ConditioningConfig()


@dataclass(frozen=True, slots=True)
class LoadedGenerator:
    """A text-to-image base and its adapters in memory. Use it from one thread at a time.

    Attributes:
        base: The frozen base, on its device.
        adapters: The adapters and, where stored, their cards.
        sampling: How images are sampled.
    """

    base: DiffusionBase
    adapters: tuple[LoadedGeneratorAdapter, ...]
    sampling: SamplingConfig

    @property
    def label_space(self) -> LabelSpace | None:
        """The classes on the first card that names them; None if no card does."""
        cards = (loaded.card for loaded in self.adapters)
        names = next((card.label_space for card in cards if card and card.label_space), None)
        return None if names is None else LabelSpace(names)

    def generate(
        self,
        mask: UInt8[ndarray, "h w"],
        classes: Sequence[str] | None = None,
        *,
        prompt_template: str = _DEFAULT_CONDITIONING.template,
    ) -> list[GeneratedImage]:
        """Generate ``sampling.images`` images of one mask.

        Args:
            mask: Class ids; 255 = ignore.
            classes: Class name of each id; None takes :attr:`label_space`.
            prompt_template: Text that contains ``{classes}`` once, e.g. "{classes} in heavy fog".

        Returns:
            For each image: RGB uint8 (h, w, 3), the label uint8 (h, w) and the lineage.

        Raises:
            ConfigError: ``classes`` is None and no card names them, or the template is invalid.
            DatasetError: The mask has an unknown class id, no labelled pixel, or a size that the
                base cannot generate.
        """
        label_space = self.label_space if classes is None else LabelSpace(tuple(classes))
        if label_space is None:
            raise ConfigError("classes: expected the class names; no adapter's card lists them")
        conditioning = ConditioningConfig(template=prompt_template)
        return list(self.for_classes(label_space, conditioning).generate([("mask", mask)]))

    def for_classes(
        self, label_space: LabelSpace, conditioning: ConditioningConfig = _DEFAULT_CONDITIONING
    ) -> Generator:
        """Return a generator for masks of these classes.

        Raises:
            AdapterMismatchError: An adapter does not fit the base, or several have an attention
                mix.
            ConfigError: The conditioning does not fit the classes or the tokenizers.
            DatasetError: A class name has no usable token.
        """
        conditioner = Conditioner(self.base.tokenizers, label_space, conditioning)
        adapters = [loaded.adapter for loaded in self.adapters]
        return Generator(self.base, conditioner, adapters=adapters, config=self.sampling)


def load_generator(
    base: str = "miniature",
    adapters: Sequence[str] = (),
    *,
    weights: Sequence[float] | None = None,
    sampling: SamplingConfig | None = None,
) -> LoadedGenerator:
    """Load a base and its adapters on the best device of this process.

    Args:
        base: As for :func:`loraseg.backbones.diffusion.load_diffusion`.
        adapters: Adapter folders, or ``LIBRARY#NAME[@VERSION]``.
        weights: One factor per adapter; None for 1 each.
        sampling: How images are sampled; None for the defaults.

    Raises:
        AdapterMismatchError: An adapter is for another role or base.
        AdapterNotFoundError: A library has no such adapter or version.
        ConfigError: The base or an adapter cannot be found, or the number of weights differs from
            the number of adapters.
        IntegrityError: A file is missing or damaged.
        StoreError: A store cannot be read.
    """
    sampling = sampling or SamplingConfig()
    if weights is None:
        weights = [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise ConfigError(f"weights: got {len(weights)}, expected one per adapter: {len(adapters)}")
    model = load_diffusion(base, device=best_device(), dtype=DTYPES[sampling.precision])
    loaded = (
        load_generator_adapter(spec, model, weight=weight)
        for spec, weight in zip(adapters, weights, strict=True)
    )
    return LoadedGenerator(model, tuple(loaded), sampling)
