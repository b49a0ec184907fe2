"""What a caller may know of the libraries: only the adapters that its token sees."""

from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

from loraseg.errors import ServiceError
from loraseg.serving.engine import AdapterView, CatalogView, Engine
from loraseg.serving.http_api.auth import Principal

__all__ = ["adapter_card", "adapter_list", "library_state"]


def adapter_list(view: CatalogView, principal: Principal) -> dict[str, Any]:
    """Return the adapters of a library that the caller sees."""
    return {
        "library": view.library,
        "generation": view.generation,
        "adapters": [asdict(adapter) for adapter in _visible_adapters(view, principal)],
    }


def library_state(
    view: CatalogView, principal: Principal, libraries: tuple[str, ...]
) -> dict[str, Any]:
    """Return a library's state, with counts of what the caller sees."""
    seen = _visible_adapters(view, principal)
    return {
        "library": view.library,
        "generation": view.generation,
        "loaded_s": round(view.loaded_s, 3),
        "checked_s": round(view.checked_s, 3),
        "problem": view.problem,
        "adapters": len(seen),
        "unavailable": sum(adapter.unavailable is not None for adapter in seen),
        "misfits": view.incompatible,
        "libraries": [{"library": name} for name in libraries],
    }


async def adapter_card(
    engine: Engine, library: str, name: str, principal: Principal
) -> dict[str, Any]:
    """Return the card of an adapter.

    Raises:
        ServiceError: ``no_such_adapter``, in the same words whether there is none or the caller
            does not see it.
    """
    absent = ServiceError("no_such_adapter", f"The library {library!r} has no such adapter.")
    if not _is_visible(principal, name):
        raise absent
    try:
        return await engine.card(library, name)
    except ServiceError as error:
        raise absent if error.code == "no_such_adapter" else error from error


def _visible_adapters(view: CatalogView, principal: Principal) -> list[AdapterView]:
    return [adapter for adapter in view.adapters if _is_visible(principal, adapter.name)]


def _is_visible(principal: Principal, name: str) -> bool:
    return principal.visible is None or any(fnmatchcase(name, each) for each in principal.visible)
