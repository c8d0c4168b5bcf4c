"""One Orbax step a round, holding the whole server state, its digest, and the round's metrics
line.
"""

import functools
import json
import logging
import pathlib
import shutil
import sys
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from spear_jax.core import pytrees
from spear_jax.core.errors import UserError, shown
from spear_jax.core.files import read_json_object, writing
from spear_jax.core.mesh import barrier, is_main_process
from spear_jax.core.surroundings import say
from spear_jax.experiment.builder import Experiment
from spear_jax.federated.state import ServerState

# key of the saved tree -> field of ServerState; the keys enter the digest, so they keep the words
# of version 0.1
TREE = {
    "lora": "lora",
    "opt_state": "opt_state",
    "memory": "algorithm_state",
    "round": "round",
    "key": "key",
    "aggregation": "aggregation_state",
}
OPTIONAL = ("aggregation",)  # left out where it is empty, as before version 0.12

_TOLD = ("line", "shapes")


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Saving is asynchronous; `wait` blocks until everything is on disk. The newest `keep_last` rounds
    and the `keep_best` rounds of highest eval/accuracy stay, everything else is deleted.
    `read_only` leaves the folder as it is, so that a running experiment can be read.

    Raises: DiskError where a file cannot be written: from `save` or `wait` that come after it, too.
    """

    def __init__(
        self, folder: pathlib.Path, keep_last: int, keep_best: int, read_only: bool = False
    ):
        # Orbax remarks on every save, and shows a traceback of what it raises anyway
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if not read_only:
            _drop_late_answers()
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.read_only = folder.resolve(), read_only
        if not read_only:
            self._set_aside_unreadable_metrics()
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["accuracy"],
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        keep = [policies.LatestN(keep_last), *([best] if keep_best else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            best_fn=lambda metrics: metrics["accuracy"],
            # a reader does without the metrics, which may be damaged
            lightweight_initialize=read_only,
        )
        with writing(self.folder):
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: ServerState, line: dict[str, Any], shapes: dict[str, Any]) -> None:
        """Starts saving a round.

        Args:
            line: the round's line of metrics.jsonl.
            shapes: the sampler's open shapes (`Sampler.shapes`).
        """
        tree = _as_tree(state)
        step = int(tree["round"])
        accuracy = line.get("eval/accuracy")
        meta = {"digest": pytrees.digest(tree), "line": line, "shapes": shapes}
        meta["crc"] = _checksum(meta)
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
        metrics = None if accuracy is None else {"accuracy": accuracy}
        with writing(self.folder):
            self.manager.save(step, args=args, metrics=metrics, force=True)

    def wait(self) -> None:
        """Blocks until all saves are on disk."""
        with writing(self.folder):
            self.manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        with writing(self.folder):
            self.manager.close()

    def rounds(self) -> list[int]:
        """Saved rounds, oldest first."""
        return sorted(self.manager.all_steps())

    def restore(
        self, like: ServerState, round: int | None = None
    ) -> tuple[ServerState, dict[str, Any]] | None:
        """The newest whole checkpoint, or that of `round`.

        A checkpoint that cannot be read, or whose digest differs from its content, is reported on
        stderr and moved aside (`<round>.corrupt`), and the one before it is taken.

        Args: like: a state of the same structure, shapes and dtypes.
        Returns: the state (numpy leaves) and {"line", "shapes"} as saved; None where there is no
            checkpoint.
        Raises: UserError when `round` is named and not there or not whole, or when all checkpoints
            are corrupt.
        """
        saved = self.rounds()
        if round is not None and round not in saved:
            raise UserError(
                f"no checkpoint of round {round} in {self.folder}; saved rounds: {saved or 'none'}."
            )
        candidates = [round] if round is not None else saved[::-1]
        for step in candidates:
            state, meta, problem = self._read(step, like)
            if problem is None:
                return state, meta
            say(f"warning: the checkpoint of round {step} is corrupt ({problem})", sys.stderr)
            if round is None and not self.read_only:
                self._set_aside(step)
        if candidates:
            raise UserError(
                f"no whole checkpoint in {self.folder} (tried rounds {candidates}); "
                "start again in a new workdir, or with --resume=never after removing this one."
            )
        return None

    def _read(self, step: int, like: ServerState) -> tuple[ServerState | None, dict, str | None]:
        template = jax.tree.map(np.zeros_like, _as_tree(like))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore()
        )
        # Orbax and TensorStore raise many types for damaged files; each one means that this step
        # cannot be used.
        try:
            found = self.manager.restore(step, args=args)
        except Exception as error:
            return None, {}, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        meta = found.meta
        if not isinstance(meta, dict) or not all(name in meta for name in ("digest", *_TOLD)):
            return None, {}, f"its metadata is not what was saved: {shown(meta)}"
        if meta.get("crc", _checksum(meta)) != _checksum(meta):  # 0.10 saved none
            return None, {}, "its metadata does not match its checksum"
        if pytrees.digest(found.state) != meta["digest"]:
            return None, {}, "its content does not match its digest"
        fields = {
            name: pytrees.from_dicts(found.state[key], getattr(like, name))
            for key, name in TREE.items()
            if key in found.state
        }
        return ServerState(**fields), meta, None

    def _set_aside_unreadable_metrics(self) -> None:
        """Moves steps aside whose metrics no manager could read."""
        for file in sorted(self.folder.glob("*/metrics/metrics")):
            if file.parts[-3].isdecimal():
                try:
                    read_json_object(file)
                except UserError as error:
                    say(f"warning: a checkpoint is corrupt: {error}", sys.stderr)
                    self._move_aside(int(file.parts[-3]))

    def _set_aside(self, step: int) -> None:
        self._move_aside(step)
        self.manager.reload()

    def _move_aside(self, step: int) -> None:
        target = self.folder / f"{step}.corrupt"
        barrier(f"read {target}")
        if is_main_process():
            with writing(target):
                shutil.rmtree(target, ignore_errors=True)
                (self.folder / str(step)).rename(target)
            say(f"warning: moved it to {target.name}; taking the one before it", sys.stderr)
        barrier(f"moved {target}")


def _checksum(meta: dict[str, Any]) -> int:
    """Returns the CRC-32 of what a checkpoint's metadata tells beside the digest."""
    return zlib.crc32(json.dumps([meta[name] for name in _TOLD]).encode())


@functools.cache
def _drop_late_answers() -> None:
    """Keeps silent, from now on, of writes that TensorStore ends after Orbax has given up the save.

    The first write that fails is what Orbax raises; for the others Python would show a traceback.
    """
    shown = sys.unraisablehook

    def hook(found: Any) -> None:
        late = isinstance(found.exc_value, RuntimeError) and found.object is None
        if not (late and "Event loop is closed" in str(found.exc_value)):
            shown(found)

    sys.unraisablehook = hook


def saved_rounds(workdir: pathlib.Path) -> list[int]:
    """The rounds that have a checkpoint, oldest first."""
    return sorted(
        int(entry.name) for entry in (workdir / "checkpoints").glob("*") if entry.name.isdecimal()
    )


def restore(
    built: Experiment, workdir: pathlib.Path, round: int | None
) -> tuple[ServerState, dict[str, Any]]:
    """A run folder's newest whole checkpoint, or that of `round`, without touching the folder;
    UserError where there is none.
    """
    folder = workdir / "checkpoints"
    keep = built.settings.checkpoint
    found = None
    if folder.is_dir():
        found = Checkpoints(folder, keep.keep_last, keep.keep_best, read_only=True).restore(
            built.initial_state(), round
        )
    if found is None:
        raise UserError(
            f"{workdir} has no checkpoint yet; wait for the first evaluation of `train` to finish."
        )
    return found


def _as_tree(state: ServerState) -> dict[str, Any]:
    """Turns a state into the tree that is saved: plain dicts of numpy arrays."""
    named = {key: getattr(state, name) for key, name in TREE.items()}
    named = {key: part for key, part in named.items() if key not in OPTIONAL or part}
    return jax.tree.map(np.asarray, pytrees.to_dicts(named))
