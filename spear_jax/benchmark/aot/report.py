"""The result of --compile-for: its tables and its files."""

import json
import pathlib
from typing import Any

import pandas as pd

from spear_jax.analysis.comparison import to_markdown
from spear_jax.benchmark.report import GB, replace

NOTE = """Nothing ran on the target: seconds of a round are arithmetic. `compute`: FLOPs at 45 % of the
peak. `memory`: bytes at the peak bandwidth. `least`: the largest of compute, memory and launches;
`most`: the larger of compute, and of memory and launches one after the other. Programs: of a loop
whose length is data, such as that over tokens to decode, one pass is told."""


def programs(result: dict[str, Any]) -> pd.DataFrame:
    """Returns a row a program."""
    return pd.DataFrame([_program(name, facts) for name, facts in result["programs"].items()])


def _program(name: str, facts: dict[str, Any]) -> dict[str, str]:
    held, compiling = facts["memory"], facts["seconds"]["compile"]
    either = lambda kind: facts[kind]["loop"] or facts[kind]["once"]
    collectives = (
        f"{number['calls']['once'] + number['calls']['loop']:.0f} {kind}"
        for kind, number in facts["collectives"].items()
    )
    return {
        "program": name,
        "compile CPU s": f"{compiling['cpu']:.1f}",
        "wall s": f"{compiling['wall']:.1f}",
        "arguments GB": _gb(held["arguments"]),
        "aliased GB": _gb(held["aliased"]),
        "temporary GB": _gb(held["temporary"]),
        "needs GB": f"{_gb(held['needs'])} ({facts['memory_share']:.0%})",
        "beside GB": _gb(held["beside"]),
        "TFLOP": _three(either("flops") / 1e12),
        "moved GB": _three(either("bytes") / GB),
        "kernels": f"{either('kernels'):.0f}",
        "a pass": "yes" if facts["flops"]["loop"] else "-",
        "collectives": ", ".join(collectives) or "-",
        "largest logits": facts["logits"] or "-",
        "base": "; ".join((*facts["batched"], *facts["gathered"])) or "as it is",
    }


def phases(result: dict[str, Any]) -> pd.DataFrame:
    """Returns a row a phase of the round, and their sum."""
    rows = result["round"]
    names = ("flops", "bytes", "kernels", "compute", "memory", "launch", "least", "most")
    total = {name: sum(row[name] for row in rows) for name in names}
    return pd.DataFrame([_phase(row) for row in [*rows, {"phase": "sum", **total}]])


def _phase(row: dict[str, Any]) -> dict[str, str]:
    seconds = ("compute", "memory", "launch", "least", "most")
    return {
        "phase": row["phase"],
        "TFLOP": _three(row["flops"] / 1e12),
        "moved GB": _three(row["bytes"] / GB),
        "kernels": f"{row['kernels']:,.0f}",
        **{f"{name} s": _three(row[name]) for name in seconds},
    }


def _gb(size: float) -> str:
    return f"{size / GB:.2f}"


def _three(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def write(result: dict[str, Any], out: pathlib.Path) -> None:
    """Writes the JSON file and the tables beside it; names them in result["files"]."""
    out.parent.mkdir(parents=True, exist_ok=True)
    result["files"] = [out.name, out.with_suffix(".md").name]
    tables = [to_markdown(table) for table in (programs(result), phases(result)) if len(table)]
    replace(out.with_suffix(".md"), "\n".join([*tables, NOTE, ""]))
    replace(out, json.dumps(result, indent=1) + "\n")
