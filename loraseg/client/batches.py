"""Batch requests: groups of images, and which of them have no result yet."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from loraseg.client.images import ImageInput, Upload, prepare_upload
from loraseg.client.parsing import (
    BatchLine,
    invalid_response,
    parse,
    parse_segment_response,
    problem_error,
)
from loraseg.client.requests import Request, segment_batch_request
from loraseg.client.responses import SegmentResponse
from loraseg.client.retry import RetryableError
from loraseg.errors import DatasetError, ServiceError

__all__ = ["PendingBatch", "UploadGroup", "group_uploads"]

# Well below the default limits of endpoints.
_MAX_IMAGES = 16
_MAX_BYTES = 16 * 2**20


@dataclass(slots=True)
class UploadGroup:
    """Images of one request by their index among all images, and errors of unusable files."""

    uploads: dict[int, Upload] = field(default_factory=dict[int, Upload])
    failures: dict[int, DatasetError] = field(default_factory=dict[int, DatasetError])


def group_uploads(images: Iterable[ImageInput]) -> Iterator[UploadGroup]:
    """Group images into requests of bounded count and size; ``images`` is read lazily."""
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
    """The images of a group without a result, over one request and its retries."""

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
        """Return a request for the images without a result."""
        self._sent = list(self.pending)
        self._retryable = {}
        self._is_complete = False
        return segment_batch_request(list(self.pending.values()), self._form)

    def parse_line(self, line: bytes) -> tuple[int, SegmentResponse | ServiceError] | None:
        """Parse a line of the response; return index and result of its image, if final.

        Raises:
            ServiceError: ``bad_reply``: the line does not match the request.
        """
        head = parse(line, BatchLine)
        if head.index is None:
            self._is_complete = head.done is not None
            return None
        index = self._sent[head.index] if 0 <= head.index < len(self._sent) else None
        if index not in self.pending or index in self._retryable:
            raise invalid_response(
                f"index {head.index} of {len(self._sent)} images, or for a second time"
            )
        if head.error is not None:
            error = problem_error(head.error)
            # The deadline may have passed while the image waited for others of its request.
            if isinstance(error, RetryableError) or error.code == "deadline":
                self._retryable[index] = error
                return None
            del self.pending[index]
            return index, error
        response = parse_segment_response(line, self.pending[index], self._classes)
        del self.pending[index]
        return index, response

    def retry_reason(self) -> ServiceError | None:
        """Return, after the last line, why images have no result; None if all have one.

        Raises:
            ServiceError: ``bad_reply``: the response omits images. A ``RetryableError``: the
                response ended before its last line.
        """
        if not self._is_complete:
            raise RetryableError("unreachable", "the response ended early")
        if omitted := self.pending.keys() - self._retryable.keys():
            raise invalid_response(f"it omits {len(omitted)} of {len(self._sent)} images")
        for error in self._retryable.values():
            return RetryableError(error.code, str(error), retry_after_s=error.retry_after_s)
        return None

    def remaining_errors(self) -> Iterator[tuple[int, ServiceError]]:
        """Yield the indices of images without a result, each with its latest error."""
        yield from self._retryable.items()
