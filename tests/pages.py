"""The code blocks of the documentation, and the commands in them."""

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = ROOT / "docs" / "reference"  # by the site, from docstrings
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if GENERATED not in page.parents),
]
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
    srun. `spear-jax NAME` stands there as `python -m spear_jax.NAME`, which is the same.
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
    return [_as_module(words) for words in found if words]


def _as_module(words: list[str]) -> list[str]:
    if words[0] != "spear-jax":
        return words
    return ["python", "-m", f"spear_jax.{words[1]}", *words[2:]]


def scripts(page: pathlib.Path) -> list[tuple[str, str, str]]:
    """(place, language, text) of a page's blocks that are marked `run`, in order. Python blocks that
    follow one another are one script: a later block goes on with the names of an earlier one.
    """
    found: list[tuple[str, str, str]] = []
    for block in blocks(page):
        if block.mark == "run" and found and block.language == found[-1][1] == "python":
            where, language, text = found.pop()
            found.append((where, language, text + block.text))
        elif block.mark == "run":
            found.append((block.where, block.language, block.text))
    return found


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def checked_commands() -> list[tuple[str, list[str]]]:
    """(place, command) of every bash block that is not run as a whole."""
    return [
        (block.where, words)
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash" and block.mark != "run"
        for words in commands(block)
    ]
