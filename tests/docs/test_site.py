"""The site builds without a warning, and its hand-written pages agree with the code."""

import contextlib
import dataclasses
import inspect
import io
import re
import subprocess
import sys

import pytest
from pages import ROOT
from processes import environment

import spear_jax
from spear_jax.algorithms import ALGORITHMS

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import docstrings  # noqa: E402 (docs/ is on the path only now)
import draw_evidence  # noqa: E402
import draw_imports  # noqa: E402
import draw_server  # noqa: E402

METHOD_HEADINGS = [
    "What it does", "Quick start", "Data it needs", "Loss", "Settings", "Metrics", "Source and departures",
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def page_of(method: str) -> str:
    return (DOCS / "methods" / f"{method}.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """A section of a page, up to the next heading of any level."""
    return re.search(rf"^## {heading}\n(.*?)(?=^#|\Z)", text, re.M | re.S)[1]


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; the command is the one of docs/README.md."""
    for name in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(name, reason=f"the site needs {name} (pip install -e .[docs])")
    command = "python -m sphinx -W --keep-going -b html docs build/docs"
    assert command in (DOCS / "README.md").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, *command.split()[1:-1], str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def test_the_site_has_its_pages(site):
    built = {str(file.relative_to(site).with_suffix("")) for file in site.rglob("*.html")}
    written = {str(file.relative_to(DOCS).with_suffix("")) for file in DOCS.rglob("*.md")}
    notebooks = {f"notebooks/{file.stem}" for file in (ROOT / "notebooks").glob("*.ipynb")}
    assert written - {"README"} | notebooks <= built
    assert {f"methods/{method}" for method in ALGORITHMS} <= built
    assert {f"reference/{part}" for part in (*draw_imports.ORDER, "commands")} <= built


def test_the_reference_has_every_public_name(site):
    page = (site / "reference" / "spear_jax.html").read_text(encoding="utf-8")
    public = [name for name in spear_jax.__all__ if not name.startswith("_")]
    assert public and not [name for name in public if f'id="spear_jax.{name}"' not in page]


@pytest.mark.parametrize("name", spear_jax.__all__)
def test_a_public_name_has_a_docstring_and_so_has_all_that_is_public_in_it(name):
    public = getattr(spear_jax, name)
    members = vars(public).items() if inspect.isclass(public) else ()
    inside = {
        f"{name}.{member}": value
        for member, value in members
        if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, property))
    }
    for where, value in {name: public, **inside}.items():
        text = value.__doc__ or ""
        # what dataclasses and named tuples write by themselves is their signature
        assert text and not text.startswith(f"{name}("), where


def test_docstrings_lose_no_text_and_gain_no_markup():
    text = """\
        Scores rows of `lora.*` by |d|, x_ and *more*.

            rows  0 1
        Args: rows: float[B];
            in nats.
        Returns: float[B].

        Departures:
            1. One that is
               long.
            2. Two."""
    assert docstrings.to_rst(inspect.cleandoc(text).splitlines()) == [
        r"Scores rows of ``lora.*`` by \|d\|, x\_ and *more*.", "",
        "::", "", "    rows  0 1", "",
        "**Args**", "", "- ``rows``: float[B]; in nats.", "",
        "**Returns** float[B].", "",
        "**Departures**", "", "1. One that is", "   long.", "", "2. Two.", "", "",
    ]  # fmt: skip


# Method pages


def rule(field: dataclasses.Field) -> str:
    """The values that a setting takes, as the pages say it."""
    known = field.metadata
    if "choices" in known:
        return ", ".join(f"`{choice}`" for choice in known["choices"])
    if isinstance(field.default, bool):
        return "`False`, `True`"
    bounds = {name: value for name, value in known["bounds"].items() if value is not None}
    if set(bounds) == {"low"}:
        return f"at least {bounds['low']}"
    if set(bounds) == {"above"}:
        return f"above {bounds['above']}"
    assert set(bounds) == {"low", "high"}, f"{field.name}: the pages have no words for {bounds}"
    return f"{bounds['low']} to {bounds['high']}"


def test_every_method_has_a_page_of_the_same_shape():
    pages = {file.stem for file in (DOCS / "methods").glob("*.md")} - {"index"}
    assert pages == set(ALGORITHMS)
    for method in ALGORITHMS:
        assert re.findall(r"^## (.+)$", page_of(method), re.M) == METHOD_HEADINGS
    listed = re.findall(r"^\| \[`(\w+)`\]", (DOCS / "methods" / "index.md").read_text(), re.M)
    assert sorted(listed) == sorted(ALGORITHMS)


@pytest.mark.parametrize("method", ALGORITHMS)
def test_a_method_page_has_the_settings_of_the_code(method):
    rows = re.findall(r"^\| (`[\w.]+`) \| (`.+?`) \| (.+?) \| .+ \|$", page_of(method), re.M)
    wanted = [
        (f"`{method}.{field.name}`", f"`{field.default}`", rule(field))
        for field in dataclasses.fields(ALGORITHMS[method].Settings)
    ]
    assert rows == wanted


@pytest.mark.parametrize("method", ALGORITHMS)
def test_a_method_page_has_the_preset_of_the_code(method):
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \| [^|]+ \|$", page_of(method), re.M)
    reference = {name: str(value) for name, value in ALGORITHMS[method].reference.items()}
    assert dict(rows) == reference


@pytest.mark.parametrize("method", ALGORITHMS)
def test_a_method_page_has_every_departure_of_the_code(method):
    items = lambda text: re.findall(r"^ *(\d+)\. ", text, re.M)
    told = items(section(page_of(method), "Source and departures"))
    assert told == items(inspect.getmodule(ALGORITHMS[method]).__doc__)


# Other pages


def test_the_packing_page_shows_what_describe_prints():
    text = (DOCS / "packing.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    printed = []
    for program in programs:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(program, names)
        printed.append(out.getvalue().rstrip("\n") + "\n")
    assert len(printed) == 2 and printed == re.findall(r"```text\n(.*?)```", text, re.S)


def test_the_picture_and_the_page_show_the_parts_as_they_are():
    image = pytest.importorskip("PIL.Image", reason="matplotlib brings Pillow")
    assert set(draw_imports.ORDER) == draw_imports.packages()
    arrows = image.open(draw_imports.PICTURE).text["Description"]
    again = "run `python docs/draw_imports.py`, and look at docs/architecture.png"
    assert arrows == draw_imports.describe(draw_imports.read_imports()), again
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\d+\. \[`(\w+)`\]", page, re.M)) == draw_imports.ORDER


def test_the_glossary_has_each_word_once():
    words = re.search(r"```\{glossary\}\n(.*?)```", (DOCS / "glossary.md").read_text(), re.S)[1]
    terms = re.findall(r"^(\S.*)$", words, re.M)
    assert terms == sorted(set(terms), key=str.lower)


# The evidence


def test_the_evidence_page_says_what_its_raw_files_say(tmp_path):
    page = draw_evidence.PAGE.read_text(encoding="utf-8")
    assert draw_evidence.names()
    for name in draw_evidence.names():
        assert f"](../evidence-{name}.png)" in page
        assert (DOCS / f"evidence-{name}.png").is_file()
        assert f"<!-- {name} -->" in page
        again = draw_evidence.insert(page, name, draw_evidence.render(name, tmp_path / name))
        assert again == page, "run `python docs/draw_evidence.py`"


def test_the_server_page_says_what_its_raw_files_say(tmp_path):
    page = draw_server.PAGE.read_text(encoding="utf-8")
    for name in draw_server.names():
        assert (DOCS / f"server-{name}.png").is_file()
        text, _ = draw_server.render(name, tmp_path / name)
        assert draw_server.insert(page, name, text) == page, "run `python docs/draw_server.py`"
