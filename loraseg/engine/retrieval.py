"""The first stage: embed images and choose their adapters, of any number of libraries."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

import numpy as np

from loraseg.engine.adapter_ref import Failure
from loraseg.engine.live import LiveLibrary
from loraseg.engine.shelf import Attention, Shelf
from loraseg.errors import LorasegError, ServiceError
from loraseg.segment.adaptive import ImageEncoder
from loraseg.segment.choice import Choice, Wish, adapters_not_found, choose
from loraseg.tensor_types import ndarray

__all__ = ["Ask", "Picked", "RetrievalStage"]

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")

_MOST_PARTS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One image that adapters are wanted for.

    Attributes:
        image: RGB, uint8 (h, w, 3).
        library: The service's name for it.
        wish: How they are chosen.
        visible: Name patterns (``fnmatch``) of those that may be used; None for all.
        failed: Adapters that an earlier choice for this image named and that could not be loaded.
    """

    image: ndarray
    library: str
    wish: Wish
    visible: tuple[str, ...] | None = None
    failed: tuple[Failure, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Picked:
    """The adapters of one image, all of one generation.

    Attributes:
        choice: References to them (:class:`~loraseg.engine.adapter_ref.AdapterRef`).
        generation: Of the catalog they were chosen from; None if none was looked at.
        attention: Whether adapters of the CLIP attention act; None if there are none.
        skipped: Visible adapters of the library that are out of service.
        timing_ms: ``embed`` and ``retrieve``, of the whole batch.
    """

    choice: Choice
    generation: int | None = None
    attention: Attention | None = None
    skipped: tuple[Failure, ...] = ()
    timing_ms: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class _Plan:
    """An ask against the shelf that it will be answered from."""

    ask: Ask
    shelf: Shelf
    wish: Wish
    skipped: tuple[Failure, ...]

    @property
    def needs_embedding(self) -> bool:
        return self.wish.settings.mode == "fused" and self.shelf.pool.retriever is not None


class RetrievalStage:
    """Chooses adapters for batches of images. Safe for any number of threads."""

    def __init__(
        self,
        encoder: ImageEncoder,
        libraries: Mapping[str, LiveLibrary],
        *,
        embed_together: bool = False,
    ) -> None:
        """Use an encoder and the libraries by the names that asks use.

        Args:
            encoder: The one whose id the libraries were told.
            libraries: Followed by their own threads.
            embed_together: Embed a batch in one pass. On a CPU that saves little, and the last
                bits of an embedding, and so of the weights, then depend on the batch.
        """
        self._encoder = encoder
        self._libraries = dict(libraries)
        self._embed_together = embed_together

    @property
    def libraries(self) -> Mapping[str, LiveLibrary]:
        """Those it chooses from."""
        return self._libraries

    def library(self, name: str) -> LiveLibrary:
        """Return one library.

        Raises:
            ServiceError: ``no_such_library``.
        """
        if name not in self._libraries:
            known = ", ".join(repr(other) for other in self._libraries)
            raise ServiceError("no_such_library", f"no library {name!r}; there are {known}")
        return self._libraries[name]

    def choose(self, asks: Sequence[Ask]) -> list[Picked | LorasegError]:
        """Answer each ask, with its own error if it has one; none disturbs the others.

        Errors:
            ServiceError: ``no_such_library``; ``not_ready``; ``adapters_unavailable``: adapters
                that were asked for by name, or all there are, are out of service for now;
                ``invalid``: more adapters than can be mixed.
            AdapterNotFoundError: A name in ``only`` that is not there, or not visible.
            DatasetError: An image is not uint8 RGB.
        """
        answers: dict[int, Picked | LorasegError] = {}
        plans: dict[int, _Plan] = {}
        for index, ask in enumerate(asks):
            planned = _attempt(self._plan, ask)
            if isinstance(planned, LorasegError):
                answers[index] = planned
            else:
                plans[index] = planned
        embeddings, errors, embed_ms = self._embed(plans)
        answers |= errors
        groups: dict[int, list[int]] = {}
        for index, plan in plans.items():
            if index not in errors:
                groups.setdefault(id(plan.shelf), []).append(index)
        for members in groups.values():
            some = {index: plans[index] for index in members}
            answers |= _answer(some, embeddings, embed_ms)
        return [answers[index] for index in range(len(asks))]

    def close(self) -> None:
        """Stop following the libraries."""
        for live in self._libraries.values():
            live.close()

    def _plan(self, ask: Ask) -> _Plan:
        live = self.library(ask.library)
        for failure in ask.failed:
            live.set_aside(failure)
        # Read once: everything about this image is of one generation.
        shelf = live.shelf()
        hidden = shelf.hidden(ask.visible)
        skipped = tuple(f for f in live.out_of_service(shelf) if f.name not in hidden)
        wish = ask.wish
        if wish.settings.mode == "base":
            return _Plan(ask, shelf, wish, skipped)
        if wish.only:
            _check_only(wish, shelf.pool.names - hidden, skipped)
        exclude = hidden | wish.exclude if wish.exclude else hidden
        if skipped:
            exclude = exclude.union(failure.name for failure in skipped)
        _check_count(wish, shelf.pool.names, exclude)
        return _Plan(ask, shelf, replace(wish, exclude=exclude), skipped)

    def _embed(
        self, plans: Mapping[int, _Plan]
    ) -> tuple[dict[int, ndarray], dict[int, LorasegError], float]:
        started = time.perf_counter()
        images = {index: plan.ask.image for index, plan in plans.items() if plan.needs_embedding}
        found: dict[int, ndarray] = {}
        errors: dict[int, LorasegError] = {}
        together = _attempt(self._encode, images) if self._embed_together else None
        if isinstance(together, dict):
            found = together
        else:
            for index, image in images.items():
                one = _attempt(self._encode, {index: image})
                if isinstance(one, LorasegError):
                    errors[index] = one
                else:
                    found |= one
        return found, errors, _ms_since(started)

    def _encode(self, images: Mapping[int, ndarray]) -> dict[int, ndarray]:
        embeddings = self._encoder.encode_images(list(images.values()))
        return dict(zip(images, embeddings, strict=True))


def _answer(
    plans: Mapping[int, _Plan], embeddings: Mapping[int, ndarray], embed_ms: float
) -> dict[int, Picked | LorasegError]:
    """Answer plans that share one shelf."""
    started = time.perf_counter()
    choices = _attempt(_choices, list(plans.items()), embeddings)
    if isinstance(choices, LorasegError):
        if len(plans) == 1:
            return dict.fromkeys(plans, choices)
        alone = [_answer({index: plan}, embeddings, embed_ms) for index, plan in plans.items()]
        return {index: answer for one in alone for index, answer in one.items()}
    retrieve_ms = _ms_since(started)
    answers: dict[int, Picked | LorasegError] = {}
    for (index, plan), choice in zip(plans.items(), choices, strict=True):
        timing = {"embed": embed_ms if index in embeddings else 0.0, "retrieve": retrieve_ms}
        answers[index] = _attempt(_picked, plan, choice, timing)
    return answers


def _choices(plans: Sequence[tuple[int, _Plan]], embeddings: Mapping[int, ndarray]) -> list[Choice]:
    pool = plans[0][1].shelf.pool
    rows: ndarray | None = None
    if embeddings:
        # Those that need no embedding get one that is not looked at.
        blank = np.zeros_like(next(iter(embeddings.values())))
        rows = np.stack([embeddings.get(index, blank) for index, _ in plans])
    return choose(pool, rows, [plan.wish for _, plan in plans])


def _picked(plan: _Plan, choice: Choice, timing_ms: Mapping[str, float]) -> Picked:
    if choice.fallback is not None and plan.skipped:
        # Without what is out of service nothing is left.
        if any(failure.kind == "unreachable" for failure in plan.skipped):
            raise ServiceError(
                "adapters_unavailable",
                "the store that adapters are in cannot be reached",
                retry_after_s=LiveLibrary.UNREACHABLE_S,
            )
        choice = replace(choice, fallback="every adapter is excluded or out of service")
    return Picked(
        choice=choice,
        generation=plan.shelf.generation,
        attention=plan.shelf.attention if choice.parts else None,
        skipped=plan.skipped,
        timing_ms=timing_ms,
    )


def _check_only(wish: Wish, visible: frozenset[str], skipped: tuple[Failure, ...]) -> None:
    """Refuse names that are not there, not visible (said alike), or out of service."""
    if unknown := wish.only - visible:
        raise adapters_not_found(unknown, visible)
    for failure in skipped:
        if failure.name in wish.only - wish.exclude:
            raise ServiceError(
                "adapters_unavailable",
                f"adapter {failure.name!r} is out of service: {failure.reason}",
                retry_after_s=LiveLibrary.UNREACHABLE_S
                if failure.kind == "unreachable"
                else LiveLibrary.BROKEN_S,
            )


def _check_count(wish: Wish, names: frozenset[str], exclude: frozenset[str]) -> None:
    """Refuse a mix of so many adapters that the service would choke on it."""
    if wish.settings.mode == "fused" and not wish.only and wish.settings.k <= _MOST_PARTS:
        return
    count = len((wish.only or names) - exclude)
    if wish.settings.mode == "fused" and not wish.only:
        count = min(count, wish.settings.k)
    if count > _MOST_PARTS:
        raise ServiceError(
            "invalid", f"{count} adapters would be mixed for one image; at most {_MOST_PARTS}"
        )


def _attempt(
    work: Callable[ParamsT, ResultT], *args: ParamsT.args, **options: ParamsT.kwargs
) -> ResultT | LorasegError:
    """Return what ``work`` returns, or the error that it raises on purpose."""
    try:
        return work(*args, **options)
    except LorasegError as error:
        return error


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
