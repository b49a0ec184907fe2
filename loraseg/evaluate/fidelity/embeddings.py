"""CLIP embeddings of the centre square and of the whole frame of each image.

CMMD (arXiv 2401.09603, google-research/cmmd ``embedding.py``) embeds the centre square, resized
bicubically with antialiasing. Wide frames lose their sides, so the whole frame is embedded as well.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from loraseg.backbones.clip import ClipEncoder
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.untrusted_images import decode_image
from loraseg.errors import DatasetError, IntegrityError
from loraseg.evaluate.fidelity.measures import l2_normalise
from loraseg.tensor_types import Float, UInt8, ndarray

__all__ = [
    "EmbeddedImages",
    "View",
    "centre_crop_square",
    "embed_images",
    "embed_pairs",
    "resize_to_square",
    "view_encoder_id",
]

View = Literal["crop", "whole"]

_COLUMNS = ("pair_id", "mask_id", "image", "prompt")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EmbeddedImages:
    """Float64 embeddings of unit length, one row per image.

    Attributes:
        names: Sample ids or pair ids.
        cropped: Embeddings of the centre square of each image.
        whole: Embeddings of the whole image, resized to a square.
        masks: Id of the mask from which each image was generated; empty for real images.
        prompts: Indices (p,) of the images that have a prompt, and the unit embeddings (p, d) of
            their prompts; None if no image has one.
    """

    names: tuple[str, ...]
    cropped: Float[ndarray, "n d"]
    whole: Float[ndarray, "n d"]
    masks: tuple[str, ...] = ()
    prompts: tuple[ndarray, ndarray] | None = None


def embed_images(
    encoder: ClipEncoder, images: Iterable[tuple[str, UInt8[ndarray, "h w 3"]]]
) -> EmbeddedImages:
    """Embed named images in both views; square images, whose views are equal, are embedded once.

    Raises:
        DatasetError: There are no images.
        StageError: An embedding is not finite.
    """
    names: list[str] = []
    crops: list[ndarray] = []
    wholes: list[ndarray] = []
    edge = encoder.preprocessing.size
    for batch in _batches(images, encoder.batch_size):
        names += [name for name, _ in batch]
        crop = encoder.encode_images([centre_crop_square(image, edge) for _, image in batch])
        wide = [row for row, (_, image) in enumerate(batch) if image.shape[0] != image.shape[1]]
        whole = crop.copy()
        whole[wide] = encoder.encode_images([resize_to_square(batch[row][1], edge) for row in wide])
        crops.append(crop)
        wholes.append(whole)
    if not names:
        raise DatasetError("embeddings: there are no images")
    return EmbeddedImages(
        names=tuple(names),
        cropped=l2_normalise(np.concatenate(crops)),
        whole=l2_normalise(np.concatenate(wholes)),
    )


def embed_pairs(encoder: ClipEncoder, dataset: ShardDataset) -> EmbeddedImages:
    """Embed the images and prompts of the rows of a synthetic dataset with status ``ok``.

    Raises:
        DatasetError: There are no such rows, or an image cannot be decoded.
        IntegrityError: A shard does not match the manifest.
        StoreError: The store cannot be read.
        StageError: An embedding is not finite.
    """
    masks: list[str] = []
    prompts: list[str | None] = []

    def images() -> Iterator[tuple[str, ndarray]]:
        for row in dataset.rows(columns=_COLUMNS):
            if row.pair_id is None or row.image is None:
                raise IntegrityError(f"mask {row.mask_name!r}: pair without an id or an image")
            try:
                image = decode_image(row.image)
            except DatasetError as error:
                raise DatasetError(f"pair {row.pair_id}: {error}") from error
            # Without a mask id the images of the same mask are unknown.
            masks.append(row.mask_id or row.pair_id)
            prompts.append(row.prompt)
            yield row.pair_id, image

    embedded = embed_images(encoder, images())
    return replace(embedded, masks=tuple(masks), prompts=_embed_prompts(encoder, prompts))


def centre_crop_square(image: UInt8[ndarray, "h w 3"], edge: int) -> UInt8[ndarray, "s s 3"]:
    """Return the centre square, resized bicubically with antialiasing."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize_to_square(image[top : top + side, left : left + side], edge)


def resize_to_square(image: UInt8[ndarray, "h w 3"], edge: int) -> UInt8[ndarray, "s s 3"]:
    """Return the whole image resized to a square, bicubically with antialiasing."""
    return np.asarray(Image.fromarray(image).resize((edge, edge), Image.Resampling.BICUBIC))


def view_encoder_id(encoder: ClipEncoder, view: View) -> str:
    """Return an identifier of weights and preprocessing, like ``ClipEncoder.encoder_id``."""
    return f"clip:sha256-{encoder.digest[:16]}:square{encoder.preprocessing.size}-bicubic-{view}"


def _embed_prompts(
    encoder: ClipEncoder, prompts: list[str | None]
) -> tuple[ndarray, ndarray] | None:
    """Return the indices of the images with a prompt and the embeddings of their prompts.

    Equal prompts are embedded once.
    """
    rows = np.array([row for row, prompt in enumerate(prompts) if prompt], dtype=np.int64)
    if not rows.size:
        return None
    texts, members = np.unique([prompts[row] for row in rows], return_inverse=True)
    embeddings = [
        encoder.encode_texts([str(text) for text in texts[start : start + encoder.batch_size]])
        for start in range(0, len(texts), encoder.batch_size)
    ]
    return rows, l2_normalise(np.concatenate(embeddings))[members]


def _batches(
    images: Iterable[tuple[str, UInt8[ndarray, "h w 3"]]], size: int
) -> Iterator[list[tuple[str, ndarray]]]:
    remaining = iter(images)
    while batch := list(itertools.islice(remaining, size)):
        yield batch
