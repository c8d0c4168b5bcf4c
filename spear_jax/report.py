"""Tables and figures from finished or running experiments.

Writes metrics.csv (tidy: run, round, metric, value), summary.csv (one row a run), accuracy.png, and for each run its losses,
wins and loses, time by phase, and data split.
"""

import pathlib
import shutil
from typing import Any

import pandas as pd

from spear_jax import analysis, cli

EXAMPLES = """
    python -m spear_jax.report --workdir=runs/quickstart --out=reports/quickstart
    python -m spear_jax.report --workdir runs/seed0 runs/seed1 runs/seed2 --out=reports/seeds
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = cli.parser("report", __doc__, EXAMPLES)
    parser.add_argument("--workdir", required=True, nargs="+", help="run folders")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--quiet", action="store_true", help="print the JSON line only")
    args = parser.parse_args(argv)
    out = pathlib.Path(args.out)
    tidy = analysis.load_runs(args.workdir)
    summary = pd.json_normalize([{"run": pathlib.Path(d).name, **analysis.summarise(d)} for d in args.workdir])
    out.mkdir(parents=True, exist_ok=True)
    tidy.to_csv(out / "metrics.csv", index=False)
    summary.to_csv(out / "summary.csv", index=False)
    analysis.plot_accuracy(args.workdir, out / "accuracy.png")
    files = ["metrics.csv", "summary.csv", "accuracy.png"]
    for workdir in map(pathlib.Path, args.workdir):
        analysis.plot_run(workdir, out / f"{workdir.name}_run.png")
        files.append(f"{workdir.name}_run.png")
        if (workdir / "split.png").exists():
            shutil.copyfile(workdir / "split.png", out / f"{workdir.name}_split.png")
            files.append(f"{workdir.name}_split.png")
    if not args.quiet:
        print(summary.to_string(index=False))
    return {"out": str(out), "files": files}


if __name__ == "__main__":
    cli.run(main)
