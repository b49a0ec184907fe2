"""Choice of K and tau by cross-validation over domains."""

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
    """One point of the grid.

    Attributes:
        k: Number K of nearest adapters.
        temperature: tau in SemLA's weights ``w_i ~ exp(1 / (d_i tau))``.
    """

    k: int
    temperature: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperparameterGrid:
    """The values of K and tau that are combined.

    Raises:
        ConfigError: A list is empty, a K is below 1, or a tau is not positive.
    """

    k: tuple[int, ...] = (1, 2, 3, 5)
    temperature: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.3)

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"grid.k: got {self.k}, expected numbers of at least 1")
        if not self.temperature or min(self.temperature) <= 0:
            raise ConfigError(f"grid.temperature: got {self.temperature}, expected numbers above 0")

    def combinations(self) -> tuple[Hyperparameters, ...]:
        """Return the points of the grid; of equally good ones the first is chosen."""
        return tuple(
            Hyperparameters(k=k, temperature=tau) for k in self.k for tau in self.temperature
        )


def mixing_weight_matrix(
    distances: Float[ndarray, "images adapters"], setting: Hyperparameters
) -> Float[ndarray, "images adapters"]:
    """Return SemLA's mixing weights of every image, zero for adapters that are not retrieved.

    Args:
        distances: Euclidean distances of image embeddings to centroids, >= 0.
        setting: K and tau; a K above the number of adapters retrieves all of them.
    """
    weights = np.zeros(distances.shape, dtype=np.float64)
    for row, image in zip(weights, distances, strict=True):
        nearest = np.argsort(image, kind="stable")[: setting.k]
        row[nearest] = mixing_weights(image[nearest], setting.temperature)
    return weights


def folds_by_family(
    families: Mapping[str, str], *, count: int | None = None, seed: int = 0
) -> dict[str, int]:
    """Split domains into folds so that each family is in one fold.

    The largest families come first, families of equal size in an order drawn from ``seed``; each
    goes to the fold with the fewest domains so far.

    Args:
        families: Family of every domain.
        count: Number of folds, at least 2; None for one fold per family.
        seed: Seed of the order.

    Returns:
        The fold of every domain, in [0, count).

    Raises:
        ConfigError: ``count`` is below 2 or above the number of families.
    """
    members: dict[str, list[str]] = {}
    for domain, family in families.items():
        members.setdefault(family, []).append(domain)
    count = len(members) if count is None else count
    if not 2 <= count <= len(members):
        raise ConfigError(
            f"folds: got {count} for {len(members)} families of domains, expected 2 to the number "
            f"of families (with too few families, set k and temperature instead of a grid)"
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
    """Choose for every domain the setting with the largest h-mean over the other folds.

    Args:
        scores: mIoU in [0, 1] of every setting, by domain.
        folds: Fold of every domain; at least two folds.
        settings: The settings, in the order of the scores; the first of equally good ones wins.
    """
    chosen: dict[int, Hyperparameters] = {}
    for fold in set(folds.values()):
        others = [scores[domain] for domain in sorted(scores) if folds[domain] != fold]
        means = [hmean([row[index] for row in others]) for index in range(len(settings))]
        chosen[fold] = settings[int(np.argmax(means))]
    return {domain: chosen[folds[domain]] for domain in scores}
