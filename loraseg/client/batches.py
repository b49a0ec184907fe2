"""Many images in few requests: what is still to be answered, and by which place in a request."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from loraseg.client.asking import Question, segment_batch_question
from loraseg.client.parsing import Node, bad_reply, parse_json, parse_reply, problem
from loraseg.client.pictures import ImageInput, Upload, prepare
from loraseg.client.reply import Reply
from loraseg.client.retry import PassingError
from loraseg.errors import DatasetError, ServiceError

__all__ = ["Batch", "Group", "groups"]

# A request stays well below what endpoints take by default.
_IMAGES = 16
_BYTES = 16 * 2**20


@dataclass(slots=True)
class Group:
    """Images of one request by their index among all, and files that cannot be sent."""

    uploads: dict[int, Upload] = field(default_factory=dict[int, Upload])
    failures: dict[int, DatasetError] = field(default_factory=dict[int, DatasetError])


def groups(images: Iterable[ImageInput]) -> Iterator[Group]:
    """Split images into requests of bounded count and size, reading no further than needed."""
    group, size = Group(), 0
    for index, image in enumerate(images):
        try:
            upload = prepare(image)
        except DatasetError as error:
            group.failures[index] = error
        else:
            if group.uploads and size + len(upload.data) > _BYTES:
                yield group
                group, size = Group(), 0
            group.uploads[index] = upload
            size += len(upload.data)
        if len(group.uploads) + len(group.failures) == _IMAGES:
            yield group
            group, size = Group(), 0
    if group.uploads or group.failures:
        yield group


class Batch:
    """A group on its way to being answered, by one request or, after failures, several."""

    def __init__(
        self, uploads: Mapping[int, Upload], form: Mapping[str, str], classes: int
    ) -> None:
        self.pending = dict(uploads)
        self._form = form
        self._classes = classes
        self._asked: list[int] = []
        self._refused: dict[int, ServiceError] = {}
        self._is_whole = False

    def question(self) -> Question:
        """Return a request for what has not been answered."""
        self._asked = list(self.pending)
        self._refused = {}
        self._is_whole = False
        return segment_batch_question(list(self.pending.values()), self._form)

    def read(self, line: bytes) -> tuple[int, Reply | ServiceError] | None:
        """Take in a line of the answer; return the image that it settles, if it does.

        Raises:
            ServiceError: ``bad_reply``: the line does not belong to the question.
        """
        told = Node(parse_json(line))
        if not told.has("index"):
            self._is_whole = told.has("done")
            return None
        place = told.whole("index")
        index = self._asked[place] if 0 <= place < len(self._asked) else None
        if index not in self.pending or index in self._refused:
            raise bad_reply(f"index {place} of {len(self._asked)} images, or for a second time")
        if told.has("error"):
            error = problem(told.node("error"))
            # An image that ran out of time may only have waited for the others of its request.
            if isinstance(error, PassingError) or error.code == "deadline":
                self._refused[index] = error
                return None
            del self.pending[index]
            return index, error
        reply = parse_reply(told, self.pending[index], self._classes)
        del self.pending[index]
        return index, reply

    def close(self) -> ServiceError | None:
        """Tell, at the end of an answer, why images are pending; None if none is.

        Raises:
            ServiceError: ``bad_reply``: the endpoint forgot some. A ``PassingError``: the answer
                broke off before its last line.
        """
        if not self._is_whole:
            raise PassingError("unreachable", "the answer broke off")
        if forgotten := self.pending.keys() - self._refused.keys():
            raise bad_reply(f"it leaves out {len(forgotten)} of {len(self._asked)} images")
        for error in self._refused.values():
            return PassingError(error.code, str(error), retry_after_s=error.retry_after_s)
        return None

    def give_up(self) -> Iterator[tuple[int, ServiceError]]:
        """Yield what is pending with its latest refusal."""
        yield from self._refused.items()
