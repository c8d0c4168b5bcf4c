"""Recorded first answers by token, and their scores under later adapters, as tidy tables.

Needs no JAX.
"""

import gzip
import json
import math
import pathlib

import pandas as pd

from spear_jax.analysis import runs
from spear_jax.core.errors import UserError


def load_tokens(workdir: runs.Folder, round: int) -> pd.DataFrame:
    """Loads the first answers of a round's traces, one row a token.

        trace  position  token  probability  touched
        0      0          B     0.71         True
        1      0          C     0.64         <NA>        no lose, so unlikelihood reads none of it

    Returns: columns trace (its number in the round), client, example, role, confidence, position
        (from 0), id, token (its own text), probability (under the rollout policy, untempered) and
        touched. touched is whether unlikelihood may touch the token; <NA> where unlikelihood reads
        none of the sampled ids.
    Raises: UserError where nothing was asked in the round.
    """
    tables = []
    for number, trace in enumerate(runs.load_traces(workdir, round)):
        about = {name: trace[name] for name in ("client", "example", "role", "confidence")}
        table = pd.DataFrame({"trace": number, **about, **trace["tokens"]})
        tables.append(
            table.assign(position=range(len(table)), touched=table["touched"].astype("boolean"))
        )
    if not tables:
        raise UserError(
            f"nothing was asked in round {round} of {workdir}; its method generates no answers."
        )
    tokens = pd.concat(tables, ignore_index=True).rename(columns={"text": "token"})
    tokens["probability"] = tokens.pop("logprob").map(math.exp)
    return tokens[
        [
            "trace",
            "client",
            "example",
            "role",
            "confidence",
            "position",
            "id",
            "token",
            "probability",
            "touched",
        ]
    ]


def load_scores(workdir: runs.Folder, round: int) -> pd.DataFrame:
    """Loads the scores of `score --traces=ROUND`: the same tokens under other rounds' adapters.

    Returns: one row a token and adapter. Columns adapter (the round whose adapter scored), trace,
        position, probability; joins `load_tokens` on trace and position.
    Raises: UserError where the round was not scored.
    """
    file = pathlib.Path(workdir) / "scores" / f"round_{round:05d}.jsonl.gz"
    if not file.is_file():
        raise UserError(
            f"{file} does not exist; `python -m spear_jax.score --workdir={workdir} "
            f"--traces={round}` makes it."
        )
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        table = pd.DataFrame(map(json.loads, lines))
    table["position"] = table["logprob"].map(lambda values: list(range(len(values))))
    table = table.explode(["logprob", "position"], ignore_index=True)
    table["probability"] = table.pop("logprob").map(math.exp)
    return table.astype({"position": int})
