"""Images as CLIP embeddings of their middle square and of the whole frame (methods a.5)."""

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
    """Images as float64 embeddings of unit length, one row each.

    Attributes:
        names: Sample ids or pair ids.
        cropped: Of the middle square of each image.
        whole: Of the whole image, its sides squeezed to a square.
        masks: Which mask each image was made from; empty for real ones.
        prompts: Rows of images that have a prompt, and the unit embeddings of their prompts.
    """

    names: tuple[str, ...]
    cropped: Float[ndarray, "n d"]
    whole: Float[ndarray, "n d"]
    masks: tuple[str, ...] = ()
    prompts: tuple[ndarray, ndarray] | None = None


def embed_images(
    encoder: ClipEncoder, images: Iterable[tuple[str, UInt8[ndarray, "h w 3"]]]
) -> EmbeddedImages:
    """Embed named images, each in both views; square ones, whose views are the same, once.

    Raises:
        DatasetError: There is no image.
        StageError: An embedding is not finite.
    """
    names: list[str] = []
    crops: list[ndarray] = []
    wholes: list[ndarray] = []
    edge = encoder.preprocessing.size
    for some in _batches(images, encoder.batch_size):
        names += [name for name, _ in some]
        crop = encoder.encode_images([centre_crop_square(image, edge) for _, image in some])
        wide = [row for row, (_, image) in enumerate(some) if image.shape[0] != image.shape[1]]
        all_of = crop.copy()
        all_of[wide] = encoder.encode_images([resize_to_square(some[row][1], edge) for row in wide])
        crops.append(crop)
        wholes.append(all_of)
    if not names:
        raise DatasetError("embeddings: there is no image")
    return EmbeddedImages(
        names=tuple(names),
        cropped=l2_normalise(np.concatenate(crops)),
        whole=l2_normalise(np.concatenate(wholes)),
    )


def embed_pairs(encoder: ClipEncoder, dataset: ShardDataset) -> EmbeddedImages:
    """Embed the images and the prompts of a synthetic dataset's rows with status ``ok``.

    Raises:
        DatasetError: There is none, or an image cannot be decoded.
        IntegrityError: A shard is not what the manifest says.
        StoreError: The store cannot be read.
        StageError: An embedding is not finite.
    """
    masks: list[str] = []
    prompts: list[str | None] = []

    def images() -> Iterator[tuple[str, ndarray]]:
        for row in dataset.rows(columns=_COLUMNS):
            if row.pair_id is None or row.image is None:
                raise IntegrityError(f"mask {row.mask_name!r}: a pair without an id or an image")
            try:
                image = decode_image(row.image)
            except DatasetError as error:
                raise DatasetError(f"pair {row.pair_id}: {error}") from error
            # A mask without an id has no known siblings.
            masks.append(row.mask_id or row.pair_id)
            prompts.append(row.prompt)
            yield row.pair_id, image

    found = embed_images(encoder, images())
    return replace(found, masks=tuple(masks), prompts=_embed_prompts(encoder, prompts))


def centre_crop_square(image: UInt8[ndarray, "h w 3"], edge: int) -> UInt8[ndarray, "s s 3"]:
    """Cut the middle square out, then resize it (bicubic, antialiased), as CMMD does."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize_to_square(image[top : top + side, left : left + side], edge)


def resize_to_square(image: UInt8[ndarray, "h w 3"], edge: int) -> UInt8[ndarray, "s s 3"]:
    """Resize all of an image to a square (bicubic, antialiased), whatever its sides."""
    return np.asarray(Image.fromarray(image).resize((edge, edge), Image.Resampling.BICUBIC))


def view_encoder_id(encoder: ClipEncoder, view: View) -> str:
    """Name weights and preprocessing, in the manner of ``ClipEncoder.encoder_id``."""
    return f"clip:sha256-{encoder.digest[:16]}:square{encoder.preprocessing.size}-bicubic-{view}"


def _embed_prompts(
    encoder: ClipEncoder, prompts: list[str | None]
) -> tuple[ndarray, ndarray] | None:
    """Return the rows that have a prompt and their prompts' embeddings, each text embedded once."""
    rows = np.array([row for row, prompt in enumerate(prompts) if prompt], dtype=np.int64)
    if not rows.size:
        return None
    texts, members = np.unique([prompts[row] for row in rows], return_inverse=True)
    found = [
        encoder.encode_texts([str(text) for text in texts[start : start + encoder.batch_size]])
        for start in range(0, len(texts), encoder.batch_size)
    ]
    return rows, l2_normalise(np.concatenate(found))[members]


def _batches(
    images: Iterable[tuple[str, UInt8[ndarray, "h w 3"]]], size: int
) -> Iterator[list[tuple[str, ndarray]]]:
    batch: list[tuple[str, ndarray]] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
