"""Cells of grids as compare and sweep leave them, and the sizes of those that tests train."""

import json

import run_sizes

# The 97.5 % points of Student's t for 1, 2, 3, 4, 9 and 29 degrees of freedom, from printed tables.
POINTS = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 29: 2.0452}


def write_cell(folder, label, seed, accuracies, tokens=100.0, finished=True):
    """A cell with one evaluated round for each accuracy; every round costs the same."""
    cell = folder / label / f"seed{seed}"
    cell.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, accuracy in enumerate(accuracies):
        line = {
            "round": number,
            "time": 1.0,
            "eval/accuracy": accuracy,
            "eval/count": 40.0,
            "eval/stderr": 0.05,
        }
        if number:
            line |= {
                "budget/tokens": tokens * number,
                "budget/flops": 1e9 * number,
                "budget/seconds": 2.0 * number,
            }
            line |= {"round/bytes_up": 10.0, "round/bytes_down": 20.0}
        lines.append(line)
    (cell / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (cell / "summary.json").write_text("{}")


FIELDS = ("federation", "rollout", "train", "eval", "lora")
SMALL = {name: value for name, value in run_sizes.SMALL.items() if name.startswith(FIELDS)}
SMALL |= {"federation.aggregation": "fedavg", "eval.every": 1}


def finished(workdir):
    return {
        file.parent: (file.stat().st_mtime_ns, file.read_text())
        for file in workdir.glob("*/*/summary.json")
    }
