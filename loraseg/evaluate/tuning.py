"""Choose K and tau on other domains than those that they are used for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loraseg import seeding
from loraseg.errors import ConfigError
from loraseg.fuse.weights import mixing_weights
from loraseg.segment.metrics import hmean
from loraseg.tensor_types import Float, ndarray

__all__ = [
    "HyperparameterGrid",
    "Hyperparameters",
    "folds_by_family",
    "mixing_weight_matrix",
    "select_hyperparameters",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """One point of the grid: K nearest adapters, temperature tau (methods B.4)."""

    k: int
    temperature: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperparameterGrid:
    """All combinations of K and tau that are tried."""

    k: tuple[int, ...] = (1, 2, 3, 5)
    temperature: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.3)

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"grid.k: got {self.k}, expected numbers of at least 1")
        if not self.temperature or min(self.temperature) <= 0:
            raise ConfigError(f"grid.temperature: got {self.temperature}, expected numbers above 0")

    def combinations(self) -> tuple[Hyperparameters, ...]:
        """Return the points in the order in which ties between them are settled."""
        return tuple(
            Hyperparameters(k=k, temperature=tau) for k in self.k for tau in self.temperature
        )


def mixing_weight_matrix(
    distances: Float[ndarray, "images adapters"], setting: Hyperparameters
) -> Float[ndarray, "images adapters"]:
    """Return every image's weights over all adapters, zero for those not retrieved.

    The distances are measured once; any number of settings is then a matter of microseconds.

    Args:
        distances: Euclidean distances of image embeddings to adapters, >= 0.
        setting: K and tau; a K above the number of adapters takes all of them.
    """
    weights = np.zeros(distances.shape, dtype=np.float64)
    for row, image in zip(weights, distances, strict=True):
        nearest = np.argsort(image, kind="stable")[: setting.k]
        row[nearest] = mixing_weights(image[nearest], setting.temperature)
    return weights


def folds_by_family(
    families: Mapping[str, str], *, count: int | None = None, seed: int = 0
) -> dict[str, int]:
    """Split domains into folds so that no family is in two of them.

    Families go, in an order drawn from the seed, to the fold with the fewest domains so far.

    Args:
        families: Family of every domain.
        count: Number of folds, at least 2; None for one a family.
        seed: For the order of the families.

    Returns:
        The fold of every domain, in [0, count).

    Raises:
        ConfigError: There are fewer families than folds, so some choice would see its own fold.
    """
    members: dict[str, list[str]] = {}
    for domain, family in families.items():
        members.setdefault(family, []).append(domain)
    count = len(members) if count is None else count
    if not 2 <= count <= len(members):
        raise ConfigError(
            f"folds: got {count} for {len(members)} families of domains, expected 2 to the number "
            f"of families (name k and temperature instead of a grid if there are too few)"
        )
    names = sorted(members)
    seeding.numpy_generator(seed, "folds").shuffle(names)
    names.sort(key=lambda family: -len(members[family]))
    sizes = [0] * count
    folds: dict[str, int] = {}
    for family in names:
        fold = sizes.index(min(sizes))
        sizes[fold] += len(members[family])
        folds.update(dict.fromkeys(members[family], fold))
    return {domain: folds[domain] for domain in families}


def select_hyperparameters(
    scores: Mapping[str, Sequence[float]],
    folds: Mapping[str, int],
    settings: Sequence[Hyperparameters],
) -> dict[str, Hyperparameters]:
    """Choose for every domain the setting with the best h-mean over the OTHER folds.

    Args:
        scores: mIoU in [0, 1] of every setting for every domain.
        folds: Fold of every domain; at least two folds.
        settings: What the scores belong to; the first of equal ones wins.
    """
    chosen: dict[int, Hyperparameters] = {}
    for fold in set(folds.values()):
        others = [scores[domain] for domain in sorted(scores) if folds[domain] != fold]
        means = [hmean([row[index] for row in others]) for index in range(len(settings))]
        chosen[fold] = settings[int(np.argmax(means))]
    return {domain: chosen[folds[domain]] for domain in scores}
