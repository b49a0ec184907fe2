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
from loraseg.segment.base import SegmentationBase, check_classes
from loraseg.segment.tiling import Tiling
from loraseg.tensor_types import Float, ndarray

__all__ = ["Predictor"]

Mode = Literal["plain", "sliding"]
TextCache = Literal["per_adapter", "first_image"]

_BANKS = 256
# More would need more buffers than they save time: a merged weight serves one mix anyway.
_MIXES_PER_BATCH = 8


class Predictor:
    """Scores every pixel of images for every class of a list. One thread at a time.

    The base's weights must not change while a predictor is in use: text features are kept, for
    the 256 latest pairs of class list and adapter mix.
    """

    def __init__(
        self,
        base: SegmentationBase,
        *,
        mode: Mode = "plain",
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
        self.mode: Mode = mode
        self.text_cache = text_cache
        self.windows_per_batch = windows_per_batch
        self._bank = AdapterBank(base.model)
        self._tokens: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self._banks: OrderedDict[tuple[tuple[str, ...], str | None], Tensor] = OrderedDict()

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
        each = _one_each(mixes, len(images))
        # Stable, so that images of one mix stand together and share its merged weights.
        first = {_digest(mix): index for index, mix in reversed(list(enumerate(each)))}
        order = sorted(range(len(images)), key=lambda index: first[_digest(each[index])])
        with _evaluating(self.base.model):
            texts = self._texts(tuple(classes), [each[index] for index in order])
            pixels = [self._pixels(images[index]) for index in order]
            run = self._sliding if self.mode == "sliding" else self._plain
            results = run(pixels, [each[index] for index in order], texts)
        return [result for _, result in sorted(zip(order, results, strict=True), key=_place)]

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
        with _evaluating(self.base.model):
            texts = self._texts(tuple(classes), [mix])
            normed = [self.base.normalise(self._pixels(window)) for window in windows]
            maps = self._logits(normed, [mix] * len(windows), texts)
        return [logits.sigmoid_() for logits in maps]

    def with_own_texts(self, text_cache: TextCache) -> "Predictor":
        """Return a predictor that keeps text features apart; the adapter buffers are shared."""
        other = Predictor(
            self.base,
            mode=self.mode,
            text_cache=text_cache,
            windows_per_batch=self.windows_per_batch,
        )
        other._bank = self._bank
        return other

    def _pixels(self, image: ndarray) -> Float[Tensor, "3 h w"]:
        return torch.from_numpy(_planes(image)).to(self.base.device)

    def _texts(
        self, classes: tuple[str, ...], mixes: Sequence[Mix | None]
    ) -> dict[str | None, Float[Tensor, "t p d"]]:
        """Return the text features of every mix, by its digest."""
        stale = self.text_cache == "first_image"
        if stale and mixes:
            first = self._banks.get((classes, None))
            if first is None:
                first = self._encode(classes, mixes[:1])[0]
                _keep(self._banks, (classes, None), first)
            self._banks.move_to_end((classes, None))
            return {_digest(mix): first for mix in mixes}
        wanted = {_digest(mix): mix for mix in mixes}
        found: dict[str | None, Tensor] = {}
        missing = [digest for digest in wanted if (classes, digest) not in self._banks]
        for digest in wanted:
            if digest not in missing:
                self._banks.move_to_end((classes, digest))
                found[digest] = self._banks[classes, digest]
        for start in range(0, len(missing), _MIXES_PER_BATCH):
            some = missing[start : start + _MIXES_PER_BATCH]
            banks = self._encode(classes, [wanted[digest] for digest in some])
            for digest, bank in zip(some, banks, strict=True):
                found[digest] = _keep(self._banks, (classes, digest), bank)
        return found

    def _encode(
        self, classes: tuple[str, ...], mixes: Sequence[Mix | None]
    ) -> Float[Tensor, "m t p d"]:
        tokens = self._tokens.get(classes)
        if tokens is None:
            tokens = _keep(self._tokens, classes, self.base.tokenize(classes))
        with self._bank.use(mixes):
            return self.base.encode_tokens(tokens, groups=len(mixes))

    def _plain(
        self, images: list[Tensor], mixes: list[Mix | None], texts: dict[str | None, Tensor]
    ) -> list[Tensor]:
        padded = [_pad(self.base.normalise(image), self.base.pad_multiple) for image in images]
        maps = self._logits(padded, mixes, texts)
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

    def _sliding(
        self, images: list[Tensor], mixes: list[Mix | None], texts: dict[str | None, Tensor]
    ) -> list[Tensor]:
        tiling = Tiling(self.base.window)
        windows: list[Tensor] = []
        for image in images:
            canvas = _resize(image, (tiling.canvas, tiling.canvas))
            windows += tiling.cut(canvas)
            windows.append(_resize(image, (tiling.window, tiling.window)))
        each = len(tiling.corners) + 1
        spread = [mix for mix in mixes for _ in range(each)]
        normed = [self.base.normalise(window) for window in windows]
        maps = self._logits(normed, spread, texts, each=each)
        results: list[Tensor] = []
        for index, image in enumerate(images):
            logits = torch.stack(maps[index * each : (index + 1) * each])
            *parts, whole = _resize(logits, (tiling.window, tiling.window)).sigmoid_()
            both = tiling.average(parts).add_(_resize(whole, (tiling.canvas, tiling.canvas)))
            results.append(_resize(both.div_(2), tuple(image.shape[1:])).cpu())
        return results

    def _logits(
        self,
        windows: list[Tensor],
        mixes: Sequence[Mix | None],
        texts: dict[str | None, Tensor],
        each: int = 1,
    ) -> list[Float[Tensor, "t s s"]]:
        """Run all windows through the model, each resized to CLIP's input, with its own mix.

        Batches hold whole images of ``each`` windows if one fits.
        """
        limit = self.windows_per_batch
        limit -= limit % each if limit >= each else 0
        side = self.base.model.config.image_size
        logits: list[Tensor] = []
        for some in _batches([_digest(mix) for mix in mixes], limit):
            rows = torch.stack([_resize(windows[index], (side, side)) for index in some])
            used = [mixes[index] for index in some]
            banks = [texts[_digest(mix)] for mix in used]
            shared = all(bank is banks[0] for bank in banks)
            with self._bank.use(used):
                maps = self.base.model(
                    rows.to(self.base.dtype), banks[0] if shared else torch.stack(banks)
                )
            logits += maps.float()
        return logits


def _one_each(mixes: Mix | Sequence[Mix | None] | None, count: int) -> list[Mix | None]:
    if mixes is None or isinstance(mixes, Mix):
        return [mixes] * count
    if len(mixes) != count:
        raise AdapterMismatchError(f"mixes: got {len(mixes)} for {count} images, expected one each")
    return list(mixes)


def _digest(mix: Mix | None) -> str | None:
    return mix.digest if mix else None


def _place(numbered: tuple[int, Tensor]) -> int:
    return numbered[0]


def _batches(digests: Sequence[str | None], limit: int) -> Generator[list[int], None, None]:
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
