"""Every notebook runs from scratch, here at small sizes, and is committed with its output.

At full size, all six: `python -m pytest -m slow tests/docs/test_notebooks.py`.
"""

import pathlib
import re
import sys

import pytest
from processes import environment

nbformat = pytest.importorskip(
    "nbformat", reason="notebooks need nbconvert and ipykernel (pip install -e .[notebooks])"
)
nbclient = pytest.importorskip(
    "nbclient", reason="notebooks need nbconvert and ipykernel (pip install -e .[notebooks])"
)
pytest.importorskip(
    "ipykernel", reason="notebooks need nbconvert and ipykernel (pip install -e .[notebooks])"
)

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
# What stands in place of a notebook's own sizes, behind its cell tagged "parameters".
SMALL = {
    "quickstart": "VARIANT, ROUNDS = 'smoke', 2",
    "compare_methods": "VARIANT, EXAMPLES, JOBS = 'smoke', 8, 1\n"
    "METHODS, SEEDS, ROUNDS = ['spear', 'feedback_sft'], [0, 1], 1",
    "client_ablation": "VARIANT, CLIENTS, SEEDS, ROUNDS, JOBS = 'smoke', [5, 20], [0], 1, 1",
    "token_confidence": "ROUNDS, EXAMPLES = 1, 8",
    "bring_your_own": "VARIANT, ROUNDS = 'smoke', 1",
    "evidence": "",  # it trains nothing
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(name: str, sizes: str, monkeypatch, tmp_path: pathlib.Path):
    """Runs a notebook into an empty folder; a cell that raises fails the test."""
    notebook = read(name)
    place = next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    cell = nbformat.v4.new_code_cell(f"WORKDIR = {str(tmp_path / name)!r}\n{sizes}")
    notebook.cells.insert(place + 1, cell)
    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.km = client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = (
        sys.executable
    )  # this Python, whatever the machine's kernels are
    return client.execute()


def figures(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_six_notebooks_are_there():
    assert set(SMALL) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_scratch(name, monkeypatch, tmp_path):
    assert figures(execute(name, SMALL[name], monkeypatch, tmp_path)) == figures(read(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_scratch_at_full_size(name, monkeypatch, tmp_path):
    assert figures(execute(name, "", monkeypatch, tmp_path)) == figures(read(name))


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_whole_and_clean(name):
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(
        range(1, len(code) + 1)
    )  # run once, from top to bottom
    assert figures(notebook) >= 1
    for cell in code:
        draws = "plt.subplots" in cell.source or ".plot.bar(" in cell.source
        assert draws == any("image/png" in output.get("data", {}) for output in cell.outputs), (
            cell.source
        )
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"/(home|root|tmp|work|usr)/|Warning", text), text


@pytest.mark.parametrize("name", NAMES)
def test_figures_have_labels_and_intervals(name):
    drawn = [
        c.source for c in read(name).cells if c.cell_type == "code" and "plt.subplots" in c.source
    ]
    for source in drawn:  # an axis of names needs no label
        assert ("xlabel=" in source or ".bar(" in source) and (
            "ylabel" in source or "set_yticks(" in source
        ), source
    assert any("95 %" in source for source in drawn)
