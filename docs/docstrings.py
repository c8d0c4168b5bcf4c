"""Docstrings of this project as reStructuredText.

A docstring is prose, then sections ("Args:", "Returns: ...", "Source: ..."), with examples and small
tables between them. Its text is plain: `*`, `|` and `_` mean themselves, and so they are escaped.

    Args: rows: float[B].            **Args**
                                     - ``rows``: float[B].
"""

import re
import textwrap

SECTIONS = (
    "Args", "Attributes", "Class attributes", "Returns", "Yields", "Raises", "Source", "Sources", "Departures",
)  # fmt: skip
HEADER = re.compile(rf"({'|'.join(SECTIONS)})\b([^:]*): ?(.*)")
LISTED = ("Args", "Attributes", "Class attributes")  # entries are "name: text"
ITEM = re.compile(r"\d+\. |- ")
ENTRY = re.compile(r"([*\w.][\w., *=/]*): (.*)", re.S)


def to_rst(lines: list[str]) -> list[str]:
    """Turns a docstring's lines, without their common indent, into lines of reStructuredText."""
    text: list[str] = []
    for block in _blocks(lines):
        header = HEADER.fullmatch(block[0])
        text += [*(_section(header, block[1:]) if header else _prose(block)), ""]
    return text


def _blocks(lines: list[str]) -> list[list[str]]:
    """Paragraphs; a section's header begins one, and takes the indented lines behind it along."""
    blocks: list[list[str]] = []
    inside, gap = False, True  # in a section; a blank line came before
    for line in lines:
        if not line.strip():
            gap = True
            continue
        indented = line[0] == " "
        begins = HEADER.fullmatch(line)
        listed = bool(blocks) and bool(ITEM.match(blocks[-1][0].strip()))
        goes_on = indented and (inside or (listed and not gap))
        if not goes_on and (begins or gap or not blocks or indented != (blocks[-1][-1][0] == " ")):
            blocks.append([])
            inside = bool(begins)
        elif goes_on and gap:
            blocks[-1].append("")
        blocks[-1].append(line)
        gap = False
    return blocks


def _prose(block: list[str]) -> list[str]:
    """A paragraph, a numbered list, or an example that keeps its lines."""
    own = textwrap.dedent("\n".join(block)).splitlines()
    if ITEM.match(own[0]):
        return [escape(line) for line in own]
    if block[0][0] == " " or any(re.search(r"\S {2,}\S", line) for line in own):
        return ["::", "", *("    " + line for line in own)]
    return [escape(line) for line in own]


def _section(header: re.Match, body: list[str]) -> list[str]:
    name, more, first = header.groups()
    title = f"**{name}{escape(more)}**"
    own = textwrap.dedent("\n".join(body)).splitlines()
    if name in LISTED:
        return [title, "", *(line for entry in _entries(first, own) for line in entry)]
    if own and not first:
        inside = [line for block in _blocks(own) for line in [*_prose(block), ""]]
        return [title, "", *inside]
    return [f"{title} {escape(first)}", *(escape(line.strip()) for line in own if line.strip())]


def _entries(first: str, own: list[str]) -> list[list[str]]:
    """Entries as a list of items; what is indented under an entry belongs to it."""
    if first:  # "Args: name: text", whose continuation is indented
        own = [first, *("    " + line for line in own)]
    entries: list[str] = []
    for line in own:
        if line.startswith(" ") and entries:
            entries[-1] += " " + line.strip()
        elif line.strip():
            entries.append(line)
    items = []
    for entry in entries:
        named = ENTRY.fullmatch(entry)
        items.append([f"- ``{named[1]}``: {escape(named[2])}" if named else f"- {escape(entry)}"])
    return items


def escape(text: str) -> str:
    """Plain text in which `code` is code, *word* is stressed, and nothing else is markup."""
    pieces = re.split(r"(`[^`]+`|(?<![\w*])\*\w+\*(?!\w))", text)
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            pieces[number] = re.sub(r"([*|\\`])|(?<=\w)(_)(?!\w)", r"\\\1\2", piece)
        elif piece[0] == "`":
            pieces[number] = f"`{piece}`"
        if number % 2 and pieces[number + 1][:1].isalnum():
            pieces[number] += "\\ "  # markup ends at a word's end alone
    return "".join(pieces)
