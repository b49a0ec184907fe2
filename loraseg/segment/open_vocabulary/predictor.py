"""Prediction of score maps from images and class names, plain or with sliding windows.

Official code: ``cat_seg/cat_seg_model.py``, ``CATSeg.forward`` and ``inference_sliding_window``.
"""

from collections import OrderedDict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from loraseg.errors import AdapterMismatchError, ConfigError, DatasetError
from loraseg.fuse.bank import AdapterBank
from loraseg.fuse.mix import Mix
from loraseg.segment.open_vocabulary.base import check_classes
from loraseg.segment.open_vocabulary.protocol import OpenVocabularyBase
from loraseg.segment.open_vocabulary.sliding_window import SlidingWindowGrid
from loraseg.tensor_types import Float, ndarray

__all__ = ["Predictor"]

PredictionMode = Literal["plain", "sliding"]
TextCache = Literal["per_adapter", "first_image"]

_MAX_CACHED_TEXTS = 256
# More mixes per batch cost more buffer memory than they save time: merged weights are per mix.
_MIXES_PER_BATCH = 8


class Predictor:
    """Scores every pixel of images for every class of a list. Not thread-safe.

    The weights of the base must not change while a predictor is in use, because text features are
    cached for the 256 latest pairs of class list and mix.
    """

    def __init__(
        self,
        base: OpenVocabularyBase,
        *,
        mode: PredictionMode = "plain",
        text_cache: TextCache = "per_adapter",
        windows_per_batch: int = 64,
    ) -> None:
        """Create a predictor for one base.

        Args:
            base: The base.
            mode: "plain" runs the model on the image; "sliding" on four windows and the image, as
                in the published results of CAT-Seg and SemLA.
            text_cache: "per_adapter" encodes the class names with each mix. "first_image" keeps
                the text features of the first mix used with a class list, as SemLA's published
                results do: its predictor caches them in evaluation mode and never clears them.
            windows_per_batch: Windows of all images in one forward pass.

        Raises:
            ConfigError: A choice is unknown, or the number is below 1.
        """
        if mode not in ("plain", "sliding") or text_cache not in ("per_adapter", "first_image"):
            raise ConfigError(
                f"mode {mode!r}, text_cache {text_cache!r}: expected 'plain' or 'sliding', and "
                f"'per_adapter' or 'first_image'"
            )
        if windows_per_batch < 1:
            raise ConfigError(f"windows_per_batch: got {windows_per_batch}, expected at least 1")
        self.base = base
        self.mode: PredictionMode = mode
        self.text_cache = text_cache
        self.windows_per_batch = windows_per_batch
        self._bank = AdapterBank(base.model)
        self._tokens: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self._text_features: OrderedDict[tuple[tuple[str, ...], str | None], Tensor] = OrderedDict()

    @torch.no_grad()
    def predict(
        self,
        images: Sequence[ndarray],
        classes: Sequence[str],
        mixes: Mix | Sequence[Mix | None] | None = None,
    ) -> list[Float[Tensor, "t _ _"]]:
        """Return sigmoid scores (t, h, w) in [0, 1] at the size of each image, float32 on the CPU.

        Args:
            images: RGB, uint8 (h, w, 3); sizes may differ.
            classes: t distinct names; of synonyms ("car, automobile") only the first is used.
            mixes: One mix for all images or one per image; None for the bare base. Images with
                different mixes run in one batch.

        Raises:
            ConfigError: There are no classes, or a name is blank or occurs twice.
            DatasetError: An image is not uint8 RGB.
            AdapterMismatchError: A mix does not fit the model, or the number of mixes differs from
                that of images.
        """
        check_classes(classes)
        for index, image in enumerate(images):
            _check_image(index, image)
        image_mixes = _mix_per_image(mixes, len(images))
        # Images with one mix are neighbours in this order and share its merged weights.
        first = {_mix_digest(mix): index for index, mix in reversed(list(enumerate(image_mixes)))}
        order = sorted(range(len(images)), key=lambda index: first[_mix_digest(image_mixes[index])])
        ordered_mixes = [image_mixes[index] for index in order]
        with _eval_mode(self.base.model):
            texts = self._get_text_features(tuple(classes), ordered_mixes)
            pixels = [self._to_tensor(images[index]) for index in order]
            run = self._predict_sliding if self.mode == "sliding" else self._predict_plain
            results = run(pixels, ordered_mixes, texts)
        return [result for _, result in sorted(zip(order, results, strict=True), key=_image_index)]

    @torch.no_grad()
    def score_windows(
        self, windows: Sequence[ndarray], classes: Sequence[str], mix: Mix | None = None
    ) -> list[Float[Tensor, "t s s"]]:
        """Return sigmoid scores in [0, 1] of windows at the resolution of the model's output.

        Resized to the image, they equal plain prediction (for sides that are multiples of
        ``pad_multiple``).

        Args:
            windows: RGB, uint8 (h, w, 3); each is resized to the model's square input.
            classes: See :meth:`predict`.
            mix: Mix for all windows.

        Returns:
            Float32 maps (t, s, s) of the model's output size, on its device.

        Raises:
            ConfigError, DatasetError, AdapterMismatchError: As :meth:`predict`.
        """
        check_classes(classes)
        for index, window in enumerate(windows):
            _check_image(index, window)
        with _eval_mode(self.base.model):
            texts = self._get_text_features(tuple(classes), [mix])
            pixels = [self.base.normalise(self._to_tensor(window)) for window in windows]
            maps = self._forward_windows(pixels, [mix] * len(windows), texts)
        return [logits.sigmoid_() for logits in maps]

    def with_text_cache(self, text_cache: TextCache) -> "Predictor":
        """Return a predictor with an empty text cache that shares the adapter buffers."""
        other = Predictor(
            self.base,
            mode=self.mode,
            text_cache=text_cache,
            windows_per_batch=self.windows_per_batch,
        )
        other._bank = self._bank
        return other

    def _to_tensor(self, image: ndarray) -> Float[Tensor, "3 h w"]:
        return torch.from_numpy(_to_channels_first(image)).to(self.base.device)

    def _get_text_features(
        self, classes: tuple[str, ...], mixes: Sequence[Mix | None]
    ) -> dict[str | None, Float[Tensor, "t p d"]]:
        """Return the text features of every mix by digest."""
        if self.text_cache == "first_image" and mixes:
            first = self._text_features.get((classes, None))
            if first is None:
                first = self._encode_classes(classes, mixes[:1])[0]
                _cache_put(self._text_features, (classes, None), first)
            self._text_features.move_to_end((classes, None))
            return {_mix_digest(mix): first for mix in mixes}
        by_digest = {_mix_digest(mix): mix for mix in mixes}
        features: dict[str | None, Tensor] = {}
        missing = [digest for digest in by_digest if (classes, digest) not in self._text_features]
        for digest in by_digest:
            if digest not in missing:
                self._text_features.move_to_end((classes, digest))
                features[digest] = self._text_features[classes, digest]
        for start in range(0, len(missing), _MIXES_PER_BATCH):
            batch = missing[start : start + _MIXES_PER_BATCH]
            encoded = self._encode_classes(classes, [by_digest[digest] for digest in batch])
            for digest, text in zip(batch, encoded, strict=True):
                features[digest] = _cache_put(self._text_features, (classes, digest), text)
        return features

    def _encode_classes(
        self, classes: tuple[str, ...], mixes: Sequence[Mix | None]
    ) -> Float[Tensor, "m t p d"]:
        tokens = self._tokens.get(classes)
        if tokens is None:
            tokens = _cache_put(self._tokens, classes, self.base.tokenize(classes))
        with self._bank.use(mixes):
            return self.base.encode_tokens(tokens, groups=len(mixes))

    def _predict_plain(
        self, images: list[Tensor], mixes: list[Mix | None], texts: dict[str | None, Tensor]
    ) -> list[Tensor]:
        padded = [_pad(self.base.normalise(image), self.base.pad_multiple) for image in images]
        maps = self._forward_windows(padded, mixes, texts)
        results: list[Tensor] = []
        for image, logits in zip(images, maps, strict=True):
            scores = logits.sigmoid_()
            height, width = image.shape[1:]
            # The official code crops the map, not the padding; only very small images are affected.
            cropped = scores[:, :height, :width] if self.base.pad_multiple > 1 else scores
            result = _resize(cropped, (height, width))
            # A view would keep the memory of the whole batch.
            results.append((result.clone() if result is cropped else result).cpu())
        return results

    def _predict_sliding(
        self, images: list[Tensor], mixes: list[Mix | None], texts: dict[str | None, Tensor]
    ) -> list[Tensor]:
        grid = SlidingWindowGrid(self.base.window)
        windows: list[Tensor] = []
        for image in images:
            canvas = _resize(image, (grid.canvas, grid.canvas))
            windows += grid.cut(canvas)
            windows.append(_resize(image, (grid.window, grid.window)))
        count = len(grid.corners) + 1
        window_mixes = [mix for mix in mixes for _ in range(count)]
        pixels = [self.base.normalise(window) for window in windows]
        maps = self._forward_windows(pixels, window_mixes, texts, windows_per_image=count)
        results: list[Tensor] = []
        for index, image in enumerate(images):
            logits = torch.stack(maps[index * count : (index + 1) * count])
            *local_scores, scores = _resize(logits, (grid.window, grid.window)).sigmoid_()
            total = grid.average(local_scores).add_(_resize(scores, (grid.canvas, grid.canvas)))
            results.append(_resize(total.div_(2), tuple(image.shape[1:])).cpu())
        return results

    def _forward_windows(
        self,
        windows: list[Tensor],
        mixes: Sequence[Mix | None],
        texts: dict[str | None, Tensor],
        windows_per_image: int = 1,
    ) -> list[Float[Tensor, "t s s"]]:
        """Run the model on all windows, resized to its input, each with its own mix.

        A batch holds complete images of ``windows_per_image`` windows, if one fits.
        """
        limit = self.windows_per_batch
        limit -= limit % windows_per_image if limit >= windows_per_image else 0
        side = self.base.input_size
        logits: list[Tensor] = []
        for indices in _batch_indices([_mix_digest(mix) for mix in mixes], limit):
            batch = torch.stack([_resize(windows[index], (side, side)) for index in indices])
            batch_mixes = [mixes[index] for index in indices]
            features = [texts[_mix_digest(mix)] for mix in batch_mixes]
            shared = all(text is features[0] for text in features)
            with self._bank.use(batch_mixes):
                maps = self.base.forward(
                    batch.to(self.base.dtype), features[0] if shared else torch.stack(features)
                )
            logits += maps.float()
        return logits


def _mix_per_image(mixes: Mix | Sequence[Mix | None] | None, count: int) -> list[Mix | None]:
    if mixes is None or isinstance(mixes, Mix):
        return [mixes] * count
    if len(mixes) != count:
        raise AdapterMismatchError(f"mixes: got {len(mixes)} for {count} images, expected {count}")
    return list(mixes)


def _mix_digest(mix: Mix | None) -> str | None:
    return mix.digest if mix else None


def _image_index(indexed: tuple[int, Tensor]) -> int:
    return indexed[0]


def _batch_indices(digests: Sequence[str | None], limit: int) -> Generator[list[int], None, None]:
    """Group windows into batches of at most ``limit`` windows and 8 mixes."""
    batch: list[int] = []
    batch_digests: set[str | None] = set()
    for index, digest in enumerate(digests):
        full = digest not in batch_digests and len(batch_digests) == _MIXES_PER_BATCH
        if batch and (len(batch) == limit or full):
            yield batch
            batch, batch_digests = [], set()
        batch.append(index)
        batch_digests.add(digest)
    if batch:
        yield batch


def _cache_put(cache: OrderedDict[Any, Tensor], key: Any, value: Tensor) -> Tensor:
    cache[key] = value
    if len(cache) > _MAX_CACHED_TEXTS:
        cache.popitem(last=False)
    return value


def _resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize maps (c, h, w) or (n, c, h, w): bilinear, align_corners False, no antialiasing."""
    if tuple(x.shape[-2:]) == size:
        return x
    batch = x if x.dim() == 4 else x[None]
    resized = nn.functional.interpolate(batch, size, mode="bilinear", align_corners=False)
    return resized if x.dim() == 4 else resized[0]


def _pad(image: Tensor, multiple: int) -> Tensor:
    """Pad a normalised image right and below with 0, the mean colour, to multiples."""
    height, width = image.shape[1:]
    return nn.functional.pad(image, (0, -width % multiple, 0, -height % multiple))


def _to_channels_first(image: ndarray) -> ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)


def _check_image(index: int, image: ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DatasetError(
            f"image {index}: got {image.dtype} {image.shape}, expected uint8 RGB (h, w, 3)"
        )


@contextmanager
def _eval_mode(model: nn.Module) -> Generator[None, None, None]:
    """Set a model to evaluation mode inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
