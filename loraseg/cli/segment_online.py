"""``loraseg segment --endpoint URL``: the same files from an endpoint."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loraseg.cli.console import print_error
from loraseg.cli.segment_output import SegmentWriter
from loraseg.client import Client, SegmentOptions, SegmentResponse
from loraseg.data.images import read_image
from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError, DatasetError, LorasegError, ServiceError
from loraseg.inference.selection import AdaptiveSettings

__all__ = ["segment_online"]

# Maximum time between two finished images; the user can also stop the command.
_TIMEOUT_S = 300.0
# Codes of refusals that hold for every image of the call.
_USER_ERROR_CODES = {
    *("bad_request", "forbidden", "invalid", "no_such_adapter", "no_such_library", "not_found"),
    "unauthorized",
}


def segment_online(
    arguments: argparse.Namespace, label_space: LabelSpace, paths: list[Path], token: str | None
) -> int:
    """Segment images with an endpoint and write each result when it arrives.

    Raises:
        ConfigError: The endpoint refuses the arguments or the token.
        ServiceError: The endpoint cannot be reached, or is not available now.
    """
    with Client(arguments.endpoint, token, timeout_s=_TIMEOUT_S) as client:
        try:
            settings = _settings(arguments, client.base())
            output = SegmentWriter(Path(arguments.out), label_space, settings)
            return _segment(client, output, arguments, label_space, paths)
        except ServiceError as error:
            if error.code in _USER_ERROR_CODES:
                raise ConfigError(f"{arguments.endpoint}: {error}") from error
            raise


def _segment(
    client: Client,
    output: SegmentWriter,
    arguments: argparse.Namespace,
    label_space: LabelSpace,
    paths: list[Path],
) -> int:
    options: SegmentOptions = {
        "library": arguments.library,
        "top_k": arguments.top_k,
        "temperature": arguments.temperature,
        "mode": arguments.mode,
        "maps": arguments.maps,
        "tiling": arguments.tiling,
    }
    failed = 0
    for index, outcome in client.segment_batch(paths, label_space.names, **options):
        try:
            if isinstance(outcome, LorasegError):
                raise _with_path(paths[index], outcome)
            _write(output, paths[index], outcome)
        except LorasegError as error:
            # An error of one image must not stop the others.
            print_error(error)
            failed += 1
    return int(bool(failed))


def _with_path(path: Path, error: LorasegError) -> LorasegError:
    """Add the path of the image; errors of files that were not sent already have it."""
    return error if isinstance(error, DatasetError) else LorasegError(f"{path}: {error}")


def _write(output: SegmentWriter, path: Path, reply: SegmentResponse) -> None:
    image = read_image(path)
    if image.shape[:2] != reply.label_map.shape:
        raise LorasegError(f"{path}: changed while it was being segmented")
    explanation = {
        "mode": reply.mode,
        "base": reply.base,
        "mix": reply.mix,
        "adapters": [asdict(used) for used in reply.adapters],
        "fallback": reply.fallback,
        "library": reply.library,
        "generation": reply.generation,
        "skipped": [asdict(skipped) for skipped in reply.skipped],
        "timing_ms": dict(reply.timing_ms),
        "request_id": reply.request_id,
    }
    maps = {"confidence": reply.confidence, "entropy": reply.entropy}
    output.write(path, image, reply.label_map, maps, explanation)


def _settings(arguments: argparse.Namespace, base: Mapping[str, Any]) -> AdaptiveSettings:
    """Return the settings that will be used, with the endpoint's defaults for missing options."""
    chosen = base.get("settings", {})
    top_k, temperature = arguments.top_k, arguments.temperature
    try:
        return AdaptiveSettings(
            mode=arguments.mode,
            k=int(chosen["top_k"] if top_k is None else top_k),
            temperature=float(chosen["temperature"] if temperature is None else temperature),
        )
    except (KeyError, TypeError) as error:
        raise ServiceError(
            "bad_reply", f"{arguments.endpoint}: its reply has no settings"
        ) from error
