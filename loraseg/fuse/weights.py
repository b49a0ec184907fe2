"""Mixing weights from distances: SemLA's softmax of inverse distances."""

import math
from collections.abc import Sequence

import numpy as np

from loraseg.errors import ConfigError, StageError
from loraseg.tensor_types import Float, ndarray

__all__ = ["mixing_weights"]


def mixing_weights(
    distances: Sequence[float] | ndarray, temperature: float
) -> Float[ndarray, " k"]:
    """Return the weights ``w_i = exp(1/(d_i tau)) / sum_j exp(1/(d_j tau))`` of k adapters.

    SemLA (arXiv 2503.21780), distance-based adapter weighting: d_i is the Euclidean distance of
    the image's embedding to the centroid of adapter i, tau the temperature. In its code:
    ``domain_orchestrator/domain_orchestrator.py``, ``softmax`` of the similarities 1 / d_i.

    Differences from that code: the largest exponent is subtracted first, so the result is finite
    where the plain formula overflows (d below about 0.028 at tau = 0.05); distances of
    0, or so small that 1/(d tau) exceeds float64, share the whole weight equally; tau = 0 is an
    error instead of 1e-6.

    Args:
        distances: (k,) Euclidean distances, >= 0 and finite; any order.
        temperature: tau > 0. Small values favour the nearest adapter.

    Returns:
        (k,) float64 in [0, 1] with sum 1; empty for k = 0.

    Raises:
        ConfigError: The temperature is not a positive finite number.
        StageError: A distance is negative, infinite or NaN, or ``distances`` is not a vector.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature: got {temperature}, expected a finite number above 0")
    values = _validated(distances)
    if values.size == 0:
        return values
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scores = 1.0 / (values * temperature)
    exact_matches = np.isinf(scores)
    if exact_matches.any():
        return exact_matches / exact_matches.sum()
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _validated(distances: Sequence[float] | ndarray) -> Float[ndarray, " k"]:
    values = np.asarray(distances, dtype=np.float64)
    if values.ndim != 1:
        raise StageError(f"distances: got shape {values.shape}, expected one vector (k,)")
    invalid = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if invalid.size:
        raise StageError(
            f"distance {invalid[0]}: got {values[invalid[0]]}, expected a finite number of at "
            f"least 0"
        )
    return values
