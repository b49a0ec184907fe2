"""The fidelity report: all figures of a synthetic dataset compared with real images."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from loraseg.backbones.clip import ClipEncoder
from loraseg.data.datasets import Dataset, digest_samples
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import DatasetError
from loraseg.evaluate.fidelity import measures
from loraseg.evaluate.fidelity.embeddings import (
    EmbeddedImages,
    embed_images,
    embed_pairs,
    view_encoder_id,
)
from loraseg.tensor_types import ndarray

__all__ = [
    "NEIGHBOURS",
    "FidelityMetric",
    "FidelityReport",
    "NearDuplicate",
    "compare_embeddings",
    "measure_fidelity",
]

logger = logging.getLogger(__name__)

NEIGHBOURS = 5
_MAX_NEAR_DUPLICATES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityMetric:
    """A figure with its inputs; comparable only between equal encoders.

    Attributes:
        value: The figure; None if it is undefined, for example without two images of one mask.
        encoder: Identifier of weights and preprocessing.
        real: Number of real images in the figure.
        synthetic: Number of synthetic images in the figure.
        settings: Constants of the definition.
    """

    value: float | None
    encoder: str
    real: int
    synthetic: int
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """A synthetic image that may be a copy of a real one, and their distance."""

    pair_id: str
    real: str
    distance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityReport:
    """All figures; equal inputs give equal JSON on one kind of processor.

    Attributes:
        encoder: The encoder as named by the user.
        real: Split and digest of the real images.
        synthetic: Generation and settings digest of the synthetic dataset.
        figures: By name: ``cmmd`` and ``cmmd_no_crop`` (x 1000, 0 is best); ``fid`` (0 is best);
            ``coverage_of_real``, Cov(R;S), and ``coverage_of_synthetic``, Cov(S;R) (1 is best);
            ``clip_score`` (100 cos of image and prompt); ``nearest_real``, the median distance of
            a synthetic image to the nearest real one; ``copies``, the share of synthetic images
            whose distance is at most ``copy_limit``; ``sibling_distance``, mean of 1 - cos between
            images of one mask, and ``real_distance``, the same between real images.
        suspects: The synthetic images counted in ``copies``, nearest first, at most 20.
    """

    encoder: str
    real: Mapping[str, Any]
    synthetic: Mapping[str, Any]
    figures: Mapping[str, FidelityMetric]
    suspects: tuple[NearDuplicate, ...]

    def to_json(self) -> str:
        """Return indented JSON with sorted keys."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"


def measure_fidelity(
    dataset: ShardDataset, real: Dataset, split: str, encoder: ClipEncoder
) -> FidelityReport:
    """Compare the kept pairs of a synthetic dataset with a split of real images.

    Images are read in batches; two embeddings per image stay in memory.

    Args:
        dataset: The synthetic dataset; its rows with status ``ok`` are compared.
        real: The real images; their masks are not read. ``copies`` is meaningful only for the
            images on which the generator was trained.
        split: Split of the real images.
        encoder: Encoder as returned by :func:`~loraseg.backbones.clip.load_clip`.

    Raises:
        DatasetError: A side has fewer than six images, or an image cannot be read.
        IntegrityError: A shard does not match the manifest.
        StoreError: The store cannot be read.
        StageError: An embedding is not finite.
    """
    start = time.monotonic()
    samples = real.samples(split)
    _check_counts(real=len(samples), synthetic=len(dataset))
    real_images = embed_images(
        encoder, ((sample.id, real.load_image(sample)) for sample in samples)
    )
    synthetic_images = embed_pairs(encoder, dataset)
    figures, suspects = compare_embeddings(real_images, synthetic_images, encoder)
    logger.info(
        "%d real and %d synthetic images compared in %.1f s",
        len(real_images.names),
        len(synthetic_images.names),
        time.monotonic() - start,
    )
    manifest = dataset.manifest
    return FidelityReport(
        encoder=encoder.name,
        real={"split": split, "digest": digest_samples(real, samples)},
        synthetic={"generation": manifest.generation, "dataset_sha256": manifest.dataset_sha256},
        figures=figures,
        suspects=suspects,
    )


def compare_embeddings(
    real: EmbeddedImages, synthetic: EmbeddedImages, encoder: ClipEncoder
) -> tuple[dict[str, FidelityMetric], tuple[NearDuplicate, ...]]:
    """Compute all figures from embeddings; see :class:`FidelityReport`.

    Raises:
        DatasetError: A side has fewer than six images.
    """
    counts = {"real": len(real.names), "synthetic": len(synthetic.names)}
    _check_counts(**counts)
    crop, no_crop = view_encoder_id(encoder, "crop"), view_encoder_id(encoder, "whole")
    kernel = {"sigma": measures.CMMD_SIGMA, "scale": measures.CMMD_SCALE}
    first, second = real.cropped, synthetic.cropped
    near, suspects = _neighbour_metrics(first, second, synthetic.names, real.names)
    shared: dict[str, tuple[float, dict[str, float]]] = {
        "cmmd": (measures.cmmd(first, second), kernel),
        "fid": (measures.frechet_distance(first, second), {}),
        **near,
    }
    figures = {
        name: FidelityMetric(value=value, encoder=crop, settings=settings, **counts)
        for name, (value, settings) in shared.items()
    }
    figures["cmmd_no_crop"] = FidelityMetric(
        value=measures.cmmd(real.whole, synthetic.whole),
        encoder=no_crop,
        settings=kernel,
        **counts,
    )
    figures["clip_score"] = _clip_score(synthetic, crop)
    figures |= _diversity_metrics(real, synthetic, crop)
    return figures, suspects


def _check_counts(*, real: int, synthetic: int) -> None:
    if min(real, synthetic) <= NEIGHBOURS:
        raise DatasetError(
            f"fidelity: got {real} real and {synthetic} synthetic images, expected at least "
            f"{NEIGHBOURS + 1} of each"
        )


def _neighbour_metrics(
    real: ndarray, synthetic: ndarray, pair_ids: Sequence[str], sample_ids: Sequence[str]
) -> tuple[dict[str, tuple[float, dict[str, float]]], tuple[NearDuplicate, ...]]:
    """Return the figures of nearest neighbours with their settings, and the near duplicates."""
    own_real = measures.knn_distances(real, NEIGHBOURS)
    own_synthetic = measures.knn_distances(synthetic, NEIGHBOURS)
    _, to_synthetic = measures.nearest_neighbours(real, synthetic)
    rows, to_real = measures.nearest_neighbours(synthetic, real)
    limit = measures.near_duplicate_threshold(own_real[:, 0])
    copies = np.flatnonzero(to_real <= limit)
    nearest_first = copies[np.argsort(to_real[copies], kind="stable")]
    suspects = tuple(
        NearDuplicate(pair_ids[row], sample_ids[int(rows[row])], float(to_real[row]))
        for row in map(int, nearest_first[:_MAX_NEAR_DUPLICATES])
    )
    k = {"k": float(NEIGHBOURS)}
    return {
        "coverage_of_real": (measures.coverage(own_real[:, -1], to_synthetic), k),
        "coverage_of_synthetic": (measures.coverage(own_synthetic[:, -1], to_real), k),
        "nearest_real": (float(np.median(to_real)), {}),
        "copies": (copies.size / to_real.size, {"copy_limit": limit}),
    }, suspects


def _clip_score(synthetic: EmbeddedImages, view: str) -> FidelityMetric:
    if synthetic.prompts is None:
        return FidelityMetric(value=None, encoder=view, real=0, synthetic=0)
    rows, prompts = synthetic.prompts
    cosines = np.einsum("nd,nd->n", synthetic.cropped[rows], prompts)
    value = 100 * float(cosines.mean())
    return FidelityMetric(
        value=value, encoder=view, real=0, synthetic=len(rows), settings={"scale": 100.0}
    )


def _diversity_metrics(
    real: EmbeddedImages, synthetic: EmbeddedImages, view: str
) -> dict[str, FidelityMetric]:
    distance, masks, images = measures.within_mask_distance(synthetic.cropped, synthetic.masks)
    return {
        "sibling_distance": FidelityMetric(
            value=distance,
            encoder=view,
            real=0,
            synthetic=images,
            settings={"masks": float(masks)},
        ),
        "real_distance": FidelityMetric(
            value=measures.mean_pairwise_distance(real.cropped),
            encoder=view,
            real=len(real.names),
            synthetic=0,
        ),
    }
