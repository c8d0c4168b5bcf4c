"""Tables and figures of docs/results/server.md, from runs with numbers by hand."""

import json
import sys

import pytest
from grid_cells import write_cell
from matplotlib.figure import Figure
from pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import draw_server


def write_runs(folder, final, more=None):
    """Two seeds a label, 0.1 apart, of two rounds each. Args: final: {label: accuracy of seed 0};
    more: {label: {metric: value of round 1; of round n it is n times as much}}.
    """
    for label, accuracy in final.items():
        for seed in (0, 1):
            end = accuracy + 0.1 * seed
            write_cell(folder, label, seed, [0.2, 0.3 + end / 10, end])
            file = folder / label / f"seed{seed}" / "metrics.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            for line in lines[1:]:
                own = (more or {}).get(label, {})
                line |= {name: value * line["round"] for name, value in own.items()}
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def table_of(name, folder):
    figure = Figure()
    shown = draw_server.STUDIES[name](
        draw_server.read_runs(folder, draw_server.PLAIN[name]), figure
    )
    figure.savefig(folder / "figure.png")
    return shown.set_index(shown.columns[0])


def test_attacks_have_a_row_a_reducer_and_case(tmp_path):
    cases = {
        "spear": 0.45,
        "mean": 0.5,
        "median": 0.4,
        "mean-sign_flip-0.3": 0.1,
        "median-sign_flip-0.3": 0.35,
    }
    write_runs(tmp_path, cases)
    table = table_of("attacks", tmp_path).set_index("attack and share", append=True)
    assert [case for _, case in table.index] == ["nobody"] * 3 + ["sign_flip-0.3"] * 2
    assert [reducer for reducer, _ in table.index] == ["wins", "mean", "median", "mean", "median"]
    # t(1) s / sqrt(2) = 12.706 x 0.0707 / 1.414
    same, wide = "± 0.000", "± 0.635"
    assert list(table.loc["median", "nobody"]) == [
        "2", f"0.450 {wide}", f"-0.100 {same}", f"-0.050 {same}"
    ]  # fmt: skip
    flipped = ["2", f"0.400 {wide}", f"+0.250 {same}", f"-0.100 {same}"]
    assert list(table.loc["median", "sign_flip-0.3"]) == flipped


@pytest.mark.parametrize(
    "name, plain, other, metric, heading, shown",
    [
        ("compression", "none", "int4", "round/compression_error", "distortion", "0.450"),
        ("lora_rules", "mean-10.0", "ffa-10.0", "round/aggregation_error", "lost by averaging", "0.450"),
        ("privacy", "no noise", "noise_1.0", "privacy/epsilon", "ε", "0.60"),
    ],
)  # fmt: skip
def test_a_row_is_compared_seed_by_seed_with_the_plain_one(
    name, plain, other, metric, heading, shown, tmp_path
):
    write_runs(tmp_path, {"spear": 0.5, other: 0.4}, {other: {metric: 0.3}})
    table = table_of(name, tmp_path)
    assert table.loc[plain, "less the plain row"] == ""
    assert table.loc[other, "less the plain row"] == "-0.100 ± 0.000"
    assert table.loc[other, heading] == shown


def test_modes_are_compared_at_the_shortest_runs_seconds(tmp_path):
    """Rounds end at 20 s with 0.5 and 0.6, fedbuff at 12 s; rounds' first evaluation is at 10 s."""
    clocks = {"spear": {"sim/clock": 10.0}, "fedbuff": {"sim/clock": 6.0}}
    write_runs(tmp_path, {"spear": 0.5, "fedbuff": 0.4}, clocks)
    table = table_of("asynchronous", tmp_path)
    equal, reached = table["accuracy at equal simulated s"], table["simulated s to 0.45"]
    assert equal["rounds"] == "0.355 ± 0.064" and equal["fedbuff"] == "0.450 ± 0.635"
    assert reached["rounds"] == "20 (2 of 2 seeds)" and reached["fedbuff"] == "12 (1 of 2 seeds)"
