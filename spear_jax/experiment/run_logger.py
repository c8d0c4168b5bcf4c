"""Where numbers go: metrics.jsonl, TensorBoard, W&B where asked, recorded traces, and progress on a
terminal.
"""

import gzip
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from spear_jax.core.files import write_whole, writing
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
    Raises: DiskError, here and in every method, where a file cannot be written.
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
        write_whole(self.file, "".join(json.dumps(x) + "\n" for x in kept))
        self.tracking = tracking
        self.board = Board(workdir / "tensorboard", len(kept) or None)

    def write(self, line: dict[str, Any]) -> None:
        """Appends a round's line and makes sure that it is on disk."""
        with writing(self.file), self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
            out.flush()
            os.fsync(out.fileno())
        self.board.write(line)
        if self.tracking:
            self.tracking.write(line)

    def traces(self, round: int, records: list[TraceRecord], pieces: Pieces) -> None:
        """Writes the round's rollouts (`write_traces`)."""
        write_traces(self.file.parent, round, records, pieces)

    def close(self) -> None:
        if self.tracking:
            self.tracking.close()
        self.board.close()


def write_traces(
    folder: pathlib.Path, round: int, records: list[TraceRecord], pieces: Pieces
) -> None:
    """traces/round_00001.jsonl.gz: every rollout of the round as text that a person can read, first
    answers also by token.

    Args: pieces: token ids -> each token's own text.
    Raises: DiskError where the file cannot be written.
    """
    target = folder / "traces" / f"round_{round:05d}.jsonl.gz"
    temporary = target.with_suffix(".tmp")
    with writing(target):
        target.parent.mkdir(exist_ok=True)
        # a text of a model may hold half a surrogate pair, which UTF-8 has no bytes for
        with gzip.open(temporary, "wt", encoding="utf-8", errors="backslashreplace") as out:
            for trace, role, confidence in records:
                record = _record(trace, role, confidence, pieces)
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(temporary, target)


class Board:
    """A run's metrics as an event file of TensorBoard.

    It is written at once: tensorboardX's own writer does so in a thread, which ends at a full disk
    and leaves its caller waiting.

    Args:
        folder: made where it is missing.
        purge_step: TensorBoard hides what earlier event files say of this step and later ones.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int | None):
        self.folder = folder
        with writing(folder):
            folder.mkdir(exist_ok=True)
            name = str(folder.resolve() / "events")
            self._events = EventsWriter(name, filename_suffix=f".{time.time_ns()}")
            if purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=purge_step, session_log=start))

    def write(self, line: dict[str, Any]) -> None:
        """Adds the metrics of a round's line, at step `round`."""
        with writing(self.folder):
            for name, value in line.items():
                if "/" in name:
                    event = Event(summary=scalar(name, value))
                    event.step, event.wall_time = line["round"], line["time"]
                    self._events.write_event(event)
            self._events.flush()

    def close(self) -> None:
        with writing(self.folder):
            self._events.close()


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
    return not quiet and all(
        stream is not None and not stream.closed and stream.isatty()
        for stream in (sys.stdout, sys.stderr)
    )


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
