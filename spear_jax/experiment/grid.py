"""The cells of a grid, ordinary run folders WORKDIR/<label>/seed<k>: checked, trained N at a time,
told of as they end.
"""

import dataclasses
import functools
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import tqdm

from spear_jax.analysis import runs
from spear_jax.core.errors import UserError, shown
from spear_jax.core.versions import versions
from spear_jax.experiment import builder, processes, run_folder
from spear_jax.experiment.run import Run
from spear_jax.experiment.run_logger import on_terminal
from spear_jax.experiment.wandb_logger import check_wandb


@dataclasses.dataclass(frozen=True)
class GridRow:
    """One row of a grid: its label, which is a folder name, and its config for every seed."""

    label: str
    configs: dict[int, ml_collections.ConfigDict]


def read_seeds(text: str) -> list[int]:
    """The numbers of "0,1,2"."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UserError(
            f"--seeds is {shown(text)}; give different whole numbers from 0, for example --seeds=0,1,2."
        )
    return [int(part) for part in parts]


def cell_folder(folder: pathlib.Path, label: str, seed: int) -> pathlib.Path:
    """The run folder of a cell."""
    return folder / label / f"seed{seed}"


def check_folder(folder: pathlib.Path, rows: Sequence[GridRow]) -> None:
    """Raises UserError where the folder is itself a run folder, or holds a cell of another
    config.
    """
    run_folder.check_names(str(folder), "auto")
    if (folder / "config.json").exists():
        raise UserError(f"{folder} is the run folder of a `train` command; give a new --workdir.")
    for row in rows:
        for seed, config in row.configs.items():
            cell = cell_folder(folder, row.label, seed)
            if (cell / "config.json").exists():
                run_folder.open_workdir(str(cell), config, "must")


def unfinished(
    folder: pathlib.Path, rows: Sequence[GridRow]
) -> dict[str, dict[int, ml_collections.ConfigDict]]:
    """The configs, by label and seed, of the cells that are still to be trained."""
    left = {}
    for row in rows:
        seeds = {
            k: c
            for k, c in row.configs.items()
            if not runs.is_finished(cell_folder(folder, row.label, k))
        }
        left |= {row.label: seeds} if seeds else {}
    return left


def check_rows(rows: Sequence[GridRow], jobs: int) -> dict[str, str]:
    """Builds each row's experiment for the first seed, in `jobs` processes, so that this one never
    holds a device.

    Returns: the gold text that each label's method sees. Raises: UserError for a config that
        cannot run.
    """
    for row in rows:
        check_wandb(next(iter(row.configs.values())))
    asked = [(row.label, next(iter(row.configs.values()))) for row in rows]
    shares = [asked[part::jobs] for part in range(min(jobs, len(asked)))]
    golds: dict[str, str] = {}
    for found in processes.ask_all(_check, shares):
        if isinstance(found, UserError):
            raise found
        golds |= found
    return golds


def _check(rows: list[tuple[str, ml_collections.ConfigDict]]) -> dict[str, str] | UserError:
    golds = {}
    for label, config in rows:
        try:
            golds[label] = builder.build(config).federation.algorithm.sees_gold
        except UserError as error:
            return UserError(f"{label}: {error}")
    return golds


def machine(jobs: int) -> dict[str, Any]:
    """What a request tells of the machine: worker processes, cores, versions."""
    return {"jobs": jobs, "cores": os.cpu_count(), "versions": versions()}


def run(folder: pathlib.Path, rows: Sequence[GridRow], jobs: int, quiet: bool) -> list[str]:
    """Trains the unfinished cells, `jobs` at a time. Returns those that failed.

    Each label has a process of its own, or several where there are fewer labels than jobs.

    Raises: UserError where another process is training the grid.
    """
    lock = run_folder.FolderLock(folder)
    lock.take()
    try:
        return _run(folder, rows, jobs, quiet)
    finally:
        lock.release()


def _run(folder: pathlib.Path, rows: Sequence[GridRow], jobs: int, quiet: bool) -> list[str]:
    # most of the labels' programs are the same
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs(folder)))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    left, failed = unfinished(folder, rows), []
    cells = sum(len(row.configs) for row in rows)
    report = Report(folder, cells, sum(map(len, left.values())), quiet)
    for label, seed, error in processes.run(
        functools.partial(train_cells, folder), share_out(left, jobs), jobs
    ):
        report(label, seed, error)
        failed += [f"{label}/seed{seed}"] if error else []
    return failed


def share_out(
    left: dict[str, dict[int, ml_collections.ConfigDict]], jobs: int
) -> list[tuple[str, dict[int, ml_collections.ConfigDict]]]:
    """Returns the work of each process: a label with some of its seeds.

    A label's seeds stay together, since they share programs, unless jobs would stand idle: 2 labels
    of 3 seeds are 2 tasks for 3 jobs, and 4 tasks (seeds 0 and 2, and 1, of each) for 4 jobs.
    """
    parts = max(1, jobs // max(1, len(left)))
    return [
        (label, dict(list(cells.items())[part::parts]))
        for label, cells in left.items()
        for part in range(min(parts, len(cells)))
    ]


def programs(folder: pathlib.Path) -> pathlib.Path:
    """Where the compiled programs of all cells of a grid are kept."""
    return folder.resolve() / "compiled"


def train_cells(
    folder: pathlib.Path, label: str, cells: dict[int, ml_collections.ConfigDict]
) -> Iterator[tuple[int, str]]:
    """Trains a label's cells one after the other; yields each seed with "" or its error."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # as in cli.run: Orbax remarks on every save
    for seed, config in cells.items():
        cell = cell_folder(folder, label, seed)
        try:
            train_cell(cell, config)
            yield seed, ""
        except UserError as error:
            yield seed, str(error)
        except Exception as error:  # whatever it is, the other cells go on
            cell.mkdir(parents=True, exist_ok=True)
            (cell / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            line = (str(error).splitlines() or [""])[0]
            yield seed, f"{type(error).__name__}: {line} ({cell / 'error.txt'})"


def train_cell(cell: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Trains one cell, or goes on with it."""
    (cell / "error.txt").unlink(missing_ok=True)
    Run(config, cell, quiet=True).train()


class Report:
    """A bar over the cells on a terminal, a line on stderr for each that ends; failures are told
    even when quiet.
    """

    def __init__(self, folder: pathlib.Path, cells: int, waiting: int, quiet: bool):
        self.folder, self.cells, self.ended, self.quiet = folder, cells, cells - waiting, quiet
        self.bar = tqdm.tqdm(
            total=cells, initial=self.ended, desc="cells", disable=not on_terminal(quiet)
        )

    def __call__(self, label: str, seed: int, error: str) -> None:
        self.ended += 1
        text = f"{label} seed {seed} failed: {error}"
        if not error:
            found = runs.cell_result(cell_folder(self.folder, label, seed))
            text = (
                f"{label} seed {seed}: {found['accuracy']:.3f} after {found['rounds']} rounds, "
                f"{found['tokens']:.0f} tokens, "
                f"{found['seconds']:.0f} s ({self.ended} of {self.cells})"
            )
        if error or not self.quiet:
            self.bar.write(text, file=sys.stderr)
        self.bar.update(1)
