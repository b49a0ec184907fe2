"""Acceptance checks of the miniature CLIP on scenes outside its training."""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from loraseg.miniature.models.clip.model import encode_dense, encode_text, normalise
from loraseg.miniature.world.canvas import CLASSES
from loraseg.miniature.world.captions import PROMPT, tokenizer
from loraseg.miniature.world.domains import DOMAINS, FAMILIES, LABELLED_DOMAINS
from loraseg.miniature.world.render import presence, render

__all__ = ["auc", "clip_report"]

_BATCH = 50


def auc(scores: ndarray, positive: ndarray) -> float:
    """Return the area under the ROC curve; ties count half.

    Args:
        scores: (n,) scores.
        positive: (n,) booleans.

    Returns:
        The probability that a positive scores higher than a negative; nan without both.
    """
    high, low = scores[positive], np.sort(scores[~positive])
    if not len(high) or not len(low):
        return float("nan")
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / 2 / len(low))


@torch.inference_mode()
def clip_report(model: nn.Module, *, seed: int = 0, scenes: int = 120) -> dict[str, Any]:
    """Measure the AUC of class presence and the accuracy of domain centroids.

    Half of the scenes of a domain determine its centroid (mean of embeddings that are not
    normalised); the others are assigned to the nearest centroid. All scenes are drawn with the key
    "gates", which no training uses. The keys of the result are those of the model card.
    """
    words = tokenizer()
    classes = _unit(encode_text(model, words([PROMPT.format(name) for name in CLASSES])))
    whole, dense, present = [], [], []
    for domain in DOMAINS:
        images, masks = render(domain, scenes, seed, "gates")
        batches = [_embed(model, images[i : i + _BATCH], classes) for i in range(0, scenes, _BATCH)]
        whole.append(torch.cat([embedding for embedding, _ in batches]).numpy())
        dense.append(torch.cat([scores for _, scores in batches]).numpy())
        present.append(presence(masks))
    labelled = [list(DOMAINS).index(name) for name in LABELLED_DOMAINS]
    scores, truth = np.stack(dense), np.stack(present)
    everywhere = _auc_by_class(scores, truth)
    near = _auc_by_class(scores[labelled], truth[labelled])
    return {
        "dense_presence_auc": everywhere,
        "dense_presence_auc_min": min(everywhere.values()),
        "dense_presence_auc_labelled_domains": near,
        "dense_presence_auc_labelled_domains_min": min(near.values()),
        "global_presence_auc": _auc_by_class(
            np.stack([_cosines(w, classes.numpy()) for w in whole]), truth
        ),
        **_centroid_metrics(np.stack(whole)),
        "setting": {"seed": seed, "scenes_per_domain": scenes, "domains": len(DOMAINS)},
    }


def _embed(model: nn.Module, images: ndarray, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n, d) embeddings and the (n, c) largest cosine of any patch with each class."""
    whole, dense = encode_dense(model, normalise(torch.from_numpy(images)))
    return whole, (_unit(dense) @ classes.T).amax(1)


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors, dim=-1)


def _cosines(vectors: ndarray, classes: ndarray) -> ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) @ classes.T


def _auc_by_class(scores: ndarray, present: ndarray) -> dict[str, float]:
    """Return the AUC of each class over the pooled scenes of (domains, scenes, c) arrays."""
    scores, present = scores.reshape(-1, len(CLASSES)), present.reshape(-1, len(CLASSES))
    return {
        name: round(auc(scores[:, label], present[:, label]), 4)
        for label, name in enumerate(CLASSES)
    }


def _centroid_metrics(whole: ndarray) -> dict[str, Any]:
    """Return the figures of the centroids of (domains, scenes, d) embeddings."""
    half, names = whole.shape[1] // 2, list(DOMAINS)
    centroids, tests = whole[:, :half].mean(1), whole[:, half:]
    distances = np.linalg.norm(tests[:, :, None] - centroids, axis=-1)
    hits = distances.argmin(-1) == np.arange(len(names))[:, None]
    between = np.linalg.norm(centroids[:, None] - centroids, axis=-1)
    np.fill_diagonal(between, np.inf)
    nearest = {name: names[between[row].argmin()] for row, name in enumerate(names)}
    with_family = [name for name in names if len(FAMILIES[DOMAINS[name].family]) > 1]
    related = [nearest[name] in FAMILIES[DOMAINS[name].family] for name in with_family]
    return {
        "domain_centroid_accuracy": round(float(hits.mean()), 4),
        "domain_centroid_accuracy_by_domain": {
            name: round(float(hits[row].mean()), 3) for row, name in enumerate(names)
        },
        "nearest_domain": nearest,
        "twin_is_nearest": round(float(np.mean(related)), 3),
    }
