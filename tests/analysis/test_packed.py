"""A comparison that is packed into a file and unpacked again has the same table."""

import json

import pandas as pd
import pytest
from grid_cells import write_cell

from spear_jax.analysis import comparison
from spear_jax.analysis.packed import pack, unpack
from spear_jax.core.errors import UserError

MACHINE = {"versions": {"jax": "1.2"}, "commit": "abc", "devices": {"gpu: one": 1}}


@pytest.fixture
def grid(tmp_path):
    """Two labels of two seeds, and a run that goes on."""
    folder = tmp_path / "grid"
    for label, rate in (("spear", 0.5), ("sft", 0.25)):
        for seed in (0, 1):
            write_cell(folder, label, seed, [0.25, 1 / 3 + 0.1 * seed, 0.7 - rate / 10])
            cell = folder / label / f"seed{seed}"
            config = {"model": "/a/folder/small", "task": "facts", "train": {"learning_rate": rate}}
            (cell / "config.json").write_text(json.dumps(config))
            (cell / "environment.jsonl").write_text(json.dumps(MACHINE | {"time": 1.0}) + "\n")
    write_cell(folder, "spear", 2, [0.25], finished=False)
    labels = {"spear": {"gold": "none"}, "sft": {"gold": "responses"}}
    budget = {"kind": "rounds", "amount": 2}
    overrides = ["--config.data.path=/a/folder/news", "--config.rounds=2"]
    request = {"labels": labels, "budget": budget, "overrides": overrides}
    comparison.write_request(folder, request)
    return folder


def test_a_packed_comparison_has_the_same_tables(grid, tmp_path):
    assert pack(grid, tmp_path / "all.json") == {"runs": 4, "rounds": 12}
    packed = unpack(tmp_path / "all.json", tmp_path / "again")
    for table in (comparison.grid_table, comparison.paired_table):
        pd.testing.assert_frame_equal(table(tmp_path / "again"), table(grid), rtol=1e-5)
    assert packed["environment"] == MACHINE
    assert packed["config"] == {"model": "small", "task": "facts", "train.learning_rate": 0.25}
    assert packed["differences"] == {"sft": {}, "spear": {"train.learning_rate": 0.5}}
    assert packed["request"]["overrides"] == ["--config.data.path=news", "--config.rounds=2"]
    told = json.loads((tmp_path / "all.json").read_text())["columns"]
    assert "eval/accuracy" in told and "sim/clock" not in told  # which no run has
    assert len((tmp_path / "all.json").read_text().splitlines()) < 80  # a row is a line


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    write_cell(tmp_path, "spear", 0, [0.25], finished=False)
    with pytest.raises(UserError, match="no run of .* has finished yet"):
        pack(tmp_path, tmp_path / "all.json")
