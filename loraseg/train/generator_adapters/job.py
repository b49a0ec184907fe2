"""The job that trains, scores and publishes a generator adapter."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, cast

from loraseg import config as configuration
from loraseg.adapters import load_adapter, to_peft_files
from loraseg.adapters.attention_mix import AttentionMixMode, encode_attention_mix
from loraseg.adapters.exchange import KOHYA_FILE, to_diffusers_files, to_kohya_file
from loraseg.adapters.peft_io import ATTENTION_MIX_FILE
from loraseg.backbones.device import best_device
from loraseg.backbones.diffusion import DiffusionBase, load_diffusion
from loraseg.data import Sample, digest_samples
from loraseg.errors import ConfigError, StoreError
from loraseg.fuse import Mix, fuse
from loraseg.library import AdapterCard, BaseModelInfo, Library, TrainingSet
from loraseg.revision import code_revision
from loraseg.storage import open_store
from loraseg.synth.conditioning import Conditioner
from loraseg.synth.generator_adapter import GeneratorAdapter, check_base
from loraseg.synth.sizes import size_multiple
from loraseg.train.core.progress import ProgressCallback
from loraseg.train.core.task import (
    SharedResources,
    TaskResult,
    TrainingPlan,
    TrainingRun,
    open_samples,
)
from loraseg.train.core.task_digest import task_digest
from loraseg.train.core.threads import fixed_threads
from loraseg.train.generator_adapters.crops import CroppedImages
from loraseg.train.generator_adapters.latents import TensorCache
from loraseg.train.generator_adapters.recipes import GeneratorRecipe, SampleGridConfig
from loraseg.train.generator_adapters.report import (
    SampleGrid,
    encoders_on_device,
    render_generator_report,
)
from loraseg.train.generator_adapters.samples import CropConditions, DenoisingData, DrawConfig
from loraseg.train.generator_adapters.targets import count_generator_parameters, generator_targets
from loraseg.train.generator_adapters.task import ActiveAdapter, GeneratorAdapterTask
from loraseg.train.generator_adapters.training import (
    Callbacks,
    TrainedGenerator,
    base_model_loss,
    train_generator,
)

__all__ = ["GeneratorAdapterJob"]

logger = logging.getLogger(__name__)

# Part of every task digest: raise it when the same task would give other bytes than before.
GENERATOR_FORMAT = 1


@dataclasses.dataclass(slots=True)
class GeneratorAdapterJob:
    """A generator task with its dataset, base and frozen adapters.

    Attributes:
        task: The task.
        training_run: Data, checkpoints and publication.
        base: The frozen generator.
        conditioner: Makes prompts and regions from masks.
        train_crops: Crops of the training images.
        val_crops: Crops of the validation images; None without a validation split.
        frozen_adapters: Adapters merged into the base during training.
    """

    task: GeneratorAdapterTask
    training_run: TrainingRun
    base: DiffusionBase
    conditioner: Conditioner
    train_crops: CroppedImages
    val_crops: CroppedImages | None
    frozen_adapters: tuple["_FrozenAdapter", ...]

    @classmethod
    def prepare(cls, task: GeneratorAdapterTask, shared: SharedResources) -> "GeneratorAdapterJob":
        """Open the data and load the models.

        Raises:
            ConfigError: The recipe does not fit the base, or an adapter cannot be active.
            DatasetError: The data cannot be used.
            IntegrityError: Weights or an active adapter are damaged.
            AdapterNotFoundError: The library lacks an active adapter.
            StoreError: The library or a layer report cannot be read.
        """
        recipe = task.recipe
        dataset, samples = open_samples(task, shared)
        base = load_diffusion(task.base)
        _check_size(base, recipe)
        active = tuple(_FrozenAdapter.load(task.library, spec, base) for spec in task.active)
        training_digest = digest_samples(dataset, samples)
        # URIs, sample grids and the checkpoint interval change nothing about the result.
        digest = task_digest(
            GENERATOR_FORMAT,
            {
                "name": task.name,
                "seed": task.seed,
                "data_order": task.data_order,
                "recipe": _canonical_recipe(recipe, generator_targets(base.unet, recipe)),
                "training_digest": training_digest,
                "base_digest": base.digest,
                "active": [
                    (frozen.adapter.adapter.digest, frozen.adapter.weight) for frozen in active
                ],
            },
        )
        steps, batch_size = recipe.loop.steps, recipe.batch_size
        run = TrainingRun(task, dataset, samples, training_digest, digest, steps, batch_size)
        validation = run.validation_samples()

        def crops(of: Sequence[Sample]) -> CroppedImages:
            return CroppedImages(dataset, of, recipe.view, seed=task.seed, keys=run.stream_keys)

        return cls(
            task=task,
            training_run=run,
            base=base,
            conditioner=Conditioner(base.tokenizers, dataset.label_space, recipe.conditioning),
            train_crops=crops(samples),
            val_crops=crops(validation) if validation else None,
            frozen_adapters=active,
        )

    def plan(self) -> TrainingPlan:
        """Check the data and describe what :meth:`run` would do.

        Raises:
            DatasetError: A file is broken, or a mask gives no prompt.
            StoreError: The library cannot be read.
        """
        self._load_conditions()
        return self.training_run.plan(
            sum(count_generator_parameters(self.base.unet, self.task.recipe))
        )

    def run(self, on_progress: ProgressCallback) -> TaskResult:
        """Train, score and publish; return the published version if the task is done already.

        Raises:
            DatasetError: A file is broken, or a mask gives no prompt.
            StageError: The loss is not finite.
            StoreError: A store cannot be reached.
        """
        published = self.training_run.find_published()
        if published is not None:
            return published
        self.training_run.set_progress_callback(on_progress)
        train_conditions, val_conditions = self._load_conditions()
        self.base.to(best_device())
        self.training_run.set_phase("encode")
        with encoders_on_device(self.base), fixed_threads(self.task.recipe.threads):
            draws = self.task.recipe.draws
            data = {"train_loss": self._prepare_data(self.train_crops, train_conditions, draws)}
            if self.val_crops is not None and val_conditions is not None:
                unflipped = dataclasses.replace(draws, flip=0.0)
                data["val_loss"] = self._prepare_data(self.val_crops, val_conditions, unflipped)
        self.training_run.progress.restart_throughput()
        trained = train_generator(
            self.base, data["train_loss"], self.task.recipe, self._callbacks(data)
        )
        self.training_run.set_phase("evaluate")
        metrics = dict(trained.losses)
        if "val_loss" in data:
            metrics["val_loss_base"] = base_model_loss(
                self.base, data["val_loss"], self.task.recipe
            )
        card = self.build_card(metrics)
        self._write_report(card)
        loop = trained.loop
        return self.training_run.publish(
            self.build_files(trained), card, loop.resumed_from_step if loop else 0
        )

    def build_files(self, trained: TrainedGenerator) -> dict[str, bytes]:
        """Return the adapter's files: peft's, the attention mix, diffusers' and kohya's."""
        name = self.base.name.rstrip("/").rpartition("/")[2]
        files = to_peft_files(trained.pairs, base_name=name, base_digest=self.base.digest)
        if trained.alphas:
            mode = cast(AttentionMixMode, self.task.recipe.fusion.mode)
            files[ATTENTION_MIX_FILE] = encode_attention_mix(trained.alphas, mode)
        return {
            **files,
            **to_diffusers_files(trained.pairs),
            KOHYA_FILE: to_kohya_file(trained.pairs),
        }

    def build_card(self, metrics: dict[str, float]) -> AdapterCard:
        """Return the card to publish with the adapter."""
        task, run = self.task, self.training_run
        recipe: dict[str, Any] = {
            **configuration.to_dict(task.recipe),
            "seed": task.seed,
            "task_digest": run.digest,
            "active": [frozen.as_json() for frozen in self.frozen_adapters],
            "active_adapters": [frozen.adapter.adapter.digest for frozen in self.frozen_adapters],
        }
        return AdapterCard(
            name=task.name,
            role=task.role,
            base=BaseModelInfo(self.base.name.rstrip("/").rpartition("/")[2], self.base.digest),
            label_space=run.dataset.label_space.names,
            recipe=recipe,
            training=TrainingSet(run.training_digest, len(run.samples)),
            metrics=metrics,
            code_revision=code_revision(),
            parents=tuple(frozen.adapter.adapter.digest for frozen in self.frozen_adapters),
        )

    def _load_conditions(self) -> tuple[CropConditions, CropConditions | None]:
        """Read all masks of both splits, so that bad ones fail before anything is encoded."""
        validation = self.val_crops and CropConditions(self.val_crops, self.conditioner)
        return CropConditions(self.train_crops, self.conditioner), validation

    def _prepare_data(
        self, crops: CroppedImages, conditions: CropConditions, draws: DrawConfig
    ) -> DenoisingData:
        cache = TensorCache(open_store(self.task.cache_uri))
        return DenoisingData.prepare(self.base, crops, conditions, draws, cache)

    def _callbacks(self, data: dict[str, DenoisingData]) -> Callbacks:
        checkpoints = self.training_run.checkpoint_store()
        grid = self._sample_grid()
        adapters = [frozen.adapter for frozen in self.frozen_adapters]
        mix: Mix | None = None
        if adapters:
            mix = fuse([part.adapter for part in adapters], [part.weight for part in adapters])
        return Callbacks(
            checkpoints=checkpoints,
            on_step=self.training_run.progress,
            frozen_adapters=mix,
            on_sample_grid=lambda step, current: checkpoints.save_image(step, grid.render(current)),
            score_data=data,
        )

    def _sample_grid(self) -> SampleGrid:
        images, config = self.val_crops or self.train_crops, self.task.recipe.grid
        # The first crop of each image: one row per mask of the split.
        first = {crop.sample.id: crop for crop in reversed(images.crops)}
        names = list(dict.fromkeys(crop.sample.id for crop in images.crops))[: config.masks]
        examples = [(name, *images.load(first[name])) for name in names]
        return SampleGrid(
            base=self.base,
            conditioner=self.conditioner,
            recipe=self.task.recipe,
            examples=examples,
            frozen_adapters=[frozen.adapter for frozen in self.frozen_adapters],
            seed=self.task.seed,
        )

    def _write_report(self, card: AdapterCard) -> None:
        """Write the report; a failure is only logged, since the adapter must still be published."""
        key = f"{self.task.name}.html"
        try:
            page = render_generator_report(card, self.training_run.checkpoint_store().load_images())
            open_store(self.task.report_uri).put(key, page.encode())
            logger.info("%s: report in %s/%s", self.task.name, self.task.report_uri, key)
        except StoreError as error:
            logger.warning("%s: report not written: %s", self.task.name, error)


@dataclasses.dataclass(frozen=True, slots=True)
class _FrozenAdapter:
    """A library adapter that is merged into the base during training, and its version."""

    adapter: GeneratorAdapter
    version: int

    @classmethod
    def load(cls, library: str, spec: ActiveAdapter, base: DiffusionBase) -> "_FrozenAdapter":
        source = Library(open_store(library))
        entry = source.entry(spec.name, spec.version)
        files, card = source.load_entry(entry)
        if card.role != "generator" or ATTENTION_MIX_FILE in files:
            reason = (
                f"has role {card.role}"
                if card.role != "generator"
                else "has attention-mix layers of its own"
            )
            raise ConfigError(
                f"active: {spec.name} version {entry.version} {reason}; expected a generator "
                "adapter of pairs only"
            )
        adapter = load_adapter(files, name=spec.name)
        weighted = GeneratorAdapter.from_adapter(adapter, weight=spec.weight)
        check_base([weighted], base.name, base.digest)
        return cls(weighted, entry.version)

    def as_json(self) -> dict[str, Any]:
        adapter = self.adapter.adapter
        return {
            "name": adapter.name,
            "version": self.version,
            "digest": adapter.digest,
            "weight": self.adapter.weight,
        }


def _canonical_recipe(recipe: GeneratorRecipe, names: tuple[str, ...]) -> GeneratorRecipe:
    loop = dataclasses.replace(recipe.loop, checkpoint_every=1)
    grid = SampleGridConfig()
    return dataclasses.replace(recipe, loop=loop, grid=grid, targets=names, top=None, share=None)


def _check_size(base: DiffusionBase, recipe: GeneratorRecipe) -> None:
    step = size_multiple(base)
    if any(side % step for side in recipe.view.size):
        raise ConfigError(
            f"view.size: got {recipe.view.size}, expected multiples of {step} for base "
            f"{base.name!r}"
        )
