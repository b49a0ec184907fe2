"""The size of the images that are generated for a mask."""

import numpy as np
from PIL import Image

from loraseg.backbones.diffusion import DiffusionBase
from loraseg.errors import ConfigError, DatasetError
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["output_size", "resize_mask", "size_multiple"]


def size_multiple(base: DiffusionBase) -> int:
    """Return the number that image sides must be a multiple of, so that all levels halve evenly."""
    return base.latent_factor * 2 ** (len(base.unet.config.block_out_channels) - 1)


def output_size(
    mask: ndarray, requested: tuple[int, int] | None, multiple: int, where: str
) -> tuple[int, int]:
    """Return the height and width of the images of a mask.

    Args:
        mask: (h, w) uint8 class ids.
        requested: Height and width from the config; None for the size of the mask.
        multiple: See :func:`size_multiple`.
        where: Name of the mask in error messages.

    Raises:
        ConfigError: The requested sides are not multiples of ``multiple``.
        DatasetError: The mask's own sides are not, or it is not a uint8 map.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2 or not mask.size:
        raise DatasetError(
            f"{where}: got {mask.dtype} {mask.shape}, expected uint8 (h, w), not empty"
        )
    height, width = requested or (mask.shape[0], mask.shape[1])
    if height % multiple == 0 and width % multiple == 0:
        return height, width
    near = tuple(max(1, round(side / multiple)) * multiple for side in (height, width))
    if requested is not None:
        raise ConfigError(
            f"size {height} x {width}: expected multiples of {multiple}, such as "
            f"{near[0]} x {near[1]}"
        )
    raise DatasetError(
        f"{where}: {height} x {width} pixels, expected multiples of {multiple} for this generator; "
        f"set a size, such as {near[0]} x {near[1]}, to which the mask is resized (nearest)"
    )


def resize_mask(mask: UInt8[ndarray, "h w"], size: tuple[int, int]) -> UInt8[ndarray, "h2 w2"]:
    """Return the mask at the size of its images (nearest); the same array if it has that size."""
    if mask.shape == size:
        return mask
    height, width = size
    resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized, dtype=np.uint8)
