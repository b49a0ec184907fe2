"""Load the models of a config and compare them with those that the output was created with."""

import math
from collections.abc import Iterator
from pathlib import Path

from loraseg.backbones.device import best_device
from loraseg.batch.pseudo_labels import predict_pseudo_labels
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.state import (
    ResolvedAdapter,
    ResolvedSynthesisModels,
    SynthesisRunState,
)
from loraseg.data import Dataset, load_pair, open_dataset
from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError
from loraseg.inference import generation
from loraseg.library.catalog import Library
from loraseg.segment.closed_set.checkpoint import ClosedSetSegmenter, load_closed_set_segmenter
from loraseg.storage import open_store
from loraseg.synth.freemask import class_mean_loss
from loraseg.synth.generator import Generator
from loraseg.tensor_types import Float, UInt8, ndarray

__all__ = ["load_generator", "load_pseudo_labeller", "resolve_models"]


def resolve_models(config: SynthesisConfig, label_space: LabelSpace) -> ResolvedSynthesisModels:
    """Load the models of a config and return what their names resolve to.

    Raises:
        LorasegError: As raised by library, store and models.
    """
    specs = [_pin_version(spec) for spec in config.adapters]
    generator, adapters = _load_generator_and_adapters(config, label_space, specs)
    segmenter = load_pseudo_labeller(config, label_space)
    return ResolvedSynthesisModels(
        base=generator.base.digest,
        adapters=tuple(adapters),
        generator=generator.digest,
        segmenter=None if segmenter is None else segmenter.digest,
        class_loss=None if segmenter is None else _class_loss(config, segmenter),
    )


def load_generator(state: SynthesisRunState) -> Generator:
    """Load the generator that an output was created with.

    Raises:
        ConfigError: The models have changed since.
        LorasegError: As raised by library, store and models.
    """
    specs = [adapter.spec for adapter in state.models.adapters]
    generator, _ = _load_generator_and_adapters(state.config, state.label_space, specs)
    if generator.digest != state.models.generator:
        raise ConfigError(
            f"{state.config.output} was created with generator {state.models.generator[:12]}; "
            f"{state.config.base} with its adapters and settings is now {generator.digest[:12]}"
        )
    return generator


def load_pseudo_labeller(
    config: SynthesisConfig, label_space: LabelSpace, *, digest: str | None = None
) -> ClosedSetSegmenter | None:
    """Load the segmenter of a config; None if there is none.

    Args:
        config: Names the file.
        label_space: Classes of the masks.
        digest: sha256 that the file must have; None to accept any.

    Raises:
        ConfigError: The file has another digest, or the segmenter other classes.
        LorasegError: As raised by store and model.
    """
    if config.segmenter is None:
        return None
    segmenter = load_closed_set_segmenter(config.segmenter, device=str(best_device()))
    if digest is not None and segmenter.digest != digest:
        raise ConfigError(
            f"segmenter {config.segmenter}: {config.output} was created with {digest[:12]}, "
            f"the file is now {segmenter.digest[:12]}"
        )
    if segmenter.label_space.names != label_space.names:
        raise ConfigError(
            f"segmenter {config.segmenter}: its classes are "
            f"{', '.join(segmenter.label_space.names[:20])}; expected those of the masks, "
            f"{', '.join(label_space.names[:20])}"
        )
    return segmenter


def _pin_version(spec: str) -> str:
    """Add its version to the spec of an adapter in a library: the newest one may change."""
    uri, mark, name = spec.rpartition("#")
    if not mark or "@" in name or Path(spec).is_dir():
        return spec
    return f"{spec}@{Library(open_store(uri)).entry(name).version}"


def _load_generator_and_adapters(
    config: SynthesisConfig, label_space: LabelSpace, specs: list[str]
) -> tuple[Generator, list[ResolvedAdapter]]:
    loaded = generation.load_generator(
        config.base, specs, weights=config.weights, sampling=config.sampling
    )
    packed = [adapter.adapter.adapter for adapter in loaded.adapters]
    resolved = [
        ResolvedAdapter(spec=spec, name=adapter.name, digest=adapter.digest)
        for spec, adapter in zip(specs, packed, strict=True)
    ]
    return loaded.for_classes(label_space, config.conditioning), resolved


def _class_loss(
    config: SynthesisConfig, segmenter: ClosedSetSegmenter
) -> tuple[float | None, ...] | None:
    """Return the mean loss of each class on real images (FreeMask); None if not needed."""
    if config.real is None:
        return None
    dataset = open_dataset(config.real)
    if dataset.label_space.names != segmenter.label_space.names:
        raise ConfigError(f"real: {config.real} has other classes than the segmenter")
    means = class_mean_loss(
        _iter_losses(dataset, segmenter, config.real_images), len(segmenter.label_space)
    )
    return tuple(None if math.isnan(mean) else float(mean) for mean in means)


def _iter_losses(
    dataset: Dataset, segmenter: ClosedSetSegmenter, limit: int | None
) -> Iterator[tuple[UInt8[ndarray, "h w"], Float[ndarray, "h w"]]]:
    """Yield the mask and the per-pixel loss of each image.

    Raises:
        ConfigError: An image has no mask.
        DatasetError: An image or a mask is broken.
    """
    for sample in dataset.samples("train")[:limit]:
        if sample.mask is None:
            raise ConfigError(f"real: {dataset.location}: {sample.id} has no mask")
        image, mask = load_pair(dataset, sample)
        predicted = predict_pseudo_labels(segmenter, image[None], mask, outputs=("loss",))
        if predicted.loss is not None:
            yield mask, predicted.loss[0]
