"""Sphinx settings of the documentation: `python -m sphinx -W --keep-going -b html docs build/docs`."""

import pathlib
import sys

DOCS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]  # the package of this checkout, and build_pages.py

import spear_jax  # noqa: E402 (the path comes first)

project = "spear-jax"
author = "the spear-jax authors"
release = spear_jax.__version__
copyright = "Apache-2.0"

extensions = [
    "myst_nb",  # pages in Markdown, notebooks as pages
    "sphinx.ext.autodoc",
    "build_pages",  # generated pages and tables
]
exclude_patterns = ["README.md"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks carry their output
nb_merge_streams = True
smartquotes = False  # two hyphens are an option of a command

autodoc_member_order = "bysource"
autodoc_mock_imports = ["flwr", "cryptography"]  # of an extra that the pages need not have
toc_object_entries = False  # the tree of pages beside each page would list 1,500 functions
autodoc_typehints = "none"  # shapes and dtypes, which matter here, stand in the text
default_role = "code"

# furo: one page is one column, it works without JavaScript, and it depends on Sphinx alone.
html_theme = "furo"
html_title = f"spear-jax {release}"

# Cells of notebooks that call a shell are Python for no highlighter.
suppress_warnings = ["misc.highlighting_failure"]
