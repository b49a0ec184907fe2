"""Replies about libraries, restricted to the adapters that the client's token may see."""

from fnmatch import fnmatchcase
from typing import Any

from loraseg.api_types import AdapterInfo, AdapterList, LibraryInfo, LibraryName
from loraseg.errors import ServiceError
from loraseg.serving.engine import CatalogView, Engine
from loraseg.serving.http_api.auth import Principal

__all__ = ["adapter_card", "adapter_list", "library_info"]


def adapter_list(view: CatalogView, principal: Principal) -> AdapterList:
    """Return the adapters of a library that the client may see."""
    return AdapterList(
        library=view.library,
        generation=view.generation,
        adapters=_visible_adapters(view, principal),
    )


def library_info(
    view: CatalogView, principal: Principal, libraries: tuple[str, ...]
) -> LibraryInfo:
    """Return a library's state; the counts include only adapters that the client may see."""
    visible = _visible_adapters(view, principal)
    return LibraryInfo(
        library=view.library,
        generation=view.generation,
        loaded_s=round(view.loaded_s, 3),
        checked_s=round(view.checked_s, 3),
        problem=view.problem,
        adapters=len(visible),
        unavailable=sum(adapter.unavailable is not None for adapter in visible),
        misfits=view.incompatible,
        libraries=tuple(LibraryName(name) for name in libraries),
    )


async def adapter_card(
    engine: Engine, library: str, name: str, principal: Principal
) -> dict[str, Any]:
    """Return the card of an adapter.

    Raises:
        ServiceError: ``no_such_adapter``, with the same message for an unknown adapter and for
            one that the client may not see.
    """
    not_found = ServiceError("no_such_adapter", f"The library {library!r} has no such adapter.")
    if not _is_visible(principal, name):
        raise not_found
    try:
        return await engine.card(library, name)
    except ServiceError as error:
        raise not_found if error.code == "no_such_adapter" else error from error


def _visible_adapters(view: CatalogView, principal: Principal) -> tuple[AdapterInfo, ...]:
    return tuple(adapter for adapter in view.adapters if _is_visible(principal, adapter.name))


def _is_visible(principal: Principal, name: str) -> bool:
    patterns = principal.visible
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
