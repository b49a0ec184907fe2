"""Many images in few requests: what is still to be answered, and by which place in a request."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from loraseg.client.images import ImageInput, Upload, prepare_upload
from loraseg.client.parsing import (
    JsonObject,
    invalid_response,
    parse_json,
    parse_segment_response,
    problem_error,
)
from loraseg.client.requests import Request, segment_batch_request
from loraseg.client.responses import SegmentResponse
from loraseg.client.retry import RetryableError
from loraseg.errors import DatasetError, ServiceError

__all__ = ["PendingBatch", "UploadGroup", "group_uploads"]

# A request stays well below what endpoints take by default.
_MAX_IMAGES = 16
_MAX_BYTES = 16 * 2**20


@dataclass(slots=True)
class UploadGroup:
    """Images of one request by their index among all, and files that cannot be sent."""

    uploads: dict[int, Upload] = field(default_factory=dict[int, Upload])
    failures: dict[int, DatasetError] = field(default_factory=dict[int, DatasetError])


def group_uploads(images: Iterable[ImageInput]) -> Iterator[UploadGroup]:
    """Split images into requests of bounded count and size, reading no further than needed."""
    group, size = UploadGroup(), 0
    for index, image in enumerate(images):
        try:
            upload = prepare_upload(image)
        except DatasetError as error:
            group.failures[index] = error
        else:
            if group.uploads and size + len(upload.data) > _MAX_BYTES:
                yield group
                group, size = UploadGroup(), 0
            group.uploads[index] = upload
            size += len(upload.data)
        if len(group.uploads) + len(group.failures) == _MAX_IMAGES:
            yield group
            group, size = UploadGroup(), 0
    if group.uploads or group.failures:
        yield group


class PendingBatch:
    """A group on its way to being answered, by one request or, after failures, several."""

    def __init__(
        self, uploads: Mapping[int, Upload], form: Mapping[str, str], classes: int
    ) -> None:
        self.pending = dict(uploads)
        self._form = form
        self._classes = classes
        self._sent: list[int] = []
        self._retryable: dict[int, ServiceError] = {}
        self._is_complete = False

    def next_request(self) -> Request:
        """Return a request for what has not been answered."""
        self._sent = list(self.pending)
        self._retryable = {}
        self._is_complete = False
        return segment_batch_request(list(self.pending.values()), self._form)

    def parse_line(self, line: bytes) -> tuple[int, SegmentResponse | ServiceError] | None:
        """Take in a line of the answer; return the image that it settles, if it does.

        Raises:
            ServiceError: ``bad_reply``: the line does not belong to the question.
        """
        told = JsonObject(parse_json(line))
        if not told.has("index"):
            self._is_complete = told.has("done")
            return None
        place = told.integer("index")
        index = self._sent[place] if 0 <= place < len(self._sent) else None
        if index not in self.pending or index in self._retryable:
            raise invalid_response(
                f"index {place} of {len(self._sent)} images, or for a second time"
            )
        if told.has("error"):
            error = problem_error(told.child("error"))
            # An image that ran out of time may only have waited for the others of its request.
            if isinstance(error, RetryableError) or error.code == "deadline":
                self._retryable[index] = error
                return None
            del self.pending[index]
            return index, error
        reply = parse_segment_response(told, self.pending[index], self._classes)
        del self.pending[index]
        return index, reply

    def retry_reason(self) -> ServiceError | None:
        """Tell, at the end of an answer, why images are pending; None if none is.

        Raises:
            ServiceError: ``bad_reply``: the endpoint forgot some. A ``RetryableError``: the answer
                broke off before its last line.
        """
        if not self._is_complete:
            raise RetryableError("unreachable", "the answer broke off")
        if forgotten := self.pending.keys() - self._retryable.keys():
            raise invalid_response(f"it leaves out {len(forgotten)} of {len(self._sent)} images")
        for error in self._retryable.values():
            return RetryableError(error.code, str(error), retry_after_s=error.retry_after_s)
        return None

    def remaining_errors(self) -> Iterator[tuple[int, ServiceError]]:
        """Yield what is pending with its latest refusal."""
        yield from self._retryable.items()
