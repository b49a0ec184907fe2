"""The files that ``loraseg segment`` writes, on this machine or with an endpoint."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loraseg.cli.console import print_line, write_files
from loraseg.data.drawing import encode_png
from loraseg.data.labels import LabelSpace
from loraseg.data.masks import encode_mask
from loraseg.inference.selection import AdaptiveSettings
from loraseg.segment.render import grey_png, overlay_with_legend
from loraseg.tensor_types import ndarray

__all__ = ["SegmentWriter"]


class SegmentWriter:
    """Writes results into a folder.

    Args:
        folder: Created when the first result is written.
        label_space: The classes.
        settings: How adapters were selected.
    """

    def __init__(self, folder: Path, label_space: LabelSpace, settings: AdaptiveSettings) -> None:
        self._folder = folder
        self._label_space = label_space
        self._settings = settings

    def write(
        self,
        path: Path,
        image: ndarray,
        labels: ndarray,
        maps: Mapping[str, ndarray | None],
        explanation: Mapping[str, Any],
    ) -> None:
        """Write the results of one image and print a line.

        Args:
            path: Path of the image.
            image: RGB, uint8 (h, w, 3).
            labels: Class ids (h, w).
            maps: Further maps in [0, 1] (h, w) by name; None for maps that were not requested.
            explanation: As :meth:`loraseg.inference.request.Explanation.to_json` returns it, and
                further fields.

        Raises:
            StoreError: The folder cannot be written.
        """
        space = self._label_space
        shares = {name: float((labels == index).mean()) for index, name in enumerate(space.names)}
        summary: dict[str, Any] = {
            "image": str(path),
            "shares": shares,
            "settings": asdict(self._settings),
            **explanation,
        }
        files = {
            f"{path.stem}.png": encode_mask(labels, space),
            f"{path.stem}_overlay.png": encode_png(overlay_with_legend(image, labels, space)),
            f"{path.stem}.json": (
                json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
            ).encode(),
        }
        for name, values in maps.items():
            if values is not None:
                files[f"{path.stem}_{name}.png"] = grey_png(values)
        write_files(self._folder, files)
        parts = ", ".join(f"{used['name']} {used['weight']:.2f}" for used in summary["adapters"])
        reason = parts or summary["fallback"] or "base alone"
        print_line(f"{path} -> {self._folder / path.stem}.png  {reason}")
