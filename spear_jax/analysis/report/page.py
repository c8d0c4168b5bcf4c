"""Sections as one HTML page that needs nothing else.

Figures are inside it. It has no script and no address.
"""

import base64
import dataclasses
import pathlib
from typing import Any

import jinja2
import pandas as pd

TEMPLATE = pathlib.Path(__file__).parent / "report.html"
LONGEST = 1500  # characters of one text of a trace


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of the page; `image` is an SVG, or a PNG where `kind` says so."""

    title: str
    caption: str
    alt: str
    image: bytes
    kind: str = "svg+xml"

    @property
    def source(self) -> str:
        """Returns the image as a data URI."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.image).decode()}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts, whose first column names the row.

    `words` sets it to the left and lets its entries break.
    """

    caption: str
    headings: list[str]
    rows: list[list[str]]
    words: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with sentences, tables, figures and traces below it.

    `samples` is of `traces.sample` by label.
    """

    name: str
    title: str
    notes: list[str] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    samples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)


def shorten(text: str) -> str:
    """Cuts a text after LONGEST characters, and says how many follow.

    An empty text becomes a word in brackets.
    """
    if not text.strip():
        return "(empty)"
    rest = len(text) - LONGEST
    return text if rest <= 0 else f"{text[:LONGEST]}… ({rest:,} more characters)"


def render(title: str, summary: str, sections: list[Section]) -> str:
    """Returns the page. All texts are escaped, so that a model's text is never markup."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["shorten"] = shorten
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, summary=summary, sections=sections)


def file_name(name: str) -> str:
    """Returns a run's or label's name as part of a file name."""
    return name.replace("/", "_")


def number(column: pd.Series, form: str) -> list[str]:
    """Returns numbers as text, "-" where there is none."""
    return ["-" if pd.isna(value) else form.format(value) for value in column]


def texts(caption: str, table: pd.DataFrame) -> Table:
    """Returns a table of texts for the page."""
    return Table(caption, list(table.columns), table.astype(str).to_numpy().tolist())


def words(caption: str, table: pd.DataFrame) -> Table:
    """Returns a table whose entries are words rather than numbers."""
    return Table(caption, list(table.columns), table.astype(str).to_numpy().tolist(), words=True)


def seconds(value: float) -> str:
    """Returns a duration as text: "45 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60} s"
        if whole < 3600
        else f"{whole // 3600} h {whole % 3600 // 60} min"
    )
