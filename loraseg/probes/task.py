"""Settings of a probe, and the function that runs it on a worker."""

import dataclasses
import logging
from collections.abc import Callable, Mapping

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
from loraseg.train.core.task_digest import task_digest
from loraseg.train.core.threads import fixed_threads
from loraseg.train.generator_adapters.crops import CroppedImages, ViewConfig
from loraseg.train.generator_adapters.latents import TensorCache
from loraseg.train.generator_adapters.report import encoders_on_device
from loraseg.train.generator_adapters.samples import CropConditions, DenoisingData, DrawConfig

__all__ = ["METHODS", "ProbeResult", "ProbeTask", "run_probe"]

logger = logging.getLogger(__name__)

# Part of every task digest: to be incremented when the same task gives other scores than before.
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeTask:
    """Model, data and settings of a probe, and the output file.

    Attributes:
        method: Key of :data:`METHODS`. "gradient" measures how much full fine-tuning changes each
            layer.
        base: The generator, see :func:`loraseg.backbones.diffusion.load_diffusion`.
        data: Dataset, a path or URI.
        split: Split of the dataset.
        images: Number of images, chosen by ``seed``; None for all.
        size: (height, width) of the images; None for the generator's own.
        flip: Probability of a horizontal flip, in [0, 1].
        conditioning: How prompts are built from class names.
        gradient: Settings of the gradient probe.
        seed: Seed of the choice of images, the batches and the noise.
        output: Path or URI of the report, a JSON file.
        cache: Store URI for latents and encoded prompts; None for ``_cache`` in the folder of the
            report.
        skip_bad: Leave out unusable images instead of raising an error.
    """

    method: str = "gradient"
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
        """Check the settings that do not depend on the data.

        Raises:
            ConfigError: ``method`` is unknown, ``images`` or ``flip`` is out of range, or
                ``output`` is not a file.
        """
        if self.method not in METHODS:
            raise ConfigError(f"method: got {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.images is not None and self.images < 1:
            raise ConfigError(f"images: got {self.images}, expected at least 1, or null for all")
        DrawConfig(flip=self.flip)
        split_uri(self.output)

    def resolved(self) -> "ProbeTask":
        """Return the task with absolute paths and URIs, which do not depend on the process."""
        return dataclasses.replace(
            self,
            base=absolute_spec(self.base),
            data=absolute_uri(self.data),
            output=absolute_uri(self.output),
            cache=self.cache and absolute_uri(self.cache),
        )

    @property
    def cache_uri(self) -> str:
        """Store URI of latents and encoded prompts."""
        return self.cache or f"{split_uri(self.output)[0]}/_cache"


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeResult:
    """The bytes of a report, and whether an earlier run had already written them."""

    report: bytes
    skipped: bool


def run_probe(task: ProbeTask) -> ProbeResult:
    """Run a probe and write its report, unless the output already holds this report.

    The report of another probe is replaced; any other file at the output is an error.

    Raises:
        ConfigError: A setting does not fit the model.
        DatasetError: The data are not usable.
        IntegrityError: The weights are damaged, or the output is a file but not a report.
        StageError: The loss is not finite.
        StoreError: A store cannot be read or written.
    """
    dataset = open_dataset(task.data, skip_bad=task.skip_bad)
    samples = dataset.samples(task.split)
    if task.images is not None:
        samples = few_shot(samples, task.images, task.seed)
    base = load_diffusion(task.base)
    size = _image_size(task, base)
    data_digest = digest_samples(dataset, samples)
    digest = _probe_digest(task, base, size, data_digest)
    existing = find_layer_report(task.output)
    if existing is not None and existing.settings.get("task_digest") == digest:
        logger.info("%s: already holds the report of this probe", task.output)
        return ProbeResult(existing.to_bytes(), skipped=True)
    if existing is not None:
        logger.warning("%s: replacing the report of another probe", task.output)
    views = CroppedImages(dataset, samples, ViewConfig(size=size), seed=task.seed, keys=("probe",))
    report = METHODS[task.method](task, base, views, dataset.label_space)
    content = dataclasses.replace(
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
    store.put(key, content)
    return ProbeResult(content, skipped=False)


def _probe_digest(
    task: ProbeTask, base: DiffusionBase, size: tuple[int, int], data_digest: str
) -> str:
    """Return the digest of everything that determines the scores."""
    return task_digest(
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


ProbeFunction = Callable[[ProbeTask, DiffusionBase, CroppedImages, LabelSpace], LayerReport]

METHODS: Mapping[str, ProbeFunction] = {"gradient": _run_gradient_probe}


def _image_size(task: ProbeTask, base: DiffusionBase) -> tuple[int, int]:
    size = task.size or (base.image_size, base.image_size)
    multiple = size_multiple(base)
    if any(side < multiple or side % multiple for side in size):
        raise ConfigError(
            f"size: got {size}, expected multiples of {multiple} for base {base.name!r}"
        )
    return size
