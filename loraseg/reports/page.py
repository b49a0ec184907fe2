"""The page of a report: title, headline figures, sections of blocks, rendered as one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from loraseg.reports.html_template import html_template

__all__ = ["Block", "HtmlReport", "Section", "StatTile", "render_report"]

_TEMPLATES = Path(__file__).parent / "templates"


@runtime_checkable
class Block(Protocol):
    """A part of a section, such as a table or a picture.

    Attributes:
        macro: Name of the macro in ``templates/blocks.html.j2`` that prints it.
    """

    macro: ClassVar[str]

    def view(self) -> Any:
        """Return the formatted values that the macro prints."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StatTile:
    """A headline figure at the top of the page.

    Attributes:
        label: What it measures, such as "SemLA, h-mean".
        value: The figure as text, with its unit.
        note: A remark below the figure; may be empty.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading with blocks below it.

    Attributes:
        title: The heading; also the label of the section's tables and plots.
        blocks: The content, from top to bottom.
        note: A sentence below the heading; may be empty.
    """

    title: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class HtmlReport:
    """A whole page.

    Attributes:
        title: Heading of the page.
        summary: The result in one or two sentences.
        sections: The content, from top to bottom.
        tiles: Up to about four headline figures above the sections.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    tiles: Sequence[StatTile] = ()


def render_report(report: HtmlReport) -> str:
    """Return the page as HTML text that loads nothing and runs no script.

    All values are escaped. Equal reports give equal text.

    Raises:
        DatasetError: A label map of an example holds ids outside its label space, or its size
            differs from the image's.
    """
    sections = [
        (section, [(block.macro, block.view()) for block in section.blocks])
        for section in report.sections
    ]
    template = html_template(_TEMPLATES, "page.html.j2")
    return template.render(report=report, sections=sections)
