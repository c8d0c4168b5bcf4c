"""Where numbers go: metrics.jsonl, TensorBoard, W&B where asked, recorded traces, and progress on a
terminal.
"""

import gzip
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import tensorboardX
import tqdm

from spear_jax.core.records import read_lines
from spear_jax.core.types import Trace, TraceRecord
from spear_jax.experiment.wandb_logger import WandbLogger

Pieces = Callable[[list[int]], list[str]]


class RunLogger:
    """metrics.jsonl, TensorBoard and traces of one run folder.

    Args:
        workdir: the run folder.
        resumed: the last finished round, or None for a fresh start. Later lines (of a round that
            was cut short) are dropped.
        line: the last finished round's line, written again where the file lost it.
        tracking: a W&B run that gets the same lines, or None.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        resumed: int | None,
        line: dict[str, Any] | None = None,
        tracking: WandbLogger | None = None,
    ):
        self.file = workdir / "metrics.jsonl"
        kept = (
            [] if resumed is None else [x for x in read_lines(self.file) if x["round"] <= resumed]
        )
        if line is not None and all(x["round"] != line["round"] for x in kept):
            kept.append(line)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(x) + "\n" for x in kept))
        os.replace(temporary, self.file)
        self.tracking = tracking
        self.board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=len(kept) or None
        )

    def write(self, line: dict[str, Any]) -> None:
        """Appends a round's line and makes sure that it is on disk."""
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
            out.flush()
            os.fsync(out.fileno())
        for name, value in line.items():
            if "/" in name:
                self.board.add_scalar(name, value, line["round"], walltime=line["time"])
        self.board.flush()
        if self.tracking:
            self.tracking.write(line)

    def traces(self, round: int, records: list[TraceRecord], pieces: Pieces) -> None:
        """traces/round_00001.jsonl.gz: every rollout of the round as text that a person can read,
        first answers also by token.

        Args: pieces: token ids -> each token's own text.
        """
        folder = self.file.parent / "traces"
        folder.mkdir(exist_ok=True)
        target = folder / f"round_{round:05d}.jsonl.gz"
        temporary = target.with_suffix(".tmp")
        with gzip.open(temporary, "wt", encoding="utf-8") as out:
            for trace, role, confidence in records:
                out.write(
                    json.dumps(_record(trace, role, confidence, pieces), ensure_ascii=False) + "\n"
                )
        os.replace(temporary, target)

    def close(self) -> None:
        self.board.close()
        if self.tracking:
            self.tracking.close()


class NullLogger:
    """In place of a `RunLogger` in all processes but the first: writes nothing."""

    def write(self, line: dict[str, Any]) -> None:
        pass

    def traces(self, round: int, records: list[TraceRecord], pieces: Pieces) -> None:
        pass

    def close(self) -> None:
        pass


def _record(trace: Trace, role: str, confidence: float, pieces: Pieces) -> dict[str, Any]:
    example, first = trace.example, trace.first
    return {
        "client": trace.client,
        "example": example.id,
        "prompt": example.question,
        "options": dict(zip(example.labels, example.options, strict=True)),
        "gold": example.labels[example.gold] if example.labels else example.response,
        "y0": first.text,
        "correct": first.correct,
        "tokens": {
            "id": first.completion,
            "text": pieces(first.completion),
            "logprob": [round(x, 4) for x in map(float, first.logprobs)],
            "touched": first.unlikelihood_mask and [int(x) for x in first.unlikelihood_mask],
        },
        "revisions": [
            {"feedback": attempt.feedback, "text": attempt.text, "correct": attempt.correct}
            for attempt in trace.attempts[1:]
        ],
        "role": role,
        "confidence": confidence,
    }


def on_terminal(quiet: bool) -> bool:
    """Whether progress is to be shown."""
    return not quiet and sys.stdout.isatty() and sys.stderr.isatty()


class ProgressBars:
    """Bars with an estimate on a terminal; silent with `quiet` or where stdout or stderr is no
    terminal.
    """

    def __init__(self, quiet: bool):
        self.shown = on_terminal(quiet)
        self.rounds: tqdm.tqdm | None = None
        self.stage: tqdm.tqdm | None = None

    def begin(self, rounds: int, done: int) -> None:
        """Shows a run's rounds, of which so many are done."""
        self.close()
        self.rounds = tqdm.tqdm(
            total=rounds, initial=done, desc="rounds", disable=not self.shown, position=0
        )

    def stage_rows(self, stage: str, rows: int, total: int) -> None:
        """Counts rows (in training: clients) of a stage inside the round. Args: rows: finished
        since the last call; total: of the stage.
        """
        if not self.shown:
            return
        if (
            self.stage is None
            or self.stage.desc != f"  {stage}"
            or self.stage.n >= self.stage.total
        ):
            self.end()
            self.stage = tqdm.tqdm(desc=f"  {stage}", total=total, unit="", position=1, leave=False)
        self.stage.update(rows)

    def end(self) -> None:
        if self.stage is not None:
            self.stage.close()
            self.stage = None

    def round_done(self, line: dict[str, Any]) -> None:
        self.end()
        shown = {"accuracy": f"{line['eval/accuracy']:.3f}"} if "eval/accuracy" in line else {}
        if self.rounds is not None:
            self.rounds.set_postfix(shown | {"wins": int(line["rollout/wins"])}, refresh=False)
            self.rounds.update(1)

    def close(self) -> None:
        self.end()
        if self.rounds is not None:
            self.rounds.close()
            self.rounds = None
