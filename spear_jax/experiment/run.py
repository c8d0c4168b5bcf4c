"""A run: rounds one after the other, evaluated, checkpointed and logged.

    run = Run(preset("spear", task="facts", model="tiny"), workdir="runs/hello")
    for round in run:                                  # goes on where it stopped
        print(round.number, round.metrics["train/loss"], round.accuracy)
    run.export("runs/hello/adapter")

The run folder holds config.json, metrics.jsonl, checkpoints/, traces/, tensorboard/, split.json
and, at the end, summary.json and figures. Everything that a finished round gave is on disk before
the next one begins, so a kill loses at most the round it falls into. One process at a time writes
there.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from spear_jax.core.compilation import Compiles, release_after_compiling
from spear_jax.core.errors import UserError
from spear_jax.core.files import DiskError, write_whole, writing
from spear_jax.core.mesh import barrier, broadcast_from_main, is_main_process
from spear_jax.core.surroundings import say
from spear_jax.core.types import Attempt, Example, TraceRecord
from spear_jax.experiment import finetune, run_folder
from spear_jax.experiment.aggregation import told_before
from spear_jax.experiment.builder import Experiment, OwnParts, build
from spear_jax.experiment.checkpoint import Checkpoints, restore, saved_rounds
from spear_jax.experiment.dry_run import write_split
from spear_jax.experiment.evaluator import Accuracy
from spear_jax.experiment.export import export_adapter, export_model
from spear_jax.experiment.run_logger import NullLogger, ProgressBars, RunLogger
from spear_jax.experiment.wandb_logger import WandbLogger, check_wandb
from spear_jax.federated import asynchronous, local_only
from spear_jax.federated import round as whole_cohort
from spear_jax.federated.aggregation.lora_rules.base import LoraRule
from spear_jax.federated.aggregation.reducers import ClientTransform, Reducer
from spear_jax.federated.round import RoundResult
from spear_jax.federated.round_metrics import BudgetUsed, accuracy_metrics
from spear_jax.federated.state import ServerState
from spear_jax.feedback.base import Feedback, RunView
from spear_jax.rollout.policy import Policy
from spear_jax.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Round:
    """A finished round.

    Attributes:
        number: 1-based.
        metrics: its line of metrics.jsonl ("rollout/first_accuracy", "train/loss", ...).
        traces: what its rollouts said.
    """

    number: int
    metrics: dict[str, float]
    traces: list[TraceRecord]

    @property
    def accuracy(self) -> float | None:
        """Held-out accuracy, where the round was evaluated."""
        return self.metrics.get("eval/accuracy")


class Callback:
    """Called as a run goes on; override what is wanted. `run.stop()` ends it after the round."""

    def on_train_begin(self, run: "Run") -> None:
        """Before the first round of this process."""

    def on_evaluate(self, run: "Run", accuracy: Accuracy, round_number: int) -> None:
        """After an evaluation; round 0 is the base model."""

    def on_round_end(self, run: "Run", round: Round) -> None:
        """After a round's metrics and traces are on disk."""

    def on_train_end(self, run: "Run", summary: dict[str, Any]) -> None:
        """After the last round. Args: summary: as in summary.json."""


class Run:
    """An experiment in a run folder.

    Iterating trains: each step is one round. A run whose folder holds rounds already goes on behind
    them; a run that has ended gives no more rounds. From the first round to the last the folder is
    this run's. While another process trains there, this run is refused; it can still be read:
    evaluated and exported.

    Args:
        config: as from `preset` or `load_config`.
        workdir: the run folder.
        resume: "auto" goes on where a run of the same config stopped, "never" insists on a new
            folder, "must" on an old one.
        callbacks: called in this order.
        quiet: no bars and no table.
        devices: all by default.
        task, feedback: objects in place of what the config names.
        reducer, lora_rule, server_optimizer, transforms: the aggregation, likewise.
            `server_optimizer` is an optax transformation that sees the pseudo-gradient.
    Raises: UserError for every mistake that can be known before compiling. Iterating raises it for
        a folder that another process writes to, and where the disk takes no more: the message says
        which rounds are kept, and iterating again goes on from there.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: str | pathlib.Path,
        resume: str = "auto",
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
        devices: list[jax.Device] | None = None,
        task: Task | None = None,
        feedback: Feedback | None = None,
        reducer: Reducer | None = None,
        server_optimizer: optax.GradientTransformation | None = None,
        transforms: Sequence[ClientTransform] = (),
        lora_rule: LoraRule | None = None,
    ):
        check_wandb(config)
        run_folder.check_names(str(workdir), resume)
        self.workdir = pathlib.Path(workdir)
        self._lock = run_folder.FolderLock(self.workdir, self.save, self.close)
        self._checkpoints: Checkpoints | None = None
        self._logger: RunLogger | NullLogger = NullLogger()
        self.config = _named(config, task, feedback, reducer, lora_rule)
        self.callbacks, self.quiet = list(callbacks), quiet
        self.bars = ProgressBars(quiet or not is_main_process())
        _check_local_only(self.config, server_optimizer, transforms)
        own = OwnParts(task, feedback, reducer, lora_rule, server_optimizer, tuple(transforms))
        self.experiment: Experiment = build(self.config, devices, self.bars.stage_rows, own)
        self.state: ServerState
        self.line: dict[str, Any]  # the newest line of metrics.jsonl; {} before the first
        self._stopped = False
        self._told = self._told_clipped = False
        self._open(resume)

    @property
    def settings(self):
        """The parsed config."""
        return self.experiment.settings

    @property
    def checkpoints(self) -> Checkpoints:
        """The run folder's checkpoints, open for writing."""
        if self._checkpoints is None:
            self._checkpoints = self._open_checkpoints()
        return self._checkpoints

    @property
    def finished_rounds(self) -> int:
        """Rounds behind this run."""
        return int(self.state.round)

    def __iter__(self) -> Iterator[Round]:
        try:
            self._take_folder()
            ended_before = self._over()
            if not ended_before:
                yield from self._rounds()
            self._finetune()
            self.close()
            if is_main_process():
                summary = finish(self.workdir, self.quiet)
                for callback in () if ended_before else self.callbacks:
                    callback.on_train_end(self, summary)
        except BaseException as error:  # the loop was left early; a later one goes on from here
            self._leave(error)
            raise

    def train(self) -> dict[str, Any]:
        """Runs all rounds that are left. Returns the summary, as in summary.json."""
        for _ in self:
            pass
        return self.summary()

    def stop(self) -> None:
        """Ends the run after the round that is running."""
        self._stopped = True

    def evaluate(self, round: int | None = None) -> Accuracy:
        """Measures held-out accuracy of the newest adapter, or of a saved round's.

        Of a local-only run it is the mean over the clients' adapters.
        Raises: UserError for a round without a checkpoint.
        """
        return self._accuracy(self._state_of(round))

    def save(self) -> None:
        """Waits until the newest checkpoint is on disk."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def export(
        self,
        folder: str | pathlib.Path,
        merge: bool = False,
        round: int | None = None,
        client: int | None = None,
        rank: int | None = None,
    ) -> pathlib.Path:
        """Writes the adapter as a PEFT folder, or with `merge` the whole model in Hugging Face's.

        Args: round: a saved one (None: the newest state). client: whose adapter, of a run
            in which every client has its own. rank: of the adapter, where the base has changed.
        Raises: UserError where the folder is not empty.
        """
        write = export_model if merge else export_adapter
        return write(self.experiment, self._state_of(round), folder, client, rank)

    def summary(self) -> dict[str, Any]:
        """Returns the run so far: rounds, eval, seconds, tokens and bytes."""
        from spear_jax.analysis import runs  # here, not above: pandas takes memory

        return {"workdir": str(self.workdir), **runs.summarise(self.workdir)}

    def close(self) -> None:
        """Waits for checkpoints, closes the logs and leaves the folder to others; the run can still
        be iterated.
        """
        logger, self._logger = self._logger, NullLogger()
        checkpoints, self._checkpoints = self._checkpoints, None
        with contextlib.ExitStack() as last_first:  # each of them, whatever the others raise
            last_first.callback(self._lock.release)
            if checkpoints is not None:
                last_first.callback(checkpoints.close)
            last_first.callback(logger.close)
            last_first.callback(self.bars.close)
            last_first.callback(self._feedback.end_run)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside

    def _open(self, resume: str) -> None:
        """Opens the folder and takes up what is there; reads it alone where another process has it
        in use, and where it cannot be written.
        """
        main = is_main_process()
        if main and resume != "must":
            run_folder.make_folder(self.workdir)
        try:
            with self._lock.while_opening() if main else contextlib.nullcontext():
                self._make_folder(resume)
                self._restore(self.checkpoints)
        except (run_folder.InUse, DiskError):
            if jax.process_count() > 1 or not saved_rounds(self.workdir):
                raise
            run_folder.open_workdir(str(self.workdir), self.config, resume)
            self._restore(self._open_checkpoints(read_only=True))

    def _make_folder(self, resume: str) -> None:
        """The run folder: the first process makes or checks it and draws the split, the others come
        after.
        """
        if is_main_process():
            run_folder.open_workdir(str(self.workdir), self.config, resume)
            with writing(self.workdir / "split.json"):
                write_split(self.experiment, self.workdir)
        barrier("run folder")
        run_folder.open_workdir(str(self.workdir), self.config, "auto")

    def _open_checkpoints(self, read_only: bool = False) -> Checkpoints:
        keep, folder = self.settings.checkpoint, self.workdir / "checkpoints"
        return Checkpoints(folder, keep.keep_last, keep.keep_best, read_only)

    def _take_folder(self) -> None:
        """Takes the folder for this run, and takes up what is newest there.

        That is another round than this run's where another run has gone on since, or where a round
        was broken off.
        """
        behind = False
        if is_main_process():
            run_folder.make_folder(self.workdir)
            self._lock.take()
            run_folder.open_workdir(str(self.workdir), self.config, "auto")
            behind = (saved_rounds(self.workdir) or [0])[-1] != self.finished_rounds
        if broadcast_from_main(behind):
            if self._checkpoints is not None:
                self._checkpoints.close()
                self._checkpoints = None
            self._restore(self.checkpoints)

    def _rounds(self) -> Iterator[Round]:
        """Trains the rounds that are left."""
        release_after_compiling()
        self._begin()
        blocked, compiles = 0.0, Compiles()
        while not self._over():
            self._check_folder()
            self._feedback.begin_round(self.finished_rounds + 1)
            round = self._round(blocked, compiles)
            blocked = self._save()
            self._feedback.end_round(round.number, round.metrics)
            self.bars.round_done(round.metrics)
            for callback in self.callbacks:
                callback.on_round_end(self, round)
            yield round

    def _finetune(self) -> None:
        """Fine-tunes every client after the last round, once, where the config asks for it."""
        file = self.workdir / finetune.NAME
        if not self.settings.personal.finetune or broadcast_from_main(file.is_file()):
            return
        found = finetune.finetune(self.experiment, self.state)
        if is_main_process():
            write_whole(file, json.dumps(found, indent=1) + "\n")

    def _leave(self, error: BaseException) -> None:
        """Closes the run that an error has ended; where that is a disk's, says what is kept."""
        # for a checkpoint of several processes all of them would have to wait
        alone = jax.process_count() == 1 or isinstance(error, GeneratorExit)
        try:
            (self.close if alone else self._lock.release)()
        except DiskError as failed:
            error = error if isinstance(error, DiskError) else failed
        if isinstance(error, DiskError):
            saved = saved_rounds(self.workdir)
            kept = f"Rounds up to {saved[-1]} are kept" if saved else "No round is kept so far"
            raise UserError(f"{error} {kept}; the same command then goes on from there.") from error

    def _restore(self, checkpoints: Checkpoints) -> None:
        """Takes up the newest whole checkpoint, or begins."""
        self.state, self.line = self.experiment.initial_state(), {}
        saved = checkpoints.restore(self.state)
        if saved is not None:
            self.state, meta = saved
            self.line = meta["line"]
            self.experiment.shapes.load(meta["shapes"])
        # always placed alike, or the programs would compile again; the states of a method and of
        # aggregation stay on the host
        on_devices = self.experiment.federation.on_devices
        method, kept = self.state.algorithm_state, self.state.aggregation_state
        bare = dataclasses.replace(self.state, algorithm_state={}, aggregation_state={})
        self.state = on_devices(bare).replace(algorithm_state=method, aggregation_state=kept)

    def _begin(self) -> None:
        """Opens the logs; evaluates the base model where nothing has run yet."""
        fresh = not self.line
        if isinstance(self._logger, NullLogger):
            self._logger = self._open_logger()
        self.bars.begin(self.settings.rounds, self.finished_rounds)
        if not fresh and is_main_process() and not self.quiet:
            say(f"going on after round {self.finished_rounds}", sys.stderr)
        if is_main_process() and not self.quiet:
            for text in told_before(self.settings):
                say(f"note: {text}", sys.stderr)
        for callback in self.callbacks:
            callback.on_train_begin(self)
        self._feedback.begin_run(self._view())
        if fresh:
            self.line = {"round": 0, "time": time.time()} | self._evaluated(0)
            self._check_folder()
            self._logger.write(self.line)
            self._save()
            self._feedback.end_round(0, self.line)

    @property
    def _feedback(self) -> Feedback:
        return self.experiment.federation.worker.feedback

    def _view(self) -> RunView:
        """The run as a feedback provider sees it."""

        @functools.lru_cache(1)  # a merged copy of the base is made once a round
        def policy(rounds: int) -> Policy:
            federation = self.experiment.federation.on_base(self.state.aggregation_state)
            # where each client has an adapter, the first one's
            return federation.worker.policy(self.experiment.adapters(self.state)[0])

        return view_of(self.experiment, self.workdir, lambda: policy(self.finished_rounds))

    def _check_folder(self) -> None:
        """Raises UserError where the folder is no longer this run's, or no longer there."""
        if is_main_process():
            self._lock.check()

    def _open_logger(self) -> RunLogger | NullLogger:
        if not is_main_process():
            return NullLogger()
        federation = self.experiment.federation
        chosen = {
            "train.remat": federation.decoder.remat,
            "federation.clients_at_once": federation.local.clients_at_once,
        }
        run_folder.record_start(self.workdir, chosen)
        resumed = self.finished_rounds if self.line else None
        wandb = WandbLogger(self.workdir, self.config) if self.settings.wandb else None
        return RunLogger(self.workdir, resumed, self.line or None, wandb)

    def _round(self, blocked: float, compiles: Compiles) -> Round:
        """Runs a round and its evaluation, and logs both.

        Args:
            blocked: seconds that the previous round's checkpoint held the loop up (saving itself is
                asynchronous).
        """
        began, experiment = time.perf_counter(), self.experiment
        self.state, metrics, traces = self._run_round()
        number = self.finished_rounds
        if number == 2:
            experiment.shapes.freeze()  # from here on batches are padded into shapes that exist
        self.line = metrics
        self._tell_left_out(number, metrics)
        self._tell_clipped(number, metrics.get("secure/clipped", 0.0))
        if is_due(self.settings, number) or self._over():
            metrics |= self._evaluated(number)
        metrics["time/checkpoint"] = blocked
        metrics["time/round"] = time.perf_counter() - began
        metrics["memory/peak_bytes"] = float(peak_bytes())
        self.line = {"round": number, "time": time.time()} | metrics | compiles.take()
        self._check_folder()
        if self.settings.record_traces:
            self._logger.traces(number, traces, experiment.federation.worker.renderer.pieces)
        self._logger.write(self.line)
        return Round(number, self.line, traces)

    def _run_round(self) -> RoundResult:
        """Runs the next round, all of its clients in this process."""
        federation = self.experiment.federation
        run_round = whole_cohort.run_round
        if federation.local_only:
            run_round = local_only.run_round
        if federation.asynchronous is not None:
            run_round = asynchronous.run_round
        return run_round(federation, self.state, BudgetUsed.read(self.line))

    def _tell_left_out(self, number: int, metrics: dict[str, float]) -> None:
        """Says, once in a run, that updates or steps were not finite and are left out."""
        clients = int(metrics["round/clients_not_finite"])
        skipped = metrics.get("train/skipped_steps", 0.0)
        if (clients or skipped) and not self._told and is_main_process():
            self._told = True
            say(
                f"note: round {number} left out {clients} clients whose updates are NaN or "
                f"infinite, and {skipped:.0%} of the steps, whose gradients are; further rounds "
                "are counted in round/clients_not_finite and train/skipped_steps",
                sys.stderr,
            )

    def _tell_clipped(self, number: int, share: float) -> None:
        """Says, once in a run, that the secure sum cut numbers off."""
        if share and not self._told_clipped and is_main_process():
            self._told_clipped = True
            bound = self.settings.aggregation.secure_bound
            say(
                f"note: round {number} cut {share:.2%} of all updates' numbers, times weight, to "
                f"aggregation.secure_bound={bound:g}; raise it, or set "
                "federation.weighting=uniform. Further rounds are counted in secure/clipped",
                sys.stderr,
            )

    def _save(self) -> float:
        """Starts a checkpoint. Returns the seconds that it held the loop up."""
        began = time.perf_counter()
        self.checkpoints.save(self.state, self.line, self.experiment.shapes.save())
        return time.perf_counter() - began

    def _over(self) -> bool:
        """Whether the run is done: stopped, all its rounds, or its budget reached."""
        budget, used = self.settings.budget, BudgetUsed.read(self.line)
        reached = (budget.tokens and used.tokens >= budget.tokens) or (
            budget.seconds and used.seconds >= budget.seconds
        )
        return self._stopped or bool(reached) or self.finished_rounds >= self.settings.rounds

    def _state_of(self, round: int | None) -> ServerState:
        if round is None or round == self.finished_rounds:
            return self.state
        self.save()
        return restore(self.experiment, self.workdir, round)[0]

    def _accuracy(self, state: ServerState) -> Accuracy:
        policies = self.experiment.policies(state)
        return mean_accuracy([self.experiment.evaluator(policy) for policy in policies])

    def _evaluated(self, number: int) -> dict[str, float]:
        """Evaluates the newest adapter; returns its metrics by the contract's names."""
        began = time.perf_counter()
        policies = self.experiment.policies(self.state)
        found = [self.experiment.evaluator(policy) for policy in policies]
        accuracy = float(np.mean([one.accuracy for one in found]))
        metrics = accuracy_metrics(accuracy, found[0].count)
        metrics["time/eval"] = time.perf_counter() - began
        if self.experiment.federation.ditto is not None:
            whole = self.experiment.policy_of(self.state.lora, self.state)
            own = [one.accuracy for one in found]
            metrics |= personal_metrics(own, self.experiment.evaluator(whole).accuracy)
        if found[0].nll is not None:
            metrics["eval/nll"] = float(np.mean([one.nll for one in found]))
        for callback in self.callbacks:
            callback.on_evaluate(self, mean_accuracy(found), number)
        return metrics


def view_of(experiment: Experiment, folder: pathlib.Path, policy: Callable[[], Policy]) -> RunView:
    """Returns a run as a feedback provider sees it.

    Args: folder: what the provider keeps, it keeps there; policy: the newest one.
    """
    worker, settings = experiment.federation.worker, experiment.settings

    def answer(asked: list[tuple[Example, str, str]]) -> list[Attempt]:
        return worker.reply(policy(), asked, experiment.evaluator.sampling)

    return RunView(
        name=folder.name,
        folder=folder,
        clients=settings.federation.num_clients,
        rounds=settings.rounds,
        examples=worker.examples,
        answer=answer,
        count_tokens=lambda text: len(worker.renderer.tokenizer.encode(text)),
    )


def load_run(workdir: str | pathlib.Path, **parts: Any) -> Run:
    """Opens an existing run folder.

    Args: parts: as for `Run`, for parts that were passed as objects.
    Raises: UserError where there is none, and where its config no longer builds.
    """
    config = run_folder.read_run_config(pathlib.Path(workdir))
    return Run(config, workdir, resume="must", **parts)


def mean_accuracy(found: list[Accuracy]) -> Accuracy:
    """Returns the mean over clients' adapters, rounded to whole answers; of one, itself."""
    if len(found) == 1:
        return found[0]
    mean = round(sum(one.correct for one in found) / len(found))
    return dataclasses.replace(found[0], correct=mean)


def personal_metrics(own: list[float], whole: float) -> dict[str, float]:
    """Returns metrics beside the mean over clients' own adapters.

    Args: own: accuracy of each; whole: of the global one.
    """
    return {
        "personal/global_accuracy": whole,
        "personal/worst_accuracy": min(own),
        "personal/best_accuracy": max(own),
    }


def is_due(settings: Any, number: int) -> bool:
    """Returns whether round `number` (from 1) is evaluated by its number; the last one is in any
    case.
    """
    return number <= max(1, settings.eval.first_rounds) or number % settings.eval.every == 0


def finish(workdir: pathlib.Path, quiet: bool) -> dict[str, Any]:
    """Writes accuracy.png and summary.json and, unless quiet, prints a table; raises DiskError where
    one of them cannot be written.
    """
    from spear_jax.analysis import runs  # here, not above: training does without pandas' memory

    summary = runs.summarise(workdir)
    figure, file = workdir / "accuracy.png", workdir / "summary.json"
    with writing(figure):
        runs.plot_accuracy([workdir], figure)
    write_whole(file, json.dumps(summary, indent=1) + "\n")  # last: it says that the run has ended
    if not quiet:
        say(f"{runs.round_table(workdir)}\nfigure: {figure}   summary: {file}")
    return {"workdir": str(workdir), **summary}


def peak_bytes() -> int:
    """Returns the peak memory of the first device; on a CPU, of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _named(
    config: ml_collections.ConfigDict,
    task: Task | None,
    feedback: Feedback | None,
    reducer: Reducer | None,
    lora_rule: LoraRule | None,
) -> ml_collections.ConfigDict:
    """A copy of the config that names the parts passed as objects, so that the folder tells."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if task is not None:
            config.task = task.name
        if feedback is not None:
            config.rollout.feedback = type(feedback).__name__
        if reducer is not None:
            config.federation.reducer = type(reducer).__name__
        if lora_rule is not None:
            config.federation.lora_rule = type(lora_rule).__name__
    return config.lock()


def _check_local_only(
    config: ml_collections.ConfigDict,
    optimizer: optax.GradientTransformation | None,
    transforms: Sequence[ClientTransform],
) -> None:
    """Raises UserError for parts of an aggregation that a local-only run would never use."""
    if config.federation.aggregation == "local" and (optimizer is not None or transforms):
        raise UserError(
            "federation.aggregation is local, which never aggregates; leave server_optimizer and "
            "transforms out, or set config.federation.aggregation."
        )
