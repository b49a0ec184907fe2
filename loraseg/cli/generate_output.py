"""The files that ``loraseg generate`` writes."""

import json
from collections.abc import Mapping
from pathlib import Path

from loraseg.cli.console import print_line, write_files
from loraseg.data.drawing import encode_png
from loraseg.data.labels import LabelSpace
from loraseg.data.masks import encode_mask
from loraseg.synth.generator import GeneratedImage
from loraseg.synth.sheet import SheetRow, contact_sheet
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["SHEET", "GenerateWriter", "file_names"]

SHEET = "sheet.png"


def file_names(mask: str, k: int) -> tuple[str, str, str]:
    """Return the file names of image ``k`` of a mask, its label and its lineage."""
    stem = f"{mask}_{k}"
    return f"{stem}.png", f"{stem}_label.png", f"{stem}.json"


class GenerateWriter:
    """Writes generated pairs into a folder.

    Args:
        folder: Created with the first pair.
        label_space: Classes of the labels.
        generator: Digest of the generator.
    """

    def __init__(self, folder: Path, label_space: LabelSpace, generator: str) -> None:
        self._folder = folder
        self._label_space = label_space
        self._generator = generator
        self._images: dict[str, list[UInt8[ndarray, "_ _ 3"]]] = {}

    def write(self, generated: GeneratedImage) -> None:
        """Write one image, its label and its lineage.

        Raises:
            StoreError: The folder cannot be written.
        """
        image, label, lineage = file_names(generated.mask_name, generated.lineage.k)
        record = {"image": image, "label": label, **generated.lineage.to_json()}
        write_files(
            self._folder,
            {
                image: encode_png(generated.image),
                label: encode_mask(generated.label, self._label_space),
                lineage: (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode(),
            },
        )
        self._images.setdefault(generated.mask_name, []).append(generated.image)

    def write_sheet(self, masks: Mapping[str, ndarray]) -> None:
        """Write the contact sheet of all pairs and print the paths.

        Raises:
            StoreError: The folder cannot be written.
        """
        rows = [
            SheetRow(name, masks[name], [(str(k), image) for k, image in enumerate(images)])
            for name, images in self._images.items()
        ]
        write_files(self._folder, {SHEET: encode_png(contact_sheet(rows, self._label_space))})
        for name, images in self._images.items():
            last = len(images) - 1
            print_line(f"{name} -> {self._folder / name}_0.png to _{last}.png")
        print_line(f"{self._folder / SHEET}  generator {self._generator}")
