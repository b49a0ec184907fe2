"""Load adapters of a generator from a folder or a library and check them against its base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from loraseg.adapters.attention_mix import MAX_ATTENTION_MIX_BYTES, decode_attention_mix
from loraseg.adapters.packed import pack
from loraseg.adapters.peft_io import ATTENTION_MIX_FILE, load_adapter
from loraseg.backbones.diffusion import DiffusionBase
from loraseg.errors import AdapterMismatchError, ConfigError, IntegrityError
from loraseg.library.card import MAX_CARD_BYTES, AdapterCard
from loraseg.library.catalog import Library
from loraseg.storage import open_store
from loraseg.synth.generator_adapter import GeneratorAdapter

__all__ = ["ACTIVE_ADAPTERS_KEY", "LoadedGeneratorAdapter", "load_generator_adapter"]

# Key of a card's recipe: digests of the adapters that were active while this one was trained.
ACTIVE_ADAPTERS_KEY = "active_adapters"
_CARD_FILE = "card.json"


@dataclass(frozen=True, slots=True)
class LoadedGeneratorAdapter:
    """An adapter of a generator, and its card; None without a card."""

    adapter: GeneratorAdapter
    card: AdapterCard | None


def load_generator_adapter(
    spec: str, base: DiffusionBase, *, weight: float = 1.0
) -> LoadedGeneratorAdapter:
    """Load an adapter and check that its role is generator and that it was trained on this base.

    Args:
        spec: A folder with peft's two files, and optionally ``fusion.safetensors`` and
            ``card.json``; or ``URI#NAME`` or ``URI#NAME@VERSION`` for an adapter of a library.
        base: The base to use it with. Its digest is compared with card and peft config.
        weight: Factor of the adapter's update of the weights.

    Raises:
        ConfigError: The folder does not exist, or the spec has neither form.
        AdapterNotFoundError: The library has no such adapter or version.
        AdapterMismatchError: It has another role or base, or is not plain LoRA.
        IntegrityError: A file is missing, damaged or has the wrong format.
        StoreError: The library cannot be reached.
    """
    folder = Path(spec)
    if folder.is_dir():
        card, fusion_bytes = _read_optional_files(folder)
        adapter = load_adapter(folder, name=card.name if card else None)
    else:
        files, card = _load_from_library(spec)
        adapter = load_adapter(files, name=card.name)
        fusion_bytes = files.get(ATTENTION_MIX_FILE)
    card_digest = adapter.base_digest
    if card is not None:
        if card.role != "generator":
            raise AdapterMismatchError(
                f"adapter {spec}: its role is {card.role}, expected generator"
            )
        card_digest = card.base.digest
    for digest in (adapter.base_digest, card_digest):
        if digest is not None and digest != base.digest:
            raise AdapterMismatchError(
                f"adapter {spec}: trained on base {digest[:12]}, expected {base.digest[:12]} "
                f"({base.name})"
            )
    return LoadedGeneratorAdapter(
        GeneratorAdapter(
            adapter=pack(adapter),
            weight=weight,
            attention_mix=None if fusion_bytes is None else decode_attention_mix(fusion_bytes),
            trained_with=_trained_with(card),
        ),
        card,
    )


def _read_optional_files(folder: Path) -> tuple[AdapterCard | None, bytes | None]:
    """Return the card and the bytes of ``fusion.safetensors``, None for missing files."""
    card, fusion = folder / _CARD_FILE, folder / ATTENTION_MIX_FILE
    if card.is_file() and card.stat().st_size > MAX_CARD_BYTES:
        raise IntegrityError(f"{card}: larger than {MAX_CARD_BYTES} bytes")
    if fusion.is_file() and fusion.stat().st_size > MAX_ATTENTION_MIX_BYTES:
        raise IntegrityError(f"{fusion}: larger than {MAX_ATTENTION_MIX_BYTES} bytes")
    return (
        AdapterCard.from_bytes(card.read_bytes()) if card.is_file() else None,
        fusion.read_bytes() if fusion.is_file() else None,
    )


def _load_from_library(spec: str) -> tuple[dict[str, bytes], AdapterCard]:
    uri, mark, name = spec.rpartition("#")
    if not mark or not uri or not name:
        raise ConfigError(f"adapter {spec}: no such folder, and no LIBRARY#NAME[@VERSION]")
    name, mark, version = name.partition("@")
    if mark and not version.isdecimal():
        raise ConfigError(f"adapter {spec}: version {version!r}, expected a number")
    return Library(open_store(uri)).load(name, int(version) if mark else None)


def _trained_with(card: AdapterCard | None) -> tuple[str, ...] | None:
    active: Any = card.recipe.get(ACTIVE_ADAPTERS_KEY) if card else None
    if not isinstance(active, list):
        return None
    return tuple(str(digest) for digest in cast(list[Any], active))
