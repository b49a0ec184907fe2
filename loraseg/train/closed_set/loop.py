"""Training of a closed-set segmenter on real and synthetic pairs, as in MatchMask.

Step s depends only on s and the state. A run that is killed and resumed any number of times
therefore ends like an uninterrupted one, on the CPU in the same bytes. It runs in one process or in
several that torch.distributed connects, each with its part of every batch.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed
import torch.utils.data
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError, StageError
from loraseg.seeding import derive
from loraseg.segment.closed_set.checkpoint import encode_closed_set_segmenter
from loraseg.segment.closed_set.networks import ClosedSetNetwork, build_network
from loraseg.segment.closed_set.pretrained import load_pretrained
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.train.closed_set.recipes import SegmenterRecipe, lr_factor
from loraseg.train.closed_set.samples import BatchDataset, MixedSampler, PairSource, class_shares
from loraseg.train.closed_set.state import TrainingCurves, TrainingState, decode_state, encode_state
from loraseg.train.core.optimisation import OptimiserStep, is_due
from loraseg.train.core.threads import fixed_threads

__all__ = ["TrainingContext", "TrainingData", "TrainingResult", "train_segmenter"]

logger = logging.getLogger(__name__)

_LOSS_POINTS = 100  # of the loss curve
_EVAL_PIXELS = 2**20
_EVAL_BATCH = 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Training and validation pairs.

    Attributes:
        label_space: The classes.
        real: Labelled real pairs.
        synthetic: Synthetic pairs; None trains on real pairs only.
        val: Validation pairs, which select the best checkpoint.
    """

    label_space: LabelSpace
    real: PairSource
    synthetic: PairSource | None
    val: PairSource


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingContext:
    """Process group, device and checkpoints of a run; by default one process, no checkpoints.

    Attributes:
        rank: Rank of this process, from 0.
        world_size: Number of processes; more than one must be connected by torch.distributed.
        device: Device of the network.
        num_workers: Data loader processes of this process; 0 loads in the process itself.
        load_checkpoint: Returns the newest checkpoint, None if there is none.
        save_checkpoint: Called on all ranks at the same steps with (step, scores, checkpoint); the
            checkpoint is None on all ranks but 0.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    num_workers: int = 0
    load_checkpoint: Callable[[], bytes | None] = lambda: None
    save_checkpoint: Callable[[int, Mapping[str, float], bytes | None], None] = lambda *_: None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingResult:
    """The best checkpoint of a run.

    Attributes:
        segmenter: Bytes of the segmenter's file; the last checkpoint if the validation pairs have
            no labelled pixel.
        step: Number of steps before the checkpoint.
        confusion: Confusion matrix of the checkpoint on the validation pairs.
        curves: Loss and validation mIoU by step.
    """

    segmenter: bytes
    step: int
    confusion: ConfusionMatrix
    curves: TrainingCurves


def train_segmenter(
    recipe: SegmenterRecipe,
    data: TrainingData,
    seed: int = 0,
    context: TrainingContext | None = None,
) -> TrainingResult:
    """Train with periodic evaluation and return the checkpoint with the best validation mIoU.

    Args:
        recipe: Network, data mix and optimisation.
        data: Pairs; their order influences the result.
        seed: Seed of initial weights, batches, augmentation and dropout.
        context: Process group, device and checkpoints.

    Raises:
        ConfigError: The number of workers does not fit the batch size.
        DatasetError: A pair is broken.
        IntegrityError: A shard, the pretrained weights or the checkpoint are damaged.
        StageError: The loss is not finite.
        StoreError: A store cannot be read.
    """
    context = context or TrainingContext()
    with _isolated_torch_state(recipe.threads, torch.device(context.device)):
        run = _SegmenterTrainer(recipe, data, seed, context)
        run.resume()
        run.train()
        return run.result()


class _SegmenterTrainer:
    """One training run on one rank."""

    def __init__(
        self, recipe: SegmenterRecipe, data: TrainingData, seed: int, context: TrainingContext
    ) -> None:
        self._recipe, self._data, self._seed, self._context = recipe, data, seed, context
        _check_batch(recipe, context.world_size)
        self._device = torch.device(context.device)
        self._network = _init_network(recipe, len(data.label_space), seed).to(self._device)
        self._optimiser_step = OptimiserStep(
            _optimiser(recipe, self._network),
            self._network.parameters(),
            lambda peak, step: peak * lr_factor(recipe, step),
            clip_norm=recipe.clip_norm,
        )
        self._state = TrainingState(len(data.label_space))
        self._class_weights = _class_weights(recipe, data, self._device)
        sampler = MixedSampler(recipe, data.real, data.synthetic, seed)
        self._batches = BatchDataset(recipe, sampler, seed, context.rank, context.world_size)

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        stored = self._context.load_checkpoint()
        if stored is not None:
            self._state = decode_state(stored, self._network.body, self._optimiser_step.optimiser)
            logger.info("resumed at step %d of %d", self._state.step, self._recipe.steps)

    def train(self) -> None:
        """Make the remaining steps."""
        recipe, state = self._recipe, self._state
        model = self._wrap_distributed()
        window: list[Tensor] = []
        every = max(1, min(recipe.eval_every, recipe.steps // _LOSS_POINTS))
        for step, (images, labels) in zip(
            range(state.step, recipe.steps), self._loader(), strict=True
        ):
            window.append(self._train_step(model, step, images, labels))
            state.step = step + 1
            evaluates = is_due(state.step, recipe.eval_every, recipe.steps)
            if evaluates or state.step % every == 0:
                state.curves.losses.append((state.step, self._mean_loss(window)))
                window = []
            if evaluates:
                self._evaluate()

    def result(self) -> TrainingResult:
        """Return the best checkpoint, which is the same on all ranks."""
        best = self._state.best
        self._network.body.load_state_dict(best.tensors)
        return TrainingResult(
            segmenter=encode_closed_set_segmenter(self._network, self._data.label_space.names),
            step=best.step,
            confusion=best.confusion,
            curves=self._state.curves,
        )

    def _train_step(self, model: nn.Module, step: int, images: Tensor, labels: Tensor) -> Tensor:
        # Dropout, drop path and Mask2Former's points use torch's global generator.
        torch.manual_seed(derive(self._seed, "step", step, self._context.rank))
        loss = model(images.to(self._device), labels.to(self._device), self._class_weights)
        self._optimiser_step.update(step, loss)
        return loss.detach()

    def _evaluate(self) -> None:
        """Score the network, keep it if it is the best so far, and write a checkpoint."""
        state = self._state
        confusion = self._confusion()
        labelled = bool(confusion.counts.sum())
        score = confusion.miou() if labelled else math.nan
        state.curves.scores.append((state.step, score))
        state.update_best(score, confusion, self._network.body)
        loss = state.curves.losses[-1][1]
        logger.info("step %d: loss %.4f, val mIoU %.4f", state.step, loss, score)
        first, optimiser = self._context.rank == 0, self._optimiser_step.optimiser
        data = encode_state(state, self._network.body, optimiser) if first else None
        self._context.save_checkpoint(state.step, {"loss": loss, "val_miou": score}, data)

    def _confusion(self) -> ConfusionMatrix:
        """Return the confusion matrix over all validation pairs, the same on all ranks.

        Computed in float32 whatever the training precision, as the published file does.
        """
        context = self._context
        if context.world_size > 1:
            for buffer in self._network.buffers():
                torch.distributed.broadcast(buffer, 0)
        confusion = ConfusionMatrix(len(self._data.label_space))
        self._network.eval()
        with torch.inference_mode():
            for images, labels in _val_batches(self._data.val, context.rank, context.world_size):
                pixels = self._network.normalise(images.to(self._device))
                confusion.add(labels.numpy(), self._network(pixels).argmax(1).cpu().numpy())
        self._network.train()
        if context.world_size > 1:
            counts = torch.from_numpy(confusion.counts).to(self._device)
            torch.distributed.all_reduce(counts)
            confusion.counts = counts.cpu().numpy()
        return confusion

    def _mean_loss(self, window: list[Tensor]) -> float:
        loss = torch.stack(window).mean()
        if self._context.world_size > 1:
            torch.distributed.all_reduce(loss)
            loss = loss / self._context.world_size
        if not loss.isfinite():
            raise StageError(
                f"the loss is {float(loss)} by step {self._state.step}; a lower learning_rate or "
                "precision fp32 may help"
            )
        return float(loss)

    def _wrap_distributed(self) -> nn.Module:
        model = _LossModule(self._network.train(), self._autocast)
        if self._context.world_size == 1:
            return model
        if self._device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model)

    def _autocast(self) -> Any:
        if self._recipe.precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    def _loader(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = torch.utils.data.DataLoader(
            self._batches,
            batch_size=None,
            sampler=range(self._state.step, self._recipe.steps),
            num_workers=self._context.num_workers,
            pin_memory=self._device.type == "cuda",
        )
        return iter(loader)


class _LossModule(nn.Module):
    """The loss as a forward pass, since DistributedDataParallel hooks only ``forward``."""

    def __init__(self, network: ClosedSetNetwork, autocast: Callable[[], Any]) -> None:
        super().__init__()
        self.network, self._autocast = network, autocast

    def forward(self, images: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        with self._autocast():
            return self.network.loss(self.network.normalise(images), labels, weights)


def _init_network(recipe: SegmenterRecipe, classes: int, seed: int) -> ClosedSetNetwork:
    torch.manual_seed(derive(seed, "weights"))
    network = build_network(recipe.network, classes)
    if recipe.weights is not None:
        load_pretrained(network, recipe.weights)
    return network


def _optimiser(recipe: SegmenterRecipe, network: ClosedSetNetwork) -> torch.optim.Optimizer:
    groups = network.parameter_groups(recipe.learning_rate, recipe.head_factor)
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(groups, betas=recipe.betas, weight_decay=recipe.weight_decay)


def _class_weights(
    recipe: SegmenterRecipe, data: TrainingData, device: torch.device
) -> Tensor | None:
    """Return the loss weights of the classes, from the real pairs only; None if all are 1."""
    if recipe.rare_weight == 1:
        return None
    shares = torch.from_numpy(class_shares(data.real, len(data.label_space)))
    weights = torch.where(shares < recipe.rare_share, recipe.rare_weight, 1.0)
    return weights.float().to(device)


def _check_batch(recipe: SegmenterRecipe, world_size: int) -> None:
    """Check that batch norm has at least two images per worker.

    Raises:
        ConfigError: It has fewer.
    """
    if recipe.network.name == "deeplabv3plus-r101" and recipe.batch_size < 2 * world_size:
        raise ConfigError(
            f"batch_size {recipe.batch_size} on {world_size} workers: batch norm in "
            f"{recipe.network.name} needs at least 2 images per worker"
        )


def _val_batches(pairs: PairSource, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's pairs in batches of consecutive pairs of one size."""
    positions = [
        (window, position)
        for window, sizes in enumerate(pairs.windows)
        for position in range(sum(sizes))
    ]
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for window, position in positions[rank::world_size]:
        image, label = (torch.from_numpy(part.copy()) for part in pairs.load(window, position))
        limit = min(_EVAL_BATCH, _EVAL_PIXELS // label.numel())
        if images and (images[0].shape != image.shape or len(images) >= limit):
            yield torch.stack(images), torch.stack(labels)
            images, labels = [], []
        images.append(image)
        labels.append(label)
    if images:
        yield torch.stack(images), torch.stack(labels)


@contextmanager
def _isolated_torch_state(threads: int, device: torch.device) -> Generator[None, None, None]:
    """Compute with ``threads`` threads; restore them and torch's generators on exit."""
    devices = [device] if device.type == "cuda" else []
    with fixed_threads(threads), torch.random.fork_rng(devices):
        yield
