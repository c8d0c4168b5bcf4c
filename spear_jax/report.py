"""Writes a page, tables and figures from run folders.

Run folders of `train` or folders of `compare`, finished or still running.
Writes report.html, which needs no other file and no network: results with 95 %
intervals, wins and loses, what feedback fixed, losses, bytes, time by phase, a heat map of clients,
the data split, sample traces, and the fields in which the configs differ. Beside it every figure as
PNG and SVG, and metrics.csv (tidy: run, round, metric, value), summary.csv (a row a run),
results.csv (a row a label), clients.csv, and of the configs differences.csv (fields that differ)
and common.csv (fields that are equal in all runs, but not the default).
"""

import pathlib
from typing import Any

import pandas as pd

from spear_jax.analysis import runs as run_files
from spear_jax.analysis.report import page, runs, traces
from spear_jax.analysis.report.sections import SectionWriter
from spear_jax.core.errors import UserError
from spear_jax.experiment import command_line
from spear_jax.experiment.config import default_config, flatten

EXAMPLES = """
    python -m spear_jax.report --workdir=runs/quickstart --out=reports/quickstart
    python -m spear_jax.report --workdir runs/seed0 runs/seed1 runs/seed2 --out=reports/seeds
    python -m spear_jax.report --workdir=runs/methods --out=reports/methods        # a folder of `compare`
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("report", __doc__, EXAMPLES)
    parser.add_argument(
        "--workdir", required=True, nargs="+", help="run folders, or folders of `compare`"
    )
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--quiet", action="store_true", help="print the JSON line only")
    args = parser.parse_args(argv)
    evaluated, begun = runs.find_runs(args.workdir)
    out = pathlib.Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {args.out!r}, which is a file; give a folder.")
    out.mkdir(parents=True, exist_ok=True)
    writer, default = SectionWriter(evaluated, begun, out), flatten(default_config())
    names = ", ".join(
        dict.fromkeys(pathlib.Path(workdir).resolve().name for workdir in args.workdir)
    )
    sections = writer.all(default)
    (out / "report.html").write_text(
        page.render(f"Report: {names}", summary(evaluated), sections), encoding="utf-8"
    )
    files = ["report.html", *write_tables(writer, out, default), *writer.files]
    if not args.quiet:
        print(writer.results.to_string(index=False, float_format="{:.3f}".format, na_rep="-"))
        print(f"page: {out / 'report.html'}")
    return {"out": str(out), "runs": len(evaluated), "files": files}


def summary(evaluated: list[runs.Run]) -> str:
    """Returns the page's first sentence."""
    done, last = sum(run.finished for run in evaluated), max(run.rounds for run in evaluated)
    rounds = f"{last} {'round' if last == 1 else 'rounds'}"
    if len(evaluated) == 1:
        return f"One run, {'finished' if done else 'not finished so far'}; {rounds}."
    return f"{len(evaluated)} runs, {done} of them finished; up to {rounds}."


def write_tables(writer: SectionWriter, out: pathlib.Path, default: dict[str, Any]) -> list[str]:
    """Writes the tables as CSV; returns their names."""
    tidy = []
    for run in writer.runs:
        table = run.table.melt(id_vars=["round"], var_name="metric").dropna(subset="value")
        tidy.append(table.assign(run=run.name)[["run", "round", "metric", "value"]])
    between, common = runs.differences(writer.runs, default)
    counts = [traces.client_counts(run).assign(run=run.name) for run in writer.runs]
    tables = {
        "metrics": pd.concat(tidy, ignore_index=True),
        "summary": pd.json_normalize(
            [{"run": run.name, **run_files.summarise(run.folder)} for run in writer.runs]
        ),
        "results": writer.results,
        "differences": between,
        "common": common,
        "clients": pd.concat(counts, ignore_index=True)[["run", *counts[0].columns[:-1]]],
    }
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False)
    return [f"{name}.csv" for name in tables]


if __name__ == "__main__":
    command_line.run(main)
