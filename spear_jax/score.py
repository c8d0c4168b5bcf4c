"""Scores recorded first answers under the adapters of saved rounds.

How likely is the same text after each round? Writes WORKDIR/scores/round_00001.jsonl.gz (of
--traces=1), which `spear_jax.analysis.token_tables.load_scores` reads. Answers that are sampled
anew in every round cannot be compared so: likely tokens are the ones that are drawn. A round is
scored where it has a checkpoint; --config.checkpoint.keep_last=1000 at training keeps them all.
"""

import gzip
import json
import os
import pathlib
from typing import Any

import numpy as np
import tqdm

from spear_jax.analysis import runs
from spear_jax.core.compilation import enable_compilation_cache
from spear_jax.core.errors import UserError
from spear_jax.experiment import builder, command_line, run_folder
from spear_jax.experiment.builder import Experiment
from spear_jax.experiment.checkpoint import restore, saved_rounds
from spear_jax.experiment.run_logger import on_terminal
from spear_jax.packing.rows import TrainingRow
from spear_jax.rollout.policy import Policy

EXAMPLES = """
    python -m spear_jax.score --workdir=runs/quickstart --traces=1
    python -m spear_jax.score --workdir=runs/quickstart --traces=3 --rounds=2,12
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("score", __doc__, EXAMPLES)
    parser.add_argument("--workdir", required=True, help="a run folder of `train`")
    parser.add_argument(
        "--traces",
        type=int,
        default=1,
        help="the round whose first answers are scored (default: 1)",
    )
    parser.add_argument(
        "--rounds", default="", help="saved rounds to score under, for example 0,4,8 (default: all)"
    )
    parser.add_argument("--quiet", action="store_true", help="print the JSON line only")
    args = parser.parse_args(argv)
    enable_compilation_cache()
    folder = pathlib.Path(args.workdir)
    traces = runs.load_traces(folder, args.traces)
    built = builder.build(run_folder.read_run_config(folder))
    rounds = read_rounds(args.rounds) or saved_rounds(folder)
    rows = recorded_rows(built, traces)
    lines = []
    for round in tqdm.tqdm(rounds, desc="rounds", disable=not on_terminal(args.quiet)):
        policies = built.policies(restore(built, folder, round)[0])
        lines += [
            {"adapter": round, "trace": i, "logprob": x}
            for i, x in enumerate(score(built, policies, traces, rows))
        ]
    out = folder / "scores" / f"round_{args.traces:05d}.jsonl.gz"
    out.parent.mkdir(exist_ok=True)
    temporary = out.with_suffix(".tmp")
    with gzip.open(temporary, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    os.replace(temporary, out)
    if not args.quiet:
        print(
            f"{len(traces)} first answers of round {args.traces} under the adapters of rounds "
            f"{rounds} -> {out}"
        )
    return {"out": str(out), "traces": len(traces), "rounds": rounds}


def read_rounds(text: str) -> list[int]:
    """Reads the rounds of "0,4,8"."""
    parts = text.split(",") if text else []
    if not all(part.isdecimal() for part in parts):
        raise UserError(
            f"--rounds is {text!r}; give whole numbers from 0, for example --rounds=0,4,8."
        )
    return [int(part) for part in parts]


def recorded_rows(built: Experiment, traces: list[dict[str, Any]]) -> list[TrainingRow]:
    """Returns the first answers as sampled, under the prompts that they were sampled from."""
    worker = built.federation.worker
    place = {example.id: index for index, example in enumerate(worker.examples)}
    tokens = [trace["tokens"]["id"] for trace in traces]
    prompts = [worker.data.prompts[place[trace["example"]]] for trace in traces]
    return [
        TrainingRow(prompt, ids, np.ones(len(ids), bool), 1.0, 1)
        for prompt, ids in zip(prompts, tokens, strict=True)
    ]


def score(
    built: Experiment, policies: list[Policy], traces: list[dict[str, Any]], rows: list[TrainingRow]
) -> list[list[float]]:
    """Returns the log-probabilities of each row's tokens in nats.

    They are under the global policy or, of a local-only run, its client's own.
    """
    scores: list[list[float]] = [[]] * len(rows)
    local_only = len(policies) > 1
    for client, policy in enumerate(policies):
        places = [
            i for i, trace in enumerate(traces) if not local_only or trace["client"] == client
        ]
        if not places:
            continue
        scored = built.federation.worker.score(policy, [rows[i] for i in places])
        for i, logprobs in zip(places, scored, strict=True):
            scores[i] = [round(float(x), 4) for x in logprobs]
    return scores


if __name__ == "__main__":
    command_line.run(main)
