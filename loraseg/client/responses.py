"""The reply for one image, as numpy arrays and plain values."""

from dataclasses import dataclass

from numpy import ndarray

from loraseg.api_types import ReplyExplanation

__all__ = ["SegmentResponse"]


# Not comparable: == of arrays is not one truth value.
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SegmentResponse(ReplyExplanation):
    """One segmented image.

    Attributes:
        label_map: Class index of each pixel, uint8 (h, w), of the image as a viewer shows it.
        class_names: By index, as the endpoint parsed them.
        palette: RGB of each class, uint8 (n, 3).
        confidence: Score of the predicted class, float32 (h, w) in [0, 1] in steps of 1/255, if
            requested.
        entropy: Of the classes' scores, float32 (h, w) in [0, 1] in steps of 1/255, if requested.
        request_id: The endpoint's, for its logs.
    """

    label_map: ndarray
    class_names: tuple[str, ...]
    palette: ndarray
    confidence: ndarray | None
    entropy: ndarray | None
    request_id: str
