"""From images and class names to score maps, plain or by sliding windows (methods A.2 and A.7)."""

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
# More would need more buffers than they save time: a merged weight serves one mix anyway.
_MIXES_PER_BATCH = 8


class Predictor:
    """Scores every pixel of images for every class of a list. One thread at a time.

    The base's weights must not change while a predictor is in use: text features are kept, for
    the 256 latest pairs of class list and adapter mix.
    """

    def __init__(
        self,
        base: OpenVocabularyBase,
        *,
        mode: PredictionMode = "plain",
        text_cache: TextCache = "per_adapter",
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
        """Return sigmoid scores in [0, 1] at each image's own size, float32 on the CPU.

        Args:
            images: RGB, uint8 (h, w, 3); sizes may differ.
            classes: Distinct names; of "car, automobile" only the first synonym is used.
            mixes: The adapters in use, one mix for all images or one for each; None for the bare
                base. Images of different mixes go through the model together.

        Raises:
            ConfigError: No class is named, one is blank, or one twice.
            DatasetError: An image is not of that kind.
            AdapterMismatchError: A mix does not fit the model, or there is not one an image.
        """
        check_classes(classes)
        for index, image in enumerate(images):
            _check_image(index, image)
        each = _mix_per_image(mixes, len(images))
        # Stable, so that images of one mix stand together and share its merged weights.
        first = {_mix_digest(mix): index for index, mix in reversed(list(enumerate(each)))}
        order = sorted(range(len(images)), key=lambda index: first[_mix_digest(each[index])])
        with _eval_mode(self.base.model):
            texts = self._get_text_features(tuple(classes), [each[index] for index in order])
            pixels = [self._to_tensor(images[index]) for index in order]
            run = self._predict_sliding if self.mode == "sliding" else self._predict_plain
            results = run(pixels, [each[index] for index in order], texts)
        return [result for _, result in sorted(zip(order, results, strict=True), key=_image_index)]

    @torch.no_grad()
    def score_windows(
        self, windows: Sequence[ndarray], classes: Sequence[str], mix: Mix | None = None
    ) -> list[Float[Tensor, "t s s"]]:
        """Return sigmoid scores in [0, 1] of windows as coarse as the model makes them.

        Plain prediction of an image (whose sides ``pad_multiple`` divides) is this, brought to
        the image's size.

        Args:
            windows: RGB, uint8 (h, w, 3); each is brought to the model's square input.
            classes: As in :meth:`predict`.
            mix: The adapters in use, for all windows.

        Returns:
            float32 maps of the model's own size, on its device.

        Raises:
            ConfigError, DatasetError, AdapterMismatchError: As :meth:`predict`.
        """
        check_classes(classes)
        for index, window in enumerate(windows):
            _check_image(index, window)
        with _eval_mode(self.base.model):
            texts = self._get_text_features(tuple(classes), [mix])
            normed = [self.base.normalise(self._to_tensor(window)) for window in windows]
            maps = self._forward_windows(normed, [mix] * len(windows), texts)
        return [logits.sigmoid_() for logits in maps]

    def with_text_cache(self, text_cache: TextCache) -> "Predictor":
        """Return a predictor that keeps text features apart; the adapter buffers are shared."""
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
        """Return the text features of every mix, by its digest."""
        stale = self.text_cache == "first_image"
        if stale and mixes:
            first = self._text_features.get((classes, None))
            if first is None:
                first = self._encode_classes(classes, mixes[:1])[0]
                _cache_put(self._text_features, (classes, None), first)
            self._text_features.move_to_end((classes, None))
            return {_mix_digest(mix): first for mix in mixes}
        wanted = {_mix_digest(mix): mix for mix in mixes}
        found: dict[str | None, Tensor] = {}
        missing = [digest for digest in wanted if (classes, digest) not in self._text_features]
        for digest in wanted:
            if digest not in missing:
                self._text_features.move_to_end((classes, digest))
                found[digest] = self._text_features[classes, digest]
        for start in range(0, len(missing), _MIXES_PER_BATCH):
            some = missing[start : start + _MIXES_PER_BATCH]
            banks = self._encode_classes(classes, [wanted[digest] for digest in some])
            for digest, bank in zip(some, banks, strict=True):
                found[digest] = _cache_put(self._text_features, (classes, digest), bank)
        return found

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
            # The official code cuts the map, not the padding: it only acts on very small images.
            shown = scores[:, :height, :width] if self.base.pad_multiple > 1 else scores
            result = _resize(shown, (height, width))
            # A view of the batch would keep all of it.
            results.append((result.clone() if result is shown else result).cpu())
        return results

    def _predict_sliding(
        self, images: list[Tensor], mixes: list[Mix | None], texts: dict[str | None, Tensor]
    ) -> list[Tensor]:
        tiling = SlidingWindowGrid(self.base.window)
        windows: list[Tensor] = []
        for image in images:
            canvas = _resize(image, (tiling.canvas, tiling.canvas))
            windows += tiling.cut(canvas)
            windows.append(_resize(image, (tiling.window, tiling.window)))
        each = len(tiling.corners) + 1
        spread = [mix for mix in mixes for _ in range(each)]
        normed = [self.base.normalise(window) for window in windows]
        maps = self._forward_windows(normed, spread, texts, windows_per_image=each)
        results: list[Tensor] = []
        for index, image in enumerate(images):
            logits = torch.stack(maps[index * each : (index + 1) * each])
            *parts, whole = _resize(logits, (tiling.window, tiling.window)).sigmoid_()
            both = tiling.average(parts).add_(_resize(whole, (tiling.canvas, tiling.canvas)))
            results.append(_resize(both.div_(2), tuple(image.shape[1:])).cpu())
        return results

    def _forward_windows(
        self,
        windows: list[Tensor],
        mixes: Sequence[Mix | None],
        texts: dict[str | None, Tensor],
        windows_per_image: int = 1,
    ) -> list[Float[Tensor, "t s s"]]:
        """Run all windows through the model, each resized to CLIP's input, with its own mix.

        Batches hold whole images of ``windows_per_image`` windows if one fits.
        """
        limit = self.windows_per_batch
        limit -= limit % windows_per_image if limit >= windows_per_image else 0
        side = self.base.input_size
        logits: list[Tensor] = []
        for some in _batch_indices([_mix_digest(mix) for mix in mixes], limit):
            rows = torch.stack([_resize(windows[index], (side, side)) for index in some])
            used = [mixes[index] for index in some]
            banks = [texts[_mix_digest(mix)] for mix in used]
            shared = all(bank is banks[0] for bank in banks)
            with self._bank.use(used):
                maps = self.base.forward(
                    rows.to(self.base.dtype), banks[0] if shared else torch.stack(banks)
                )
            logits += maps.float()
        return logits


def _mix_per_image(mixes: Mix | Sequence[Mix | None] | None, count: int) -> list[Mix | None]:
    if mixes is None or isinstance(mixes, Mix):
        return [mixes] * count
    if len(mixes) != count:
        raise AdapterMismatchError(f"mixes: got {len(mixes)} for {count} images, expected one each")
    return list(mixes)


def _mix_digest(mix: Mix | None) -> str | None:
    return mix.digest if mix else None


def _image_index(indexed: tuple[int, Tensor]) -> int:
    return indexed[0]


def _batch_indices(digests: Sequence[str | None], limit: int) -> Generator[list[int], None, None]:
    """Cut windows into batches of at most ``limit``, and of a limited number of mixes."""
    batch: list[int] = []
    seen: set[str | None] = set()
    for index, digest in enumerate(digests):
        full = digest not in seen and len(seen) == _MIXES_PER_BATCH
        if batch and (len(batch) == limit or full):
            yield batch
            batch, seen = [], set()
        batch.append(index)
        seen.add(digest)
    if batch:
        yield batch


def _cache_put(cache: OrderedDict[Any, Tensor], key: Any, value: Tensor) -> Tensor:
    cache[key] = value
    if len(cache) > _MAX_CACHED_TEXTS:
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


def _to_channels_first(image: ndarray) -> ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)


def _check_image(index: int, image: ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DatasetError(
            f"image {index}: got {image.dtype} {image.shape}, expected uint8 RGB (h, w, 3)"
        )


@contextmanager
def _eval_mode(model: nn.Module) -> Generator[None, None, None]:
    """Pool as in evaluation, whatever the model was doing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
