"""Recorded traces as numbers of each client and round, and a few traces to read."""

import functools
import math
from typing import Any

import numpy as np
import pandas as pd

from spear_jax.analysis import runs
from spear_jax.analysis.report.runs import Run

KINDS = ("fixed", "not fixed", "right at once", "wrong, not revised")
COUNTS = ("answers", "first_right", "fixed", "loses")


def rounds_with_traces(run: Run) -> list[int]:
    """Returns the finished rounds that have a file of traces."""
    files = (run.folder / "traces").glob("round_*.jsonl.gz")
    numbers = sorted(int(file.name.split("_")[1].split(".")[0]) for file in files)
    return [number for number in numbers if number <= run.rounds]


def kind(trace: dict[str, Any]) -> str:
    """Returns the fate of a trace's first answer, one of KINDS."""
    if trace["correct"]:
        return "right at once"
    if not trace["revisions"]:
        return "wrong, not revised"
    return "fixed" if trace["revisions"][-1]["correct"] else "not fixed"


@functools.cache
def client_counts(run: Run) -> pd.DataFrame:
    """Returns one row a round and client, with its numbers of answers.

    Returns: columns round, client, answers (first answers), first_right, fixed (wrong first, right
        last), loses (trained on).
    """
    rows_of: dict[tuple[int, int], dict[str, int]] = {}
    for number in rounds_with_traces(run):
        for trace in runs.load_traces(run.folder, number):
            row = rows_of.setdefault((number, trace["client"]), dict.fromkeys(COUNTS, 0))
            row["answers"] += 1
            row["first_right"] += bool(trace["correct"])
            row["fixed"] += kind(trace) == "fixed"
            row["loses"] += trace["role"] == "lose"
    rows = [
        {"round": number, "client": client, **row}
        for (number, client), row in sorted(rows_of.items())
    ]
    return pd.DataFrame(rows, columns=["round", "client", *COUNTS])


def client_grid(counts: pd.DataFrame, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Returns of each client and round the fraction of first answers that were right.

    Client 3 answered in rounds 1 and 2, client 5 in round 2 alone:

        >>> counts = pd.DataFrame(
        ...     {"round": [1, 2, 2], "client": [3, 3, 5], "answers": [4, 4, 2], "first_right": [1, 3, 1]}
        ... )
        >>> clients, rounds, values, left = client_grid(counts, most=60)
        >>> clients.tolist(), rounds.tolist(), values.tolist()
        ([3, 5], [1, 2], [[0.25, 0.75], [nan, 0.5]])

    Args:
        counts: of `client_counts`.
        most: clients shown; the ones with the most answers, smaller numbers first among equals.
    Returns: clients int[n], ascending; rounds int[R], 1 to the last; float[n, R], NaN where a
        client had no answers; how many clients are left out.
    """
    answers = counts.groupby("client")["answers"].sum().sort_values(ascending=False, kind="stable")
    clients = np.sort(answers.index.to_numpy()[:most])
    rounds = np.arange(1, counts["round"].max() + 1)
    values = np.full((len(clients), len(rounds)), math.nan)
    places = {client: place for place, client in enumerate(clients)}
    for row in counts.itertuples():
        if row.client in places:
            values[places[row.client], row.round - 1] = row.first_right / row.answers
    return clients, rounds, values, len(answers) - len(clients)


def sample(run: Run, each: int) -> list[dict[str, Any]]:
    """Returns traces of every kind, always the same ones.

    There are up to `each` of a kind, from the last round and the first in turn. Within a round, the
    first by client and example whose client has not been shown yet is taken, else the first. Each
    has its "round" and its "kind".
    """
    rounds = rounds_with_traces(run)
    ends = list(dict.fromkeys([rounds[-1], rounds[0]])) if rounds else []
    recorded = {number: runs.load_traces(run.folder, number) for number in ends}
    chosen: list[dict[str, Any]] = []
    for wanted in KINDS:
        pools = {
            number: [trace for trace in recorded[number] if kind(trace) == wanted]
            for number in ends
        }
        picked: list[dict[str, Any]] = []
        for number in ends * each:
            shown = {trace["client"] for trace in chosen + picked}
            pool = sorted(
                pools[number], key=lambda x: (x["client"] in shown, x["client"], x["example"])
            )
            if pool and len(picked) < each:
                pools[number] = [trace for trace in pools[number] if trace is not pool[0]]
                picked.append(
                    pool[0] | {"round": number, "kind": wanted if run.graded else "not graded"}
                )
        chosen += picked
    return chosen
