"""How large the images of a mask become."""

import numpy as np
from PIL import Image

from loraseg.backbones.diffusion import DiffusionBase
from loraseg.errors import ConfigError, DatasetError
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["output_size", "resize_mask", "size_multiple"]


def size_multiple(base: DiffusionBase) -> int:
    """Return what the sides of images must be multiples of, so that every level halves evenly."""
    return base.latent_factor * 2 ** (len(base.unet.config.block_out_channels) - 1)


def output_size(
    mask: ndarray, requested: tuple[int, int] | None, multiple: int, where: str
) -> tuple[int, int]:
    """Return the height and width of the images of a mask.

    Args:
        mask: Class ids.
        requested: What the config asks for; None for the size of the mask.
        multiple: See :func:`side_step`.
        where: What to call the mask in errors.

    Raises:
        ConfigError: The wanted size is no multiple of the step.
        DatasetError: The mask's own size is not, or it is no map of uint8.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2 or not mask.size:
        raise DatasetError(
            f"{where}: got {mask.dtype} {mask.shape}, expected uint8 (h, w), not empty"
        )
    height, width = requested or (mask.shape[0], mask.shape[1])
    if height % multiple == 0 and width % multiple == 0:
        return height, width
    near = tuple(max(1, round(side / multiple)) * multiple for side in (height, width))
    asked = f"{height} x {width}"
    if requested is not None:
        raise ConfigError(
            f"size {asked}: expected multiples of {multiple}, such as {near[0]} x {near[1]}"
        )
    raise DatasetError(
        f"{where}: {asked} pixels, expected multiples of {multiple} for this generator; give a "
        f"size, "
        f"such as {near[0]} x {near[1]}, and the mask is resized to it (nearest)"
    )


def resize_mask(mask: UInt8[ndarray, "h w"], size: tuple[int, int]) -> UInt8[ndarray, "h2 w2"]:
    """Return the mask at the size of its images, nearest; itself if it has that size."""
    if mask.shape == size:
        return mask
    height, width = size
    resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized, dtype=np.uint8)
