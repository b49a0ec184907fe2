"""The state of a closed-set training between two steps, and its file format.

One safetensors file holds the tensors of the network, the optimiser and the best network; its
header holds all other values as JSON.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from loraseg.errors import IntegrityError
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.storage.safetensors_io import encode_safetensors

__all__ = ["BestCheckpoint", "TrainingCurves", "TrainingState", "decode_state", "encode_state"]

_FORMAT = "loraseg-segmenter-training-1"
_CURVE_NAMES = ("losses", "scores")


@dataclass(slots=True)
class TrainingCurves:
    """Curves of a training run.

    Attributes:
        losses: (step, mean loss since the previous point).
        scores: (step, validation mIoU in [0, 1]).
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class BestCheckpoint:
    """The best network so far.

    Attributes:
        step: Finished steps.
        score: mIoU in [0, 1]; nan if nothing was scored.
        tensors: State dict of the network's body.
        confusion: Confusion matrix on the validation pairs.
    """

    step: int
    score: float
    tensors: dict[str, Tensor]
    confusion: ConfusionMatrix


class TrainingState:
    """The state of a training run, beside network and optimiser.

    Attributes:
        step: Finished steps.
        curves: Curves up to this step.
        best: The best network so far; without tensors before the first evaluation.
    """

    def __init__(self, classes: int) -> None:
        self.step = 0
        self.curves = TrainingCurves()
        self.best = BestCheckpoint(0, math.nan, {}, ConfusionMatrix(classes))

    def update_best(self, score: float, confusion: ConfusionMatrix, body: nn.Module) -> None:
        """Keep a copy of the network if it scores higher than the best one.

        Without a score (nan) the newest network counts as the best.
        """
        if math.isnan(self.best.score) or score > self.best.score:
            tensors = {name: value.detach().clone() for name, value in body.state_dict().items()}
            self.best = BestCheckpoint(self.step, score, tensors, confusion)


def encode_state(state: TrainingState, body: nn.Module, optimiser: torch.optim.Optimizer) -> bytes:
    """Return the bytes of a checkpoint."""
    tensors = {f"network.{name}": value for name, value in body.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in state.best.tensors.items()}
    tensors["confusion"] = torch.from_numpy(state.best.confusion.counts)
    for index, values in optimiser.state_dict()["state"].items():
        for key, value in values.items():
            if value is not None:
                tensors[f"optimiser.{index}.{key}"] = value
    numbers = {
        "step": state.step,
        "losses": state.curves.losses,
        "scores": state.curves.scores,
        "best": [state.best.step, state.best.score],
    }
    return encode_safetensors(tensors, {"format": _FORMAT, "state": json.dumps(numbers)})


def decode_state(data: bytes, body: nn.Module, optimiser: torch.optim.Optimizer) -> TrainingState:
    """Load a checkpoint into network and optimiser, and return the remaining state.

    Raises:
        IntegrityError: The bytes are not a checkpoint of this network and optimiser.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])["__metadata__"]
        if header["format"] != _FORMAT:
            raise ValueError(f"format {header['format']!r}, expected {_FORMAT!r}")
        numbers = json.loads(header["state"])
        tensors = safetensors.torch.load(data)
        body.load_state_dict(_with_prefix(tensors, "network."))
        _load_optimiser(optimiser, _with_prefix(tensors, "optimiser."))
        confusion = ConfusionMatrix(len(tensors["confusion"]))
        confusion.counts = tensors["confusion"].numpy().copy()
        state = TrainingState(confusion.classes)
        state.step = int(numbers["step"])
        state.curves = TrainingCurves(
            *([(int(s), float(v)) for s, v in numbers[k]] for k in _CURVE_NAMES)
        )
        # Cloned for alignment: products with an unaligned weight round differently.
        best = {name: value.clone() for name, value in _with_prefix(tensors, "best.").items()}
        state.best = BestCheckpoint(
            int(numbers["best"][0]), float(numbers["best"][1]), best, confusion
        )
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"checkpoint: not of this training: {str(error)[:300]}") from error
    return state


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    states: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = value.clone()
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": states, "param_groups": groups})
