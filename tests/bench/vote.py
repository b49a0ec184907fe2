"""Relative filtering against the modes of SciPy and PyTorch.

From K label maps and a mask to K filtered labels: majority vote, comparison, ignored pixels. Maps
are 512 x 512 uint8 ids; a quarter of the pixels of each map is random. SciPy and PyTorch have one
tie rule, the smallest id, which is that of the paper; loraseg is timed with both.
"""

import io

import numpy as np
import scipy
import scipy.stats
import torch
from PIL import Image

from loraseg.seeding import numpy_generator
from loraseg.synth.majority_vote import relative_filter
from loraseg.synth.vote import FilterConfig, PseudoLabels, apply_filter
from tests.bench.harness import Times, interleave, ratio, setting, single_thread
from tests.bench.partial_result import PartialResult

SIDE, NOISE, REGION, ROUNDS = 512, 0.25, 32, 25
IGNORE = np.uint8(255)


def run() -> dict[str, object]:
    with single_thread():
        few, many = _measure(5, 21), _measure(16, 21)
        more = {"k5_c150": _measure(5, 150).setting, "k16_c21": many.setting}
        return {
            "bench": "vote",
            "ratios": {
                "speedup_vs_scipy_k5": few.ratios["scipy"],
                "speedup_vs_torch_k5": few.ratios["torch"],
                "speedup_vs_scipy_k16": many.ratios["scipy"],
                "speedup_vs_torch_k16": many.ratios["torch"],
                "mask_first_vs_scipy_k5": few.ratios["scipy_mask_first"],
                "mask_first_vs_torch_k5": few.ratios["torch_mask_first"],
            },
            "checks": {"identical": few.checks["identical"] and many.checks["identical"]},
            "setting": setting(
                few.times,
                scipy=scipy.__version__,
                side=SIDE,
                noise=NOISE,
                **few.setting,
                **more,
            ),
        }


def _measure(voters: int, classes: int) -> PartialResult:
    mask, labels = _maps(voters, classes)
    files = [_png(mask), *map(_png, labels)]
    votes, told = torch.from_numpy(labels), torch.from_numpy(mask)

    def with_scipy() -> np.ndarray:
        prototype = scipy.stats.mode(labels, axis=0).mode
        return np.where(labels == prototype, mask, IGNORE)

    def with_torch() -> np.ndarray:
        prototype = torch.mode(votes, dim=0).values
        return torch.where(votes == prototype, told, int(IGNORE)).numpy()

    def with_files() -> list[bytes]:
        first, *others = map(_ids, files)
        return list(map(_png, relative_filter(first, np.stack(others))))

    judged, config = PseudoLabels(labels=labels), FilterConfig()
    times: Times = interleave(
        {
            "paper": lambda: relative_filter(mask, labels, ties="paper"),
            "mask_first": lambda: relative_filter(mask, labels),
            "mask_first_and_shares": lambda: apply_filter(mask, judged, config, classes),
            "scipy": with_scipy,
            "torch": with_torch,
        },
        rounds=ROUNDS,
    )
    times |= interleave({"mask_first_and_png": with_files}, rounds=3)
    ours = relative_filter(mask, labels, ties="paper")
    same = [bool((ours == other()).all()) for other in (with_scipy, with_torch)]
    ratios = {name: ratio(times, name, "paper") for name in ("scipy", "torch")}
    ratios |= {f"{name}_mask_first": ratio(times, name, "mask_first") for name in tuple(ratios)}
    rates = {name: round(1 / min(seconds), 1) for name, seconds in times.items()}
    return PartialResult(
        ratios,
        {"identical": all(same)},
        times,
        {"voters": voters, "classes": classes, "masks_per_s": rates},
    )


def _maps(voters: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask of square regions, and maps with noise."""
    random = numpy_generator(0, "bench", "vote", voters, classes)
    regions = random.integers(0, classes, size=(SIDE // REGION, SIDE // REGION), dtype=np.uint8)
    mask = regions.repeat(REGION, axis=0).repeat(REGION, axis=1)
    labels = np.repeat(mask[None], voters, axis=0)
    noisy = random.random(labels.shape) < NOISE
    labels[noisy] = random.integers(0, classes, size=int(noisy.sum()), dtype=np.uint8)
    return mask, labels


def _png(ids: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(ids).save(buffer, format="PNG")
    return buffer.getvalue()


def _ids(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))
