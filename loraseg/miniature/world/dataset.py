"""Domains of the world as dataset folders."""

from collections.abc import Sequence
from pathlib import Path

from numpy import ndarray
from PIL import Image

from loraseg.data import LabelSpace, write_classes, write_mask
from loraseg.errors import ConfigError
from loraseg.miniature.world.captions import LABEL_NAMES
from loraseg.miniature.world.render import render

__all__ = ["write_dataset", "write_world"]


def write_dataset(domain: str, folder: Path, *, train: int, val: int, seed: int = 0) -> Path:
    """Write one domain as ``images/<split>/``, ``masks/<split>/`` and ``classes.json``.

    The class names are ``LABEL_NAMES``, the ids are those of :func:`render`.

    The splits are separate random streams: a larger ``train`` keeps its first scenes and shares
    none with ``val``.

    Args:
        domain: A key of ``DOMAINS``.
        folder: Folder of the dataset; created if needed.
        train: Number of scenes in the split "train".
        val: Number of scenes in the split "val".
        seed: Seed of the scenes.

    Returns:
        The folder.

    Raises:
        ConfigError: The domain is unknown, or a count is negative.
    """
    space = LabelSpace(LABEL_NAMES)
    for split, count in (("train", train), ("val", val)):
        images, masks = render(domain, count, seed, split)
        _write_split(folder, split, (images, masks), space)
    write_classes(folder / "classes.json", space)
    return folder


def write_world(
    folder: Path, domains: Sequence[str], *, train: int, val: int, seed: int = 0
) -> dict[str, Path]:
    """Write several domains, each to ``folder/<domain>``, and return their folders by name.

    Raises:
        ConfigError: As in :func:`write_dataset`, or ``domains`` has duplicates.
    """
    if len(set(domains)) != len(domains):
        raise ConfigError(f"domains {', '.join(domains)}: one is named twice")
    return {
        domain: write_dataset(domain, folder / domain, train=train, val=val, seed=seed)
        for domain in domains
    }


def _write_split(
    folder: Path, split: str, scenes: tuple[ndarray, ndarray], space: LabelSpace
) -> None:
    image_folder, mask_folder = folder / "images" / split, folder / "masks" / split
    image_folder.mkdir(parents=True, exist_ok=True)
    mask_folder.mkdir(parents=True, exist_ok=True)
    for number, (image, mask) in enumerate(zip(*scenes, strict=True)):
        Image.fromarray(image).save(image_folder / f"{number:04d}.png")
        write_mask(mask_folder / f"{number:04d}.png", mask, space)
