"""A generator adapter's work with its data and model at hand: what it is, and its end."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, cast

from loraseg import config as configuration
from loraseg.adapters import adapter_files, load_adapter
from loraseg.adapters.exchange import KOHYA_FILE, diffusers_files, kohya_file
from loraseg.adapters.fusion_file import FUSION_FILE, FusionMode, fusion_file
from loraseg.backbones.device import best_device
from loraseg.backbones.diffusion import DiffusionBase, load_diffusion
from loraseg.data import Sample
from loraseg.errors import ConfigError, StoreError
from loraseg.fuse import Mix, fuse
from loraseg.library import BaseModel, Card, Library, TrainingSet
from loraseg.revision import code_revision
from loraseg.storage import open_store
from loraseg.synth.conditioning import Conditioner
from loraseg.synth.generator_adapter import GeneratorAdapter, check_base
from loraseg.synth.sizes import side_step
from loraseg.train.denoising_data import Conditions, DenoisingData, DrawConfig
from loraseg.train.generator import Hooks, TrainedGenerator, base_loss, train_generator
from loraseg.train.generator_recipes import GeneratorRecipe, GridConfig
from loraseg.train.generator_report import SampleGrid, encoders_beside, render_page
from loraseg.train.generator_targets import count_generator_parameters, generator_targets
from loraseg.train.generator_task import ActiveAdapter, GeneratorTask
from loraseg.train.latents import TensorCache
from loraseg.train.progress import Report
from loraseg.train.segmentation import fixed_threads
from loraseg.train.unit import Loaded, TaskPlan, TaskResult, Unit, open_samples
from loraseg.train.views import Views

__all__ = ["GeneratorWork"]

logger = logging.getLogger(__name__)

# Part of every task digest: raise it when the same task would give other bytes than before.
GENERATOR_FORMAT = 1


@dataclasses.dataclass(slots=True)
class GeneratorWork:
    """A task with its data and model at hand.

    Attributes:
        views: Of the images trained on, and of those held out; None without a validation split.
        active: What acts meanwhile, with the digests and versions found.
    """

    task: GeneratorTask
    unit: Unit
    base: DiffusionBase
    conditioner: Conditioner
    views: Views
    held_out: Views | None
    active: tuple["_Active", ...]

    @classmethod
    def prepare(cls, task: GeneratorTask) -> "GeneratorWork":
        """Look at the data and load the model.

        Raises:
            ConfigError: The recipe does not fit the model.
            DatasetError: The data cannot be used.
            IntegrityError: Weights or an active adapter are damaged.
            AdapterNotFoundError: The library lacks an active adapter.
            StoreError: The library or a layer report cannot be read.
        """
        recipe = task.recipe
        dataset, samples = open_samples(task, Loaded())
        base = load_diffusion(task.base)
        _check_size(base, recipe)
        active = tuple(_Active.load(task.library, one, base) for one in task.active)
        training_digest = dataset.digest(samples)
        digest = configuration.digest(
            _TaskKey(
                format=GENERATOR_FORMAT,
                name=task.name,
                seed=task.seed,
                data_order=task.data_order,
                recipe=_that_matters(recipe, generator_targets(base.unet, recipe)),
                training_digest=training_digest,
                base_digest=base.digest,
                active=tuple((one.adapter.adapter.digest, one.adapter.weight) for one in active),
            )
        )
        steps, batch_size = recipe.loop.steps, recipe.batch_size
        unit = Unit(task, dataset, samples, training_digest, digest, steps, batch_size)
        held_out: Sequence[Sample] = unit.validation()

        def views(of: Sequence[Sample]) -> Views:
            return Views(dataset, of, recipe.view, seed=task.seed, keys=unit.keys)

        return cls(
            task=task,
            unit=unit,
            base=base,
            conditioner=Conditioner(base.tokenizers, dataset.label_space, recipe.conditioning),
            views=views(samples),
            held_out=views(held_out) if held_out else None,
            active=active,
        )

    def plan(self) -> TaskPlan:
        """Say what :meth:`run` would do.

        Raises:
            DatasetError: A file is broken, or a mask cannot be made into a prompt.
        """
        self._conditions()
        return self.unit.plan(sum(count_generator_parameters(self.base.unet, self.task.recipe)))

    def run(self, report: Report) -> TaskResult:
        """Train, score and publish, or find that this has been done.

        Raises:
            DatasetError: A file is broken, or a mask cannot be made into a prompt.
            StageError: The loss is not finite.
            StoreError: A store cannot be reached.
        """
        done = self.unit.found_done()
        if done is not None:
            return done
        self.unit.report_to(report)
        train, held = self._conditions()
        self.base.to(best_device())
        self.unit.enter("encode")
        with encoders_beside(self.base), fixed_threads(self.task.recipe.threads):
            draws = self.task.recipe.draws
            data = {"train_loss": self._data(self.views, train, draws)}
            if self.held_out is not None and held is not None:
                unflipped = dataclasses.replace(draws, flip=0.0)
                data["val_loss"] = self._data(self.held_out, held, unflipped)
        self.unit.pace.restart()
        trained = train_generator(
            self.base, data["train_loss"], self.task.recipe, self._hooks(data)
        )
        self.unit.enter("evaluate")
        metrics = dict(trained.losses)
        if "val_loss" in data:
            metrics["val_loss_base"] = base_loss(self.base, data["val_loss"], self.task.recipe)
        card = self.card(metrics)
        self._write_page(card)
        loop = trained.loop
        return self.unit.publish(self.files(trained), card, loop.resumed_from_step if loop else 0)

    def files(self, trained: TrainedGenerator) -> dict[str, bytes]:
        """Return peft's files, the fusion layers, and the forms that other programs read."""
        name = self.base.name.rstrip("/").rpartition("/")[2]
        files = adapter_files(trained.pairs, base_name=name, base_digest=self.base.digest)
        if trained.alphas:
            mode = cast(FusionMode, self.task.recipe.fusion.mode)
            files[FUSION_FILE] = fusion_file(trained.alphas, mode)
        return {**files, **diffusers_files(trained.pairs), KOHYA_FILE: kohya_file(trained.pairs)}

    def card(self, metrics: dict[str, float]) -> Card:
        """Return what the library is told about the adapter."""
        task, unit = self.task, self.unit
        recipe: dict[str, Any] = {
            **configuration.to_dict(task.recipe),
            "seed": task.seed,
            "task_digest": unit.digest,
            "active": [one.as_json() for one in self.active],
            "active_adapters": [one.adapter.adapter.digest for one in self.active],
        }
        return Card(
            name=task.name,
            role="generator",
            base=BaseModel(self.base.name.rstrip("/").rpartition("/")[2], self.base.digest),
            label_space=unit.dataset.label_space.names,
            recipe=recipe,
            training=TrainingSet(unit.training_digest, len(unit.samples)),
            metrics=metrics,
            code_revision=code_revision(),
            parents=tuple(one.adapter.adapter.digest for one in self.active),
        )

    def _conditions(self) -> tuple[Conditions, Conditions | None]:
        """Look at all masks, so that bad ones show before long work starts."""
        held = self.held_out and Conditions(self.held_out, self.conditioner)
        return Conditions(self.views, self.conditioner), held

    def _data(self, views: Views, conditions: Conditions, draws: DrawConfig) -> DenoisingData:
        cache = TensorCache(open_store(self.task.cache_place))
        return DenoisingData.prepare(self.base, views, conditions, draws, cache)

    def _hooks(self, data: dict[str, DenoisingData]) -> Hooks:
        slot = self.unit.slot()
        grid = self._grid()
        adapters = [one.adapter for one in self.active]
        mix: Mix | None = None
        if adapters:
            mix = fuse([one.adapter for one in adapters], [one.weight for one in adapters])
        return Hooks(
            slot=slot,
            watch=self.unit.pace,
            active=mix,
            show=lambda step, kept: slot.keep_picture(step, grid.draw(kept)),
            score_on=data,
        )

    def _grid(self) -> SampleGrid:
        views, config = self.held_out or self.views, self.task.recipe.grid
        # Of an image that is cut into crops the first: a row for each mask of the split.
        first = {view.sample.id: view for view in reversed(views.all)}
        names = list(dict.fromkeys(view.sample.id for view in views.all))[: config.masks]
        shown = [(name, *views.load(first[name])) for name in names]
        return SampleGrid(
            base=self.base,
            conditioner=self.conditioner,
            recipe=self.task.recipe,
            shown=shown,
            active=[one.adapter for one in self.active],
            seed=self.task.seed,
        )

    def _write_page(self, card: Card) -> None:
        """Write the report; the adapter is worth more, so a store that fails is only logged."""
        key = f"{self.task.name}.html"
        try:
            page = render_page(card, self.unit.slot().pictures())
            open_store(self.task.report_place).put(key, page.encode())
            logger.info("%s: report in %s/%s", self.task.name, self.task.report_place, key)
        except StoreError as error:
            logger.warning("%s: report not written: %s", self.task.name, error)


@dataclasses.dataclass(frozen=True, slots=True)
class _Active:
    """An adapter that acts while another is trained."""

    adapter: GeneratorAdapter
    version: int

    @classmethod
    def load(cls, library: str, wanted: ActiveAdapter, base: DiffusionBase) -> "_Active":
        shelf = Library(open_store(library))
        entry = shelf.entry(wanted.name, wanted.version)
        files, card = shelf.load_entry(entry)
        if card.role != "generator" or FUSION_FILE in files:
            reason = (
                f"is a {card.role}'s"
                if card.role != "generator"
                else "has fusion layers of its own"
            )
            raise ConfigError(
                f"active: {wanted.name} version {entry.version} {reason}; expected a generator's "
                "adapter of pairs only"
            )
        adapter = load_adapter(files, name=wanted.name)
        found = GeneratorAdapter.of(adapter, weight=wanted.weight)
        check_base([found], base.name, base.digest)
        return cls(found, entry.version)

    def as_json(self) -> dict[str, Any]:
        adapter = self.adapter.adapter
        return {
            "name": adapter.name,
            "version": self.version,
            "digest": adapter.digest,
            "weight": self.adapter.weight,
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _TaskKey:
    """What decides the published bytes: not where things lie, nor what is shown or saved."""

    format: int
    name: str
    seed: int
    data_order: str
    recipe: GeneratorRecipe
    training_digest: str
    base_digest: str
    active: tuple[tuple[str, float], ...]


def _that_matters(recipe: GeneratorRecipe, names: tuple[str, ...]) -> GeneratorRecipe:
    loop = dataclasses.replace(recipe.loop, checkpoint_every=1)
    grid = GridConfig()
    return dataclasses.replace(recipe, loop=loop, grid=grid, targets=names, top=None, share=None)


def _check_size(base: DiffusionBase, recipe: GeneratorRecipe) -> None:
    step = side_step(base)
    if any(side % step for side in recipe.view.size):
        raise ConfigError(
            f"view.size: got {recipe.view.size}, expected multiples of {step} for base "
            f"{base.name!r}"
        )
