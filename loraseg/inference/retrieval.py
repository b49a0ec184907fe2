"""The first stage: embed images and choose their adapters, of any number of libraries."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import numpy as np

from loraseg.errors import LorasegError, ServiceError
from loraseg.inference.adapter_ref import AdapterFailure
from loraseg.inference.request import SegmentRequest
from loraseg.inference.segmenter import ImageEncoder
from loraseg.inference.selection import (
    AdapterQuery,
    AdapterSelection,
    adapter_not_found_error,
    select_adapters,
)
from loraseg.inference.service_errors import no_such_library_error
from loraseg.inference.snapshot import LibrarySnapshot
from loraseg.inference.watcher import LibraryWatcher
from loraseg.tensor_types import ndarray

__all__ = ["RetrievalStage"]

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")

_MAX_ADAPTERS_PER_IMAGE = 256


@dataclass(frozen=True, slots=True)
class _ResolvedRequest:
    """An ask against the shelf that it will be answered from."""

    request: SegmentRequest
    snapshot: LibrarySnapshot
    query: AdapterQuery
    skipped: tuple[AdapterFailure, ...]

    @property
    def needs_embedding(self) -> bool:
        return self.query.settings.mode == "fused" and self.snapshot.pool.retriever is not None


class RetrievalStage:
    """Chooses adapters for batches of images. Safe for any number of threads."""

    def __init__(
        self,
        encoder: ImageEncoder,
        libraries: Mapping[str, LibraryWatcher],
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
    def libraries(self) -> Mapping[str, LibraryWatcher]:
        """Those it chooses from."""
        return self._libraries

    def library(self, name: str) -> LibraryWatcher:
        """Return one library.

        Raises:
            ServiceError: ``no_such_library``.
        """
        if name not in self._libraries:
            raise no_such_library_error(name, self._libraries)
        return self._libraries[name]

    def retrieve(self, requests: Sequence[SegmentRequest]) -> list[AdapterSelection | LorasegError]:
        """Answer each ask, with its own error if it has one; none disturbs the others.

        Errors:
            ServiceError: ``no_such_library``; ``not_ready``; ``adapters_unavailable``: adapters
                that were asked for by name, or all there are, are out of service for now;
                ``invalid``: more adapters than can be mixed.
            AdapterNotFoundError: A name in ``only`` that is not there, or not visible.
            DatasetError: An image is not uint8 RGB.
        """
        answers: dict[int, AdapterSelection | LorasegError] = {}
        plans: dict[int, _ResolvedRequest] = {}
        for index, ask in enumerate(requests):
            planned = _attempt(self._resolve, ask)
            if isinstance(planned, LorasegError):
                answers[index] = planned
            else:
                plans[index] = planned
        embeddings, errors, embed_ms = self._embed(plans)
        answers |= errors
        groups: dict[int, list[int]] = {}
        for index, plan in plans.items():
            if index not in errors:
                groups.setdefault(id(plan.snapshot), []).append(index)
        for members in groups.values():
            some = {index: plans[index] for index in members}
            answers |= _retrieve_from_snapshot(some, embeddings, embed_ms)
        return [answers[index] for index in range(len(requests))]

    def close(self) -> None:
        """Stop following the libraries."""
        for live in self._libraries.values():
            live.close()

    def _resolve(self, request: SegmentRequest) -> _ResolvedRequest:
        live = self.library(request.library)
        for failure in request.failed:
            live.quarantine(failure)
        # Read once: everything about this image is of one generation.
        shelf = live.snapshot()
        hidden = shelf.invisible(request.visible)
        skipped = tuple(f for f in live.quarantined(shelf) if f.name not in hidden)
        wish = request.query
        if wish.settings.mode == "base":
            return _ResolvedRequest(request, shelf, wish, skipped)
        if wish.only:
            _check_only(wish, shelf.pool.names - hidden, skipped)
        exclude = hidden | wish.exclude if wish.exclude else hidden
        if skipped:
            exclude = exclude.union(failure.name for failure in skipped)
        _check_count(wish, shelf.pool.names, exclude)
        return _ResolvedRequest(request, shelf, replace(wish, exclude=exclude), skipped)

    def _embed(
        self, resolved: Mapping[int, _ResolvedRequest]
    ) -> tuple[dict[int, ndarray], dict[int, LorasegError], float]:
        started = time.perf_counter()
        images = {
            index: plan.request.image for index, plan in resolved.items() if plan.needs_embedding
        }
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


def _retrieve_from_snapshot(
    resolved: Mapping[int, _ResolvedRequest], embeddings: Mapping[int, ndarray], embed_ms: float
) -> dict[int, AdapterSelection | LorasegError]:
    """Answer plans that share one shelf."""
    started = time.perf_counter()
    choices = _attempt(_select_all, list(resolved.items()), embeddings)
    if isinstance(choices, LorasegError):
        if len(resolved) == 1:
            return dict.fromkeys(resolved, choices)
        alone = [
            _retrieve_from_snapshot({index: plan}, embeddings, embed_ms)
            for index, plan in resolved.items()
        ]
        return {index: answer for one in alone for index, answer in one.items()}
    retrieve_ms = _ms_since(started)
    answers: dict[int, AdapterSelection | LorasegError] = {}
    for (index, plan), choice in zip(resolved.items(), choices, strict=True):
        timing = {"embed": embed_ms if index in embeddings else 0.0, "retrieve": retrieve_ms}
        answers[index] = _attempt(_to_result, plan, choice, timing)
    return answers


def _select_all(
    resolved: Sequence[tuple[int, _ResolvedRequest]], embeddings: Mapping[int, ndarray]
) -> list[AdapterSelection]:
    pool = resolved[0][1].snapshot.pool
    rows: ndarray | None = None
    if embeddings:
        # Those that need no embedding get one that is not looked at.
        blank = np.zeros_like(next(iter(embeddings.values())))
        rows = np.stack([embeddings.get(index, blank) for index, _ in resolved])
    return select_adapters(pool, rows, [plan.query for _, plan in resolved])


def _to_result(
    resolved: _ResolvedRequest, selection: AdapterSelection, timing_ms: Mapping[str, float]
) -> AdapterSelection:
    if selection.fallback is not None and resolved.skipped:
        # Without what is out of service nothing is left.
        if any(failure.kind == "unreachable" for failure in resolved.skipped):
            raise ServiceError(
                "adapters_unavailable",
                "the store that adapters are in cannot be reached",
                retry_after_s=LibraryWatcher.UNREACHABLE_QUARANTINE_S,
            )
        selection = replace(selection, fallback="every adapter is excluded or out of service")
    return replace(
        selection,
        generation=resolved.snapshot.generation,
        attention=resolved.snapshot.attention if selection.adapters else None,
        skipped=resolved.skipped,
        timing_ms=timing_ms,
    )


def _check_only(
    query: AdapterQuery, visible: frozenset[str], skipped: tuple[AdapterFailure, ...]
) -> None:
    """Refuse names that are not there, not visible (said alike), or out of service."""
    if unknown := query.only - visible:
        raise adapter_not_found_error(unknown, visible)
    for failure in skipped:
        if failure.name in query.only - query.exclude:
            raise ServiceError(
                "adapters_unavailable",
                f"adapter {failure.name!r} is out of service: {failure.reason}",
                retry_after_s=LibraryWatcher.UNREACHABLE_QUARANTINE_S
                if failure.kind == "unreachable"
                else LibraryWatcher.BROKEN_QUARANTINE_S,
            )


def _check_count(query: AdapterQuery, names: frozenset[str], exclude: frozenset[str]) -> None:
    """Refuse a mix of so many adapters that the service would choke on it."""
    if (
        query.settings.mode == "fused"
        and not query.only
        and query.settings.k <= _MAX_ADAPTERS_PER_IMAGE
    ):
        return
    count = len((query.only or names) - exclude)
    if query.settings.mode == "fused" and not query.only:
        count = min(count, query.settings.k)
    if count > _MAX_ADAPTERS_PER_IMAGE:
        raise ServiceError(
            "invalid",
            f"{count} adapters would be mixed for one image; at most {_MAX_ADAPTERS_PER_IMAGE}",
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
