"""The tables and figures of results/evidence.md, from the raw files in results/evidence/.

    python docs/draw_evidence.py                      # makes all again
    python docs/draw_evidence.py methods runs/methods # packs a folder of `compare` into a raw file first

A raw file NAME.json (spear_jax.analysis.packed) becomes evidence-NAME.png, and the text between the
page's lines `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import pathlib
import re
import sys
import tempfile

from spear_jax.analysis import comparison
from spear_jax.analysis.packed import pack, unpack

DOCS = pathlib.Path(__file__).resolve().parent
RAW = DOCS / "results" / "evidence"
PAGE = DOCS / "results" / "evidence.md"


def names() -> list[str]:
    """Returns the studies that have a raw file."""
    return sorted(file.stem for file in RAW.glob("*.json"))


def render(name: str, folder: pathlib.Path) -> str:
    """Returns a study's tables as Markdown; `folder` gets it unpacked."""
    environment = unpack(RAW / f"{name}.json", folder)["environment"]
    devices = ", ".join(f"{count} x {device}" for device, count in environment["devices"].items())
    versions = environment["versions"]
    table = comparison.to_markdown(comparison.show_table(comparison.grid_table(folder)))
    paired = comparison.paired_table(folder)
    text = f"{devices}, jax {versions['jax']}, Python {versions['python']}.\n\n{table}"
    if len(paired):
        told = comparison.to_markdown(comparison.show_paired(paired))
        text += f"\nPaired differences, seed by seed:\n\n{told}"
    return text


def insert(page: str, name: str, text: str) -> str:
    """Returns the page with a study's part replaced."""
    part = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    return part.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", page)


def main(arguments: list[str]) -> None:
    if arguments:
        name, folder = arguments
        pack(folder, RAW / f"{name}.json")
    page = PAGE.read_text(encoding="utf-8")
    for name in names():
        with tempfile.TemporaryDirectory() as made:
            folder = pathlib.Path(made)
            page = insert(page, name, render(name, folder))
            comparison.plot_grid(folder, folder / "figure")
            (folder / "figure.png").replace(DOCS / f"evidence-{name}.png")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
