"""The client for synchronous code."""

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

from loraseg.api_types import AdapterInfo, LibraryInfo
from loraseg.client.asynchronous import AsyncClient
from loraseg.client.images import ImageInput
from loraseg.client.requests import Request, SegmentOptions
from loraseg.client.responses import SegmentResponse
from loraseg.client.transport import Response
from loraseg.errors import LorasegError, ServiceError

__all__ = ["Client"]

ResultT = TypeVar("ResultT")


class Client:
    """Client of an endpoint, safe for any number of threads.

    It runs an :class:`AsyncClient` on an event loop in its own thread: an event loop can cancel a
    read at the deadline even if bytes keep arriving slowly. It also works in notebooks, which
    already run a loop. Close it, or use it in a ``with`` statement.

    Arguments and errors are those of :class:`AsyncClient`.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 60.0,
        retries: int = 4,
        allow_insecure: bool = False,
    ) -> None:
        self._client = AsyncClient(
            url, token, timeout_s=timeout_s, retries=retries, allow_insecure=allow_insecure
        )
        self.endpoint = self._client.endpoint
        self._loop = _LoopThread()

    def __repr__(self) -> str:
        return repr(self._client).replace("AsyncClient", "Client", 1)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and stop the thread."""
        if not self._loop.is_closed:
            self._loop.run(self._client.aclose())
            self._loop.close()

    def segment(
        self, image: ImageInput, classes: Sequence[str], **options: Unpack[SegmentOptions]
    ) -> SegmentResponse:
        """Segment an image, as :meth:`AsyncClient.segment` does."""
        return self._loop.run(self._client.segment(image, classes, **options))

    def segment_batch(
        self,
        images: Iterable[ImageInput],
        classes: Sequence[str],
        **options: Unpack[SegmentOptions],
    ) -> Iterator[tuple[int, SegmentResponse | LorasegError]]:
        """Yield index and result of each image, as :meth:`AsyncClient.segment_batch` does.

        ``images`` is iterated in other threads.
        """
        results = self._client.segment_batch(images, classes, **options)

        async def step() -> tuple[int, SegmentResponse | LorasegError] | None:
            return await anext(results, None)

        try:
            while (result := self._loop.run(step())) is not None:
                yield result
        finally:
            if not self._loop.is_closed:
                self._loop.run(results.aclose())

    def adapters(self, library: str | None = None) -> tuple[AdapterInfo, ...]:
        """Return the adapters of a library (None: the default one), ordered by name."""
        return self._loop.run(self._client.adapters(library))

    def adapter(self, name: str, library: str | None = None) -> dict[str, Any]:
        """Return an adapter's card, without centroids."""
        return self._loop.run(self._client.adapter(name, library))

    def library(self, library: str | None = None) -> LibraryInfo:
        """Return the state of a library (None: the default one)."""
        return self._loop.run(self._client.library(library))

    def refresh(self, library: str | None = None) -> LibraryInfo:
        """Make the endpoint check for a newer generation now. Requires the role ``admin``."""
        return self._loop.run(self._client.refresh(library))

    def base(self) -> dict[str, Any]:
        """Return the description of base model, encoder and default settings."""
        return self._loop.run(self._client.base())

    def is_ready(self) -> bool:
        """Return whether the endpoint can segment now; False if it cannot be reached."""
        return self._loop.run(self._client.is_ready())

    def request(self, request: Request, timeout_s: float | None = None) -> Response:
        """Send a request, as :meth:`AsyncClient.request` does."""
        return self._loop.run(self._client.request(request, timeout_s))


class _LoopThread:
    """An event loop in a thread, and a blocking call that runs coroutines on it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="loraseg-client", daemon=True
        )
        self._thread.start()
        self.is_closed = False

    def run(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        if self.is_closed:
            coroutine.close()
            raise ServiceError("unreachable", "the client has been closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # after Ctrl-C in this thread; no effect on a finished coroutine
            raise

    def close(self) -> None:
        self.is_closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
