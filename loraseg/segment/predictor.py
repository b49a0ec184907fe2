"""From images and class names to score maps, plain or by sliding windows (methods A.2 and A.7)."""

from collections import OrderedDict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from loraseg.adapters.adapter import Adapter, Mix
from loraseg.adapters.inject import AdapterSlots
from loraseg.errors import ConfigError, DatasetError
from loraseg.segment.base import SegmentationBase, check_classes
from loraseg.segment.tiling import Tiling
from loraseg.tensor_types import Float, ndarray

__all__ = ["Predictor"]

_BANKS = 256


class Predictor:
    """Scores every pixel of images for every class of a list. One thread at a time.

    The base's weights must not change while a predictor is in use: text features are kept, for
    the 256 latest pairs of class list and adapter mix.
    """

    def __init__(
        self,
        base: SegmentationBase,
        *,
        mode: Literal["plain", "sliding"] = "plain",
        text_cache: Literal["per_adapter", "first_image"] = "per_adapter",
        windows_per_batch: int = 64,
    ) -> None:
        """Prepare for one base.

        Args:
            base: Model and everything it goes with.
            mode: "plain" sees the image once; "sliding" four windows and the whole, which all
                published numbers use.
            text_cache: "per_adapter" encodes the class names with each mix. "first_image" keeps,
                for a class list, those of the first mix that it was used with: the published
                numbers were made so (methods B.5).
            windows_per_batch: Windows, of all images together, in one forward pass.

        Raises:
            ConfigError: A choice is unknown or a number below 1.
        """
        if mode not in ("plain", "sliding") or text_cache not in ("per_adapter", "first_image"):
            raise ConfigError(
                f"mode {mode!r}, text_cache {text_cache!r}: expected 'plain' or 'sliding', and "
                f"'per_adapter' or 'first_image'"
            )
        if windows_per_batch < 1:
            raise ConfigError(f"windows_per_batch: got {windows_per_batch}, expected at least 1")
        self.base = base
        self.mode = mode
        self.text_cache = text_cache
        self.windows_per_batch = windows_per_batch
        self._slots = AdapterSlots(base.model)
        self._tokens: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self._banks: OrderedDict[tuple[tuple[str, ...], str | None], Tensor] = OrderedDict()

    @torch.no_grad()
    def predict(
        self,
        images: Sequence[ndarray],
        classes: Sequence[str],
        mix: Mix | Adapter | None = None,
    ) -> list[Float[Tensor, "t _ _"]]:
        """Return sigmoid scores in [0, 1] at each image's own size, on the CPU.

        Args:
            images: RGB, uint8 (h, w, 3); sizes may differ.
            classes: Distinct names; of "car, automobile" only the first synonym is used.
            mix: The adapters in use for all these images; None for the bare base.

        Raises:
            ConfigError: No class is named, one is blank, or one twice.
            DatasetError: An image is not of that kind.
            AdapterMismatchError: The mix does not fit the model.
        """
        check_classes(classes)
        for index, image in enumerate(images):
            _check_image(index, image)
        if not images:
            return []
        with self._slots.use(mix), _evaluating(self.base.model):
            text = self._text(tuple(classes), None if mix is None else mix.digest)
            pixels = [torch.from_numpy(_planes(image)).to(self.base.device) for image in images]
            if self.mode == "sliding":
                return self._sliding(pixels, text)
            return self._plain(pixels, text)

    def _text(self, classes: tuple[str, ...], digest: str | None) -> Float[Tensor, "t p d"]:
        """Return the text bank; called with the mix in use."""
        key = (classes, digest if self.text_cache == "per_adapter" else None)
        bank = self._banks.get(key)
        if bank is None:
            tokens = self._tokens.get(classes)
            if tokens is None:
                tokens = _keep(self._tokens, classes, self.base.tokenize(classes))
            bank = _keep(self._banks, key, self.base.encode_tokens(tokens))
        self._banks.move_to_end(key)
        return bank

    def _plain(self, images: list[Tensor], text: Tensor) -> list[Tensor]:
        padded = [_pad(self.base.normalise(image), self.base.pad_multiple) for image in images]
        maps = self._logits(padded, text).sigmoid_()
        results: list[Tensor] = []
        for image, scores in zip(images, maps, strict=True):
            height, width = image.shape[1:]
            # The official code cuts the map, not the padding: it only acts on very small images.
            shown = scores[:, :height, :width] if self.base.pad_multiple > 1 else scores
            results.append(_resize(shown, (height, width)).cpu())
        return results

    def _sliding(self, images: list[Tensor], text: Tensor) -> list[Tensor]:
        tiling = Tiling(self.base.window)
        windows: list[Tensor] = []
        for image in images:
            canvas = _resize(image, (tiling.canvas, tiling.canvas))
            windows += tiling.cut(canvas)
            windows.append(_resize(image, (tiling.window, tiling.window)))
        maps = self._logits([self.base.normalise(window) for window in windows], text)
        results: list[Tensor] = []
        for image, logits in zip(images, maps.split(len(tiling.corners) + 1), strict=True):
            *parts, whole = _resize(logits, (tiling.window, tiling.window)).sigmoid_()
            both = tiling.average(parts).add_(_resize(whole, (tiling.canvas, tiling.canvas)))
            results.append(_resize(both.div_(2), tuple(image.shape[1:])).cpu())
        return results

    def _logits(self, windows: list[Tensor], text: Tensor) -> Float[Tensor, "n t s s"]:
        """Run all windows through the model, each resized to CLIP's input."""
        side = self.base.model.config.image_size
        rows = [_resize(window, (side, side)) for window in windows]
        batches = [
            torch.stack(rows[start : start + self.windows_per_batch])
            for start in range(0, len(rows), self.windows_per_batch)
        ]
        return torch.cat([self.base.model(batch, text) for batch in batches])


def _keep(cache: OrderedDict[Any, Tensor], key: Any, value: Tensor) -> Tensor:
    cache[key] = value
    if len(cache) > _BANKS:
        cache.popitem(last=False)
    return value


def _resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize maps (c, h, w) or (n, c, h, w), bilinear, align_corners False, no smoothing."""
    if tuple(x.shape[-2:]) == size:
        return x
    batch = x if x.dim() == 4 else x[None]
    resized = nn.functional.interpolate(batch, size, mode="bilinear", align_corners=False)
    return resized if x.dim() == 4 else resized[0]


def _pad(image: Tensor, multiple: int) -> Tensor:
    """Pad right and below with 0 to multiples; after normalisation, so 0 is the mean colour."""
    height, width = image.shape[1:]
    return nn.functional.pad(image, (0, -width % multiple, 0, -height % multiple))


def _planes(image: ndarray) -> ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)


def _check_image(index: int, image: ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DatasetError(
            f"image {index}: got {image.dtype} {image.shape}, expected uint8 RGB (h, w, 3)"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Pool as in evaluation, whatever the model was doing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
