"""The first stage: embed images and select their adapters, from any number of libraries."""

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
from loraseg.tensor_types import Float, ndarray

__all__ = ["RetrievalStage"]

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")

_MAX_ADAPTERS_PER_IMAGE = 256


@dataclass(frozen=True, slots=True)
class _ResolvedRequest:
    """A request with the snapshot of its library, and its query without hidden adapters."""

    request: SegmentRequest
    snapshot: LibrarySnapshot
    query: AdapterQuery
    skipped: tuple[AdapterFailure, ...]

    @property
    def needs_embedding(self) -> bool:
        return self.query.settings.mode == "fused" and self.snapshot.pool.retriever is not None


class RetrievalStage:
    """Selects adapters for batches of images. Thread-safe."""

    def __init__(
        self,
        encoder: ImageEncoder,
        libraries: Mapping[str, LibraryWatcher],
        *,
        embed_together: bool = False,
    ) -> None:
        """Use an encoder and libraries.

        Args:
            encoder: The encoder that the libraries' filters name.
            libraries: Watched libraries by the name that requests use.
            embed_together: Embed a batch in one pass. On a CPU that saves little, and the last
                bits of an embedding, and so of the weights, then depend on the batch.
        """
        self._encoder = encoder
        self._libraries = dict(libraries)
        self._embed_together = embed_together

    @property
    def libraries(self) -> Mapping[str, LibraryWatcher]:
        """The libraries by name."""
        return self._libraries

    @property
    def embeds_together(self) -> bool:
        """Whether the images of a call are embedded in one pass."""
        return self._embed_together

    def library(self, name: str) -> LibraryWatcher:
        """Return one library.

        Raises:
            ServiceError: ``no_such_library``.
        """
        if name not in self._libraries:
            raise no_such_library_error(name, self._libraries)
        return self._libraries[name]

    def retrieve(self, requests: Sequence[SegmentRequest]) -> list[AdapterSelection | LorasegError]:
        """Return the selection of each request, or its own error; requests are independent.

        Errors:
            ServiceError: ``no_such_library``; ``not_ready``; ``adapters_unavailable``: adapters
                named in the query, or all adapters, are out of service for now; ``invalid``: more
                adapters than can be mixed.
            AdapterNotFoundError: A name in ``only`` does not exist, or is not visible.
            DatasetError: An image is not uint8 RGB.
        """
        results: dict[int, AdapterSelection | LorasegError] = {}
        resolved: dict[int, _ResolvedRequest] = {}
        for index, request in enumerate(requests):
            outcome = _attempt(self._resolve, request)
            if isinstance(outcome, LorasegError):
                results[index] = outcome
            else:
                resolved[index] = outcome
        embeddings, errors, embed_ms = self._embed(resolved)
        results |= errors
        by_snapshot: dict[int, dict[int, _ResolvedRequest]] = {}
        for index, item in resolved.items():
            if index not in errors:
                by_snapshot.setdefault(id(item.snapshot), {})[index] = item
        for group in by_snapshot.values():
            results |= _retrieve_from_snapshot(group, embeddings, embed_ms)
        return [results[index] for index in range(len(requests))]

    def close(self) -> None:
        """Stop watching the libraries."""
        for library in self._libraries.values():
            library.close()

    def _resolve(self, request: SegmentRequest) -> _ResolvedRequest:
        library = self.library(request.library)
        for failure in request.failed:
            library.quarantine(failure)
        # Read once, so that everything about this image is of one generation.
        snapshot = library.snapshot()
        hidden = snapshot.invisible(request.visible)
        skipped = tuple(f for f in library.quarantined(snapshot) if f.name not in hidden)
        query = request.query
        if query.settings.mode == "base":
            return _ResolvedRequest(request, snapshot, query, skipped)
        if query.only:
            _check_only(query, snapshot.pool.names - hidden, skipped)
        exclude = hidden | query.exclude if query.exclude else hidden
        if skipped:
            exclude = exclude.union(failure.name for failure in skipped)
        _check_count(query, snapshot.pool.names, exclude)
        return _ResolvedRequest(request, snapshot, replace(query, exclude=exclude), skipped)

    def _embed(
        self, resolved: Mapping[int, _ResolvedRequest]
    ) -> tuple[dict[int, ndarray], dict[int, LorasegError], float]:
        """Return embeddings (d,) and errors by request, and the time in milliseconds."""
        started = time.perf_counter()
        images = {
            index: item.request.image for index, item in resolved.items() if item.needs_embedding
        }
        embeddings: dict[int, ndarray] = {}
        errors: dict[int, LorasegError] = {}
        together = _attempt(self._encode, images) if self._embed_together else None
        if isinstance(together, dict):
            embeddings = together
        else:
            for index, image in images.items():
                alone = _attempt(self._encode, {index: image})
                if isinstance(alone, LorasegError):
                    errors[index] = alone
                else:
                    embeddings |= alone
        return embeddings, errors, _ms_since(started)

    def _encode(self, images: Mapping[int, ndarray]) -> dict[int, ndarray]:
        embeddings = self._encoder.encode_images(list(images.values()))
        return dict(zip(images, embeddings, strict=True))


def _retrieve_from_snapshot(
    resolved: Mapping[int, _ResolvedRequest],
    embeddings: Mapping[int, Float[ndarray, " d"]],
    embed_ms: float,
) -> dict[int, AdapterSelection | LorasegError]:
    """Select for requests that share a snapshot; after an error, for each of them alone."""
    started = time.perf_counter()
    selections = _attempt(_select_all, resolved, embeddings)
    if isinstance(selections, LorasegError):
        if len(resolved) == 1:
            return dict.fromkeys(resolved, selections)
        results: dict[int, AdapterSelection | LorasegError] = {}
        for index, item in resolved.items():
            results |= _retrieve_from_snapshot({index: item}, embeddings, embed_ms)
        return results
    retrieve_ms = _ms_since(started)
    return {
        index: _attempt(
            _complete,
            selection,
            item,
            {"embed": embed_ms if index in embeddings else 0.0, "retrieve": retrieve_ms},
        )
        for (index, item), selection in zip(resolved.items(), selections, strict=True)
    }


def _select_all(
    resolved: Mapping[int, _ResolvedRequest], embeddings: Mapping[int, Float[ndarray, " d"]]
) -> list[AdapterSelection]:
    pool = next(iter(resolved.values())).snapshot.pool
    rows: ndarray | None = None
    if embeddings:
        # Requests that need no embedding get a row of zeros, which is not read.
        zeros = np.zeros_like(next(iter(embeddings.values())))
        rows = np.stack([embeddings.get(index, zeros) for index in resolved])
    return select_adapters(pool, rows, [item.query for item in resolved.values()])


def _complete(
    selection: AdapterSelection, resolved: _ResolvedRequest, timing_ms: Mapping[str, float]
) -> AdapterSelection:
    """Add what the snapshot knows to a selection."""
    if selection.fallback is not None and resolved.skipped:
        # Nothing is left without the adapters that are out of service.
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
    """Refuse names that do not exist or are hidden (same message), or are out of service."""
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
    """Refuse a mix of too many adapters, which would take too much memory and time."""
    is_top_k = query.settings.mode == "fused" and not query.only
    if is_top_k and query.settings.k <= _MAX_ADAPTERS_PER_IMAGE:
        return
    count = len((query.only or names) - exclude)
    if is_top_k:
        count = min(count, query.settings.k)
    if count > _MAX_ADAPTERS_PER_IMAGE:
        raise ServiceError(
            "invalid",
            f"{count} adapters would be mixed for one image; at most {_MAX_ADAPTERS_PER_IMAGE}",
        )


def _attempt(
    function: Callable[ParamsT, ResultT], *args: ParamsT.args, **options: ParamsT.kwargs
) -> ResultT | LorasegError:
    """Return the function's result, or the LorasegError that it raises."""
    try:
        return function(*args, **options)
    except LorasegError as error:
        return error


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
