"""A probe as a unit of work: its settings, and what a worker does."""

import dataclasses
import logging
from typing import Literal

from loraseg.adapters.targets.layer_report import LayerReport
from loraseg.adapters.targets.layer_report_io import find_layer_report
from loraseg.backbones.device import best_device
from loraseg.backbones.diffusion import DiffusionBase, load_diffusion
from loraseg.backbones.weights import absolute_spec
from loraseg.data import LabelSpace, digest_samples, few_shot, open_dataset
from loraseg.errors import ConfigError
from loraseg.probes.gradient import GradientProbeConfig, gradient_probe
from loraseg.storage import absolute_uri, open_parent_store, open_store, split_uri
from loraseg.synth.conditioning import Conditioner, ConditioningConfig
from loraseg.synth.sizes import size_multiple
from loraseg.train.core.task import task_digest
from loraseg.train.generator_adapters.crops import CroppedImages, ViewConfig
from loraseg.train.generator_adapters.latents import TensorCache
from loraseg.train.generator_adapters.report import encoders_on_device
from loraseg.train.generator_adapters.samples import CropConditions, DenoisingData, DrawConfig
from loraseg.train.segmenter_adapters.samples import fixed_threads

__all__ = ["ProbeResult", "ProbeTask", "run_probe"]

logger = logging.getLogger(__name__)

# Part of every task digest: raise it when the same task would give other scores than before.
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeTask:
    """What to probe, with what, and where the report goes.

    Attributes:
        method: "gradient": how far full tuning moves each layer.
        base: The generator, see :func:`loraseg.backbones.diffusion.load_diffusion`.
        data: Dataset folder, a path or URI.
        split: Split to probe with.
        images: So many images of it, chosen by seed; None for all.
        size: (height, width) of the images; None for the generator's own.
        flip: Probability of a horizontal flip.
        conditioning: Prompts from class names.
        gradient: How to tune.
        seed: Decides the choice of images, the batches and the noise.
        output: Path or URI of the report's file.
        cache: Store URI for latents and encoded prompts; None for ``_cache`` beside the report.
        skip_bad: Leave out unusable images rather than fail.
    """

    method: Literal["gradient"] = "gradient"
    base: str = "miniature"
    data: str
    split: str = "train"
    images: int | None = None
    size: tuple[int, int] | None = None
    flip: float = 0.5
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)
    gradient: GradientProbeConfig = dataclasses.field(default_factory=GradientProbeConfig)
    seed: int = 0
    output: str
    cache: str | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without the data.

        Raises:
            ConfigError: The number of images, the probability or the output is not possible.
        """
        if self.images is not None and self.images < 1:
            raise ConfigError(f"images: got {self.images}, expected at least 1, or null for all")
        DrawConfig(flip=self.flip)
        split_uri(self.output)

    def resolved(self) -> "ProbeTask":
        """Return a task of this very class, with addresses that hold in any process.

        Workers of a cluster can import it, whereas a job's own class lives in ``__main__``.
        """
        names = [item.name for item in dataclasses.fields(ProbeTask)]
        return dataclasses.replace(
            ProbeTask(**{name: getattr(self, name) for name in names}),
            base=absolute_spec(self.base),
            data=absolute_uri(self.data),
            output=absolute_uri(self.output),
            cache=self.cache and absolute_uri(self.cache),
        )

    @property
    def cache_uri(self) -> str:
        """Where latents and encoded prompts are kept."""
        return self.cache or f"{split_uri(self.output)[0]}/_cache"


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeResult:
    """The report's bytes, and whether they had been there before."""

    report: bytes
    skipped: bool


def run_probe(task: ProbeTask) -> ProbeResult:
    """Probe and write the report, or find that this has been done.

    A report of another probe at the same place is replaced, any other file is not.

    Raises:
        ConfigError: A setting does not fit the model.
        DatasetError: The data cannot be used.
        IntegrityError: The weights are damaged, or there is a file which is no report.
        StageError: The loss is not finite.
        StoreError: A store cannot be reached.
    """
    dataset = open_dataset(task.data, skip_bad=task.skip_bad)
    samples = dataset.samples(task.split)
    if task.images is not None:
        samples = few_shot(samples, task.images, task.seed)
    base = load_diffusion(task.base)
    size = _image_size(task, base)
    data_digest = digest_samples(dataset, samples)
    digest = task_digest(
        _FORMAT,
        {
            "method": task.method,
            "base_digest": base.digest,
            "data_digest": data_digest,
            "size": size,
            "flip": task.flip,
            "conditioning": task.conditioning,
            "gradient": task.gradient,
            "seed": task.seed,
        },
    )
    known = find_layer_report(task.output)
    if known is not None and known.settings.get("task_digest") == digest:
        logger.info("%s: holds this probe already", task.output)
        return ProbeResult(known.to_bytes(), skipped=True)
    if known is not None:
        logger.warning("%s: the report of another probe is replaced", task.output)
    views = CroppedImages(dataset, samples, ViewConfig(size=size), seed=task.seed, keys=("probe",))
    report = _run_gradient_probe(task, base, views, dataset.label_space)
    found = dataclasses.replace(
        report,
        samples={**report.samples, "images": len(samples)},
        settings={
            **report.settings,
            "task_digest": digest,
            "data_digest": data_digest,
            "size": list(size),
            "flip": task.flip,
        },
    ).to_bytes()
    store, key = open_parent_store(task.output)
    store.put(key, found)
    return ProbeResult(found, skipped=False)


def _run_gradient_probe(
    task: ProbeTask, base: DiffusionBase, views: CroppedImages, space: LabelSpace
) -> LayerReport:
    conditioner = Conditioner(base.tokenizers, space, task.conditioning)
    conditions = CropConditions(views, conditioner)
    base.to(best_device())
    with encoders_on_device(base), fixed_threads(task.gradient.threads):
        cache = TensorCache(open_store(task.cache_uri))
        data = DenoisingData.prepare(base, views, conditions, DrawConfig(flip=task.flip), cache)
    return gradient_probe(base, data, task.gradient)


def _image_size(task: ProbeTask, base: DiffusionBase) -> tuple[int, int]:
    size = task.size or (base.image_size, base.image_size)
    step = size_multiple(base)
    if any(side < step or side % step for side in size):
        raise ConfigError(f"size: got {size}, expected multiples of {step} for base {base.name!r}")
    return size
