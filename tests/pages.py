"""The code blocks of the documentation, and the commands in them."""

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block. `mark` is the comment before it: "run", or "file: NAME", or "" for a block
    that is only checked.
    """

    page: pathlib.Path
    line: int
    mark: str
    language: str
    text: str

    @property
    def file(self) -> str:
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        found.append(Block(page, line, match["mark"] or "", match["language"], match["text"]))
    return found


def commands(block: Block) -> list[list[str]]:
    """The simple commands of a bash block as words, without comments, assignments before them, and
    srun.
    """
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", ";"):
                found.append(words)
                words = []
            elif words or not (word == "srun" or re.fullmatch(r"[A-Z_0-9]+=.*", word)):
                words.append(word)
    return [words for words in found if words]


def checked_commands() -> list[tuple[str, list[str]]]:
    """(place, command) of every bash block that is not run as a whole."""
    return [
        (block.where, words)
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash" and block.mark != "run"
        for words in commands(block)
    ]
