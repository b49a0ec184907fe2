"""The client for programmes without an event loop."""

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

from loraseg.client.asynchronous import AsyncClient
from loraseg.client.images import ImageInput
from loraseg.client.requests import Request, SegmentOptions
from loraseg.client.responses import AdapterInfo, LibraryInfo, SegmentResponse
from loraseg.client.transport import Response
from loraseg.errors import LorasegError, ServiceError

__all__ = ["Client"]

ResultT = TypeVar("ResultT")


class Client:
    """Talks to an endpoint. Any number of threads may use one client at once.

    It is :class:`AsyncClient` on an event loop in a thread of its own: only an event loop can break
    off a read when time is over, however slowly bytes keep coming. It works inside notebooks,
    which have a loop already. Close it, or use it in a ``with`` statement.

    Args and errors are those of :class:`AsyncClient`.
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
        """Close the connections and end the thread."""
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
        """Yield index and outcome as images finish, as :meth:`AsyncClient.segment_batch` does.

        ``images`` is read in other threads.
        """
        found = self._client.segment_batch(images, classes, **options)

        async def step() -> tuple[int, SegmentResponse | LorasegError] | None:
            return await anext(found, None)

        try:
            while (settled := self._loop.run(step())) is not None:
                yield settled
        finally:
            if not self._loop.is_closed:
                self._loop.run(found.aclose())

    def adapters(self, library: str | None = None) -> tuple[AdapterInfo, ...]:
        """Return the adapters of a library, the default one if none is named, by name."""
        return self._loop.run(self._client.adapters(library))

    def adapter(self, name: str, library: str | None = None) -> dict[str, Any]:
        """Return an adapter's card, without centroids."""
        return self._loop.run(self._client.adapter(name, library))

    def library(self, library: str | None = None) -> LibraryInfo:
        """Return the state of a library, the default one if none is named."""
        return self._loop.run(self._client.library(library))

    def refresh(self, library: str | None = None) -> LibraryInfo:
        """Let the endpoint look for a newer generation now. Needs the role ``admin``."""
        return self._loop.run(self._client.refresh(library))

    def base(self) -> dict[str, Any]:
        """Return what is frozen: base model, encoder and default settings."""
        return self._loop.run(self._client.base())

    def is_ready(self) -> bool:
        """Tell whether the endpoint can segment now; False too if it cannot be reached."""
        return self._loop.run(self._client.is_ready())

    def request(self, request: Request, timeout_s: float | None = None) -> Response:
        """Send any request, as :meth:`AsyncClient.ask` does."""
        return self._loop.run(self._client.request(request, timeout_s))


class _LoopThread:
    """An event loop in a thread; other threads wait for what they run on it."""

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
        running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return running.result()
        except BaseException:
            running.cancel()  # for Ctrl-C in this thread; what has ended by itself is past it
            raise

    def close(self) -> None:
        self.is_closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
