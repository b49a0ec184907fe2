"""Whether to merge a mix into a layer's weight or to add its low-rank product to the output.

For a layer and a mix of R rows, merging costs R d_in d_out multiplications once and the low-rank
product R (d_in + d_out) per token. The costs are equal at T* = d_in d_out / (d_in + d_out) tokens,
independent of R. Devices deviate from T* by a factor, which ``loraseg doctor --measure-merging``
measures and stores in the user's cache folder. It is never measured implicitly: the two forms
differ in their last bits, and results must not depend on the load of a machine.
"""

import json
import logging
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loraseg.adapters.packed import WeightShape
from loraseg.cache_dir import cache_dir
from loraseg.errors import IntegrityError
from loraseg.tensor_types import Tensor

__all__ = ["MergeTable", "load_table", "measure_table", "save_table", "table_file"]

logger = logging.getLogger(__name__)

# Multiples of T*. On the CPU the low-rank form gains from one large product for all images
# (float32: measured on a whole ViT-B/16 tower at 577 tokens), and each new bfloat16 weight must be
# repacked for the fast kernel (single layers: merging lost at 577 tokens and won at 2885).
_FACTORS = {("cpu", torch.float32): 2.0, ("cpu", torch.bfloat16): 3.0}
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class MergeTable:
    """The number of tokens per mix above which merging is the faster form.

    Attributes:
        factor: Multiple of T* used for shapes that were not measured.
        measured: Measured crossover in tokens, by weight shape (d_out, d_in).
    """

    factor: float = 1.0
    measured: Mapping[WeightShape, float] = field(default_factory=dict)

    def should_merge(self, shape: WeightShape, tokens: int) -> bool:
        """Return whether to merge a mix into a weight (d_out, d_in) that sees ``tokens`` tokens."""
        crossover = self.measured.get(shape)
        if crossover is None:
            crossover = self.factor * _crossover_tokens(shape)
        return tokens > crossover


def load_table(device: torch.device, dtype: torch.dtype) -> MergeTable:
    """Return the table measured on this device, or the default of its kind.

    Raises:
        IntegrityError: The stored table cannot be parsed.
    """
    factor = _FACTORS.get((device.type, dtype), 1.0)
    path = table_file(device, dtype)
    try:
        rows = json.loads(path.read_text())
        measured = {(int(o), int(i)): float(tokens) for o, i, tokens in rows}
    except FileNotFoundError:
        return MergeTable(factor)
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"{path}: not a merge table ({error}); delete it, or measure again"
        ) from error
    return MergeTable(factor, measured)


def save_table(table: MergeTable, device: torch.device, dtype: torch.dtype) -> Path:
    """Store a measured table for this device; later processes load it. Return its path."""
    path = table_file(device, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[*shape, tokens] for shape, tokens in sorted(table.measured.items())]
    path.write_text(json.dumps(rows))
    return path


def table_file(device: torch.device, dtype: torch.dtype) -> Path:
    """Return the path of the table for a device, dtype and number of threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}-{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}"
    plain = re.sub(r"[^A-Za-z0-9]+", "-", f"{name}-{dtype}".removeprefix("torch."))
    return cache_dir("merging") / f"{plain}.json"


def measure_table(
    shapes: Sequence[WeightShape], device: torch.device, dtype: torch.dtype, *, rank: int = 40
) -> MergeTable:
    """Measure by bisection, for each shape, the number of tokens above which merging is faster.

    Args:
        shapes: (d_out, d_in) of the layers that adapters change; takes about a second each.
        device: Device to measure on.
        dtype: Dtype of weights and inputs.
        rank: Rows of the mix, K r.
    """
    factor = _FACTORS.get((device.type, dtype), 1.0)
    measured = {
        shape: _measure_crossover(shape, device, dtype, rank) for shape in sorted(set(shapes))
    }
    for shape, tokens in measured.items():
        logger.info(
            "%s: merged above %.0f tokens (T* %.0f)", shape, tokens, _crossover_tokens(shape)
        )
    return MergeTable(factor, measured)


def _crossover_tokens(shape: WeightShape) -> float:
    """Return T*, the number of tokens at which both forms need equally many multiplications."""
    return shape[0] * shape[1] / (shape[0] + shape[1])


def _measure_crossover(
    shape: WeightShape, device: torch.device, dtype: torch.dtype, rank: int
) -> float:
    low, high = _crossover_tokens(shape) / 8, _crossover_tokens(shape) * 32
    for _ in range(6):
        middle = (low * high) ** 0.5
        if _merging_is_faster(shape, int(middle) + 1, device, dtype, rank):
            high = middle
        else:
            low = middle
    return round((low * high) ** 0.5, 1)


def _merging_is_faster(
    shape: WeightShape, tokens: int, device: torch.device, dtype: torch.dtype, rank: int
) -> bool:
    d_out, d_in = shape

    def ones(*size: int) -> Tensor:
        return torch.ones(size, device=device, dtype=dtype)

    weight, scratch, down, up = ones(*shape), ones(*shape), ones(rank, d_in), ones(rank, d_out)
    x, out = ones(tokens, d_in), ones(tokens, d_out)

    def merged() -> None:
        torch.addmm(weight, up.t(), down, out=scratch)
        torch.mm(x, scratch.t(), out=out)

    def low_rank() -> None:
        torch.mm(x, weight.t(), out=out)
        out.addmm_(x @ down.t(), up)

    with torch.no_grad():
        return _median_seconds(merged, device) < _median_seconds(low_rank, device)


def _median_seconds(action: Callable[[], None], device: torch.device) -> float:
    times: list[float] = []
    for _ in range(_ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
