"""Makes the pages that are not written by hand: the reference and the notebooks.

A Sphinx extension. Its pages go to docs/reference and docs/notebooks, which git ignores.
"""

import json
import pathlib
import re

import docstrings
import draw_imports
from sphinx.application import Sphinx

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGE = ROOT / "spear_jax"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)")


def setup(app: Sphinx) -> dict[str, bool]:
    write_reference()
    copy_notebooks()
    app.connect("autodoc-process-docstring", _convert_docstring)
    app.connect("source-read", _resolve_links)
    return {"parallel_read_safe": True}


def write(file: pathlib.Path, text: str) -> None:
    """Writes a file that changed; an unchanged one keeps its time, and Sphinx its page."""
    file.parent.mkdir(exist_ok=True)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


# The reference


def modules(folder: pathlib.Path) -> list[str]:
    """The modules of a folder, its package the first."""
    paths = (file.relative_to(ROOT).with_suffix("").parts for file in folder.rglob("*.py"))
    return sorted(".".join(path).removesuffix(".__init__") for path in paths)


def write_reference() -> None:
    """Writes a page for the public names, one for each part, and one for the commands."""
    pages = {part: modules(PACKAGE / part) for part in draw_imports.ORDER}
    inside = {"spear_jax"}.union(*pages.values())
    pages["commands"] = [name for name in modules(PACKAGE) if name not in inside]
    for page, names in pages.items():
        text = "".join(f"## {name}\n\n{_source(name)}\n\n{_automodule(name)}\n" for name in names)
        write(DOCS / "reference" / f"{page}.md", f"# {page}\n\n{text}")
    public = _automodule("spear_jax", ":imported-members:")
    write(DOCS / "reference" / "spear_jax.md", f"# spear_jax: the public API\n\n{public}")


def _automodule(name: str, *options: str) -> str:
    lines = [
        f".. automodule:: {name}",
        *(f"   {option}" for option in (":members:", ":exclude-members: replace", *options)),
    ]
    return "\n".join(["```{eval-rst}", *lines, "```", ""])


def _source(name: str) -> str:
    """A link to a module's file."""
    path = pathlib.PurePosixPath(*name.split("."))
    file = path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")
    return f"[{file}](../../{file})"


def _convert_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = docstrings.to_rst(lines)


# The notebooks


def copy_notebooks() -> None:
    """Copies notebooks/ into the tree of pages; links in their text lead from the new place."""
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(file.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                moved = re.sub(r"\]\(\.\./(?!docs/)", "](../../", "".join(cell["source"]))
                text = resolve_links(moved.replace("](../docs/", "](../"), "notebooks")
                cell["source"] = text.splitlines(keepends=True)
        write(DOCS / "notebooks" / file.name, json.dumps(notebook, ensure_ascii=False, indent=1))


# Links that lead out of docs/


def resolve_links(text: str, folder: str) -> str:
    """Leads links to notebooks and to parts of the package to their pages.

    A link to any other file outside docs/ is left alone, and the page offers the file. A link to
    any other folder becomes its text.

    Args:
        text: Markdown.
        folder: the page's, seen from docs/.
    """

    def resolve(link: re.Match) -> str:
        image, words, target, anchor = link.groups()
        place = (DOCS / folder / target).resolve()
        if image or re.match(r"\w+:", target) or place.is_relative_to(DOCS):
            return link[0]
        if not place.is_relative_to(ROOT):
            return link[0]
        path = place.relative_to(ROOT).parts
        if path[:1] == ("notebooks",):
            return f"[{words}](/{'/'.join(path)})" if path[1:] else f"[{words}](/notebooks.md)"
        if path[:1] == ("spear_jax",) and path[1:2] and path[1] in draw_imports.ORDER:
            return f"[{words}](/reference/{path[1]}.md)" if place.is_dir() else link[0]
        return words if place.is_dir() else link[0]

    return LINK.sub(resolve, text)


def _resolve_links(app: Sphinx, name: str, content: list[str]) -> None:
    if not name.startswith("notebooks/"):
        content[0] = resolve_links(content[0], str(pathlib.PurePosixPath(name).parent))
