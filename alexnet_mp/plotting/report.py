"""A report as one HTML page that needs nothing else: its pictures lie in it, and no script runs.

The page follows the reader's light or dark setting. Everything that it is given is text and is
escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class ReportPicture:
    """A PNG file's content, and the line below it."""

    png: bytes
    caption: str
    name: str = ""
    """What the picture shows, for those who do not see it; default: the caption."""

    @property
    def data_uri(self) -> str:
        """The picture as an address that holds it."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


@dataclass(frozen=True)
class ReportTable:
    """Rows of texts below a head. The first column names its row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False
    """Whether the reader opens it by its title."""


@dataclass(frozen=True)
class Section:
    """One part of a report. `missing` says why a part, or some of it, is not there."""

    title: str
    text: str = ""
    code: str = ""
    missing: Sequence[str] = ()
    pictures: Sequence[ReportPicture] = ()
    tables: Sequence[ReportTable] = ()

    @property
    def anchor(self) -> str:
        """The section's place in the page."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Report:
    """A page: a title, figures of which each is (name, value), and sections."""

    title: str
    subtitle: str
    figures: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


def render(report: Report) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE.name).render(report=report) + "\n"
