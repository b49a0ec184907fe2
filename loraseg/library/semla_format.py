"""Import and export of the ``loradb`` folder of the official SemLA repository.

One folder per domain: ``adapter_config.json``, ``adapter_model.safetensors`` and
``<domain>_statistics.npz`` with the array ``train_average_embedding`` (1, d) float32.
"""

import io
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from loraseg.adapters.peft_io import CONFIG_FILE, WEIGHTS_FILE
from loraseg.errors import AdapterMismatchError, IntegrityError
from loraseg.library.card import AdapterCard, BaseModelInfo
from loraseg.library.catalog import Library, PublishItem
from loraseg.library.centroid import MAX_DIMENSIONS, Centroid
from loraseg.library.snapshot import CatalogEntry
from loraseg.tensor_types import Float, ndarray

__all__ = ["SEMLA_ENCODER_ID", "export_loradb", "import_loradb", "read_domain"]


SEMLA_ENCODER_ID = "openai/clip-vit-large-patch14"
_ARRAY = "train_average_embedding"
_RECIPE_KEY = "loradb_domain"
_MAX_ARRAY_BYTES = 8 * MAX_DIMENSIONS + 4096
_DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def import_loradb(
    folder: str | Path,
    library: Library,
    base: BaseModelInfo,
    *,
    encoder_id: str = SEMLA_ENCODER_ID,
    label_spaces: Mapping[str, Sequence[str]] | None = None,
) -> tuple[CatalogEntry, ...]:
    """Publish every domain of a ``loradb`` folder, in one generation.

    Args:
        folder: Holds one folder a domain; others and files are passed over.
        library: Where to.
        base: What the adapters were trained on; the folder does not say.
        encoder_id: What the embeddings were made with.
        label_spaces: Class names by domain, where known.

    Raises:
        IntegrityError: The folder holds no domain, or a domain is incomplete or malformed.
        StoreError: As :meth:`Library.publish_all`.
    """
    known = label_spaces or {}
    items = [
        read_domain(path, base, encoder_id=encoder_id, label_space=tuple(known.get(path.name, ())))
        for path in _domain_folders(Path(folder))
    ]
    return library.publish_all(items)


def read_domain(
    folder: Path,
    base: BaseModelInfo,
    *,
    encoder_id: str = SEMLA_ENCODER_ID,
    label_space: tuple[str, ...] = (),
) -> PublishItem:
    """Read one domain: (name in lower case, files, card); count and spread are unknown.

    Raises:
        IntegrityError: A file is missing or malformed.
    """
    domain = folder.name
    if not _DOMAIN.fullmatch(domain):
        raise IntegrityError(f"{folder}: the folder's name cannot be an adapter's")
    files = {name: _read_bytes(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    vector = _read_embedding(folder / f"{domain}_statistics.npz")
    card = AdapterCard(
        name=domain.lower(),
        role="segmenter",
        base=base,
        label_space=label_space,
        centroids=(Centroid(encoder_id, False, vector, None, None),),
        recipe={"source": "loradb", _RECIPE_KEY: domain},
    )
    return card.name, files, card


def export_loradb(
    library: Library, folder: str | Path, names: Collection[str] | None = None
) -> tuple[Path, ...]:
    """Write the current version of adapters as a ``loradb`` folder and return its domain folders.

    Args:
        library: Where from.
        folder: Created if missing; files of the same name in it are replaced.
        names: Which adapters; None for all.

    Raises:
        AdapterMismatchError: An adapter has not exactly one centroid, or one of normalised
            embeddings, which the format cannot express.
        AdapterNotFoundError: A name is unknown.
        IntegrityError: A stored object is missing or damaged.
    """
    entries = library.entries() if names is None else [library.entry(name) for name in names]
    return tuple(_export_entry(library, entry, Path(folder)) for entry in entries)


def _export_entry(library: Library, entry: CatalogEntry, folder: Path) -> Path:
    centroids = entry.card.centroids
    if len(centroids) != 1 or centroids[0].normalised:
        raise AdapterMismatchError(
            f"adapter {entry.name!r} has {len(centroids)} centroids; a loradb folder holds exactly "
            "one, of embeddings that were not normalised"
        )
    files, _ = library.load_entry(entry)
    domain = _domain_name(entry)
    target = folder / domain
    target.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (target / name).write_bytes(files[name])
    array = centroids[0].vector.astype(np.float32)[None, :]
    np.savez(target / f"{domain}_statistics.npz", train_average_embedding=array)
    return target


def _domain_name(entry: CatalogEntry) -> str:
    """Return the folder's name: the original one where only its case was changed on import."""
    original = entry.card.recipe.get(_RECIPE_KEY)
    return original if isinstance(original, str) and original.lower() == entry.name else entry.name


def _domain_folders(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise IntegrityError(f"{folder}: no such folder")
    found = sorted(path for path in folder.iterdir() if (path / CONFIG_FILE).is_file())
    if not found:
        raise IntegrityError(f"{folder}: no folder in it holds an {CONFIG_FILE}")
    yield from found


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror})") from error


def _read_embedding(path: Path) -> Float[ndarray, " d"]:
    data = _read_bytes(path)
    try:
        # A zip's entry may unpack to far more than the file's size: look before reading.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size_bytes = archive.getinfo(f"{_ARRAY}.npy").file_size
        if size_bytes > _MAX_ARRAY_BYTES:
            raise ValueError(f"unpacks to {size_bytes} bytes, at most {_MAX_ARRAY_BYTES}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            array = arrays[_ARRAY]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path}: no readable array {_ARRAY} ({error})") from error
    if array.dtype.kind != "f" or array.ndim != 2 or array.shape[0] != 1:
        raise IntegrityError(
            f"{path}: {_ARRAY} is {array.dtype} of shape {array.shape}, expected floats of (1, d)"
        )
    return array[0].astype(np.float64)
