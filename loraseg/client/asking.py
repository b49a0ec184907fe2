"""Requests: what a caller wants, as form fields and parts."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from loraseg.client.pictures import Upload

__all__ = ["Options", "Question", "fields", "segment_batch_question", "segment_question"]

# Everything but the maps: explanations with thousands of adapters are long.
_TEXT_BYTES = 16 * 2**20


class Options(TypedDict, total=False):
    """What may be said about a segmentation; the endpoint decides what is left out.

    Attributes:
        library: The endpoint's name of a library.
        top_k: Number of nearest adapters that are fused.
        temperature: Sharpness of their weights.
        adapters: Names of adapters: with ``rain``, exactly those that are named are used; with
            ``-rain``, it is not used.
        mode: Nearest adapters, all adapters alike, or none.
        maps: Further maps to return: ``confidence``, ``entropy``.
        tiling: Whether the image is cut into overlapping tiles.
        timeout_s: For this call, instead of the client's.
    """

    library: str | None
    top_k: int | None
    temperature: float | None
    adapters: Sequence[str]
    mode: Literal["fused", "uniform", "base"] | None
    maps: Collection[Literal["confidence", "entropy"]]
    tiling: Literal["auto", "never", "always"] | None
    timeout_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One request, ready to be sent any number of times.

    Attributes:
        method: Of HTTP.
        path: Below the endpoint's URL.
        params: Of the query.
        form: Fields of a multipart body.
        files: Its files: field, (name, bytes, media type).
        limit: Most bytes of an answer.
    """

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict[str, str])
    form: Mapping[str, str] = field(default_factory=dict[str, str])
    files: tuple[tuple[str, tuple[str, bytes, str]], ...] = ()
    limit: int = 4 * _TEXT_BYTES

    def within(self, left_s: float) -> "Question":
        """Tell the endpoint how long its answer is waited for; it need not work on after that."""
        if not self.form:
            return self
        return replace(self, form={**self.form, "timeout_s": f"{max(left_s, 0.001):.3f}"})


def fields(classes: Sequence[str], options: Options) -> dict[str, str]:
    """Return the parameters of a segmentation, without those that are left to the endpoint."""
    wanted = ("mask", *sorted(set(options.get("maps", ()))), "explanation")
    named = {
        "library": options.get("library"),
        "top_k": options.get("top_k"),
        "temperature": options.get("temperature"),
        "adapters": ",".join(options.get("adapters", ())) or None,
        "mode": options.get("mode"),
        "tiling": options.get("tiling"),
    }
    said = {name: str(value) for name, value in named.items() if value is not None}
    return {"classes": json.dumps(list(classes)), "return": ",".join(wanted), **said}


def segment_question(upload: Upload, form: Mapping[str, str]) -> Question:
    """Return the request for one image."""
    return Question(
        method="POST",
        path="/v1/segment",
        form=form,
        files=(_part("image", 0, upload),),
        limit=_room(upload, form),
    )


def segment_batch_question(uploads: Sequence[Upload], form: Mapping[str, str]) -> Question:
    """Return the request for several images; the limit is that of one line of the answer."""
    return Question(
        method="POST",
        path="/v1/segment/batch",
        form=form,
        files=tuple(_part("images", place, upload) for place, upload in enumerate(uploads)),
        limit=max(_room(upload, form) for upload in uploads),
    )


def _part(name: str, place: int, upload: Upload) -> tuple[str, tuple[str, bytes, str]]:
    # File names may tell what they should not, and the endpoint needs none.
    return name, (str(place), upload.data, upload.content_type)


def _room(upload: Upload, form: Mapping[str, str]) -> int:
    """Return how long an honest answer can be: maps as PNG that did not compress, in base64."""
    maps = form["return"].count(",")
    rows = max(max(shape) for shape in upload.shapes)
    return _TEXT_BYTES + maps * ((upload.pixels + rows) * 3 // 2)
