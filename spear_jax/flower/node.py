"""A client on its own device.

Its examples, its part of the algorithm's state and all text stay in its folder:

    FOLDER/RUN/state/00003.npz      the client's part of the algorithm's state after round 3
    FOLDER/RUN/shapes.json          padded sizes, so that later rounds compile nothing
    FOLDER/RUN/traces/              what its rollouts said, as in a run folder
"""

import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flwr.app import RecordDict

from spear_jax.core.compilation import Compiles, enable_compilation_cache
from spear_jax.core.errors import UserError, shown
from spear_jax.core.files import write_whole, writing
from spear_jax.experiment.builder import Experiment, OwnParts, build
from spear_jax.experiment.run import view_of
from spear_jax.experiment.run_logger import write_traces
from spear_jax.federated.single_client import ClientUpdate, client_round, hide
from spear_jax.flower import messages
from spear_jax.flower.secure import begin
from spear_jax.flower.terms import Terms, client_of, folder_of, with_own

KEPT = 2  # states of a node; a server that was killed asks for the round before once more
STEADY = 2  # rounds after which padded sizes are frozen, as in a run


def answer(
    records: RecordDict, node_config: Mapping[str, Any], run_config: Mapping[str, Any]
) -> RecordDict:
    """Trains a round of this node's client; returns what the server gets.

    Raises: UserError for a node that is set up wrongly, messages.Refused for a request that does
        not fit it.
    """
    messages.check_protocol(records, "asked")
    began, compiles = time.perf_counter(), Compiles()
    enable_compilation_cache()
    # a process trains one round, so that short compilations count, too
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    node = build_node(node_config, run_config)
    state = node.experiment.initial_state()
    mine = node.experiment.federation.algorithm.client_state
    shared = {name: x for name, x in state.algorithm_state.items() if name not in mine}
    request = messages.read_request(records, state.lora, shared)
    update = node.train(request)
    seconds = {
        "time/node": time.perf_counter() - began,
        "time/node_compile": compiles.take()["compile/seconds"],
    }
    update = dataclasses.replace(update, metrics=update.metrics | seconds)
    return node.write(update, request)


def build_node(node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> "Node":
    """Builds a node's experiment: on its own data, where it names any, else on its part of the
    training set.
    """
    client, folder = client_of(node_config), folder_of(node_config)
    config = with_own(Terms.read(run_config).config(), node_config)
    own = OwnParts(client=client if "data.path" in node_config else None)
    if client >= config.federation.num_clients:
        raise UserError(
            f"the node's client is {client}, but federation.num_clients is "
            f"{config.federation.num_clients}; clients are counted from 0."
        )
    devices = jax.devices()[: config.devices.model]  # more would train clients that are not here
    return Node(build(config, devices, own=own), client, folder)


@dataclasses.dataclass(frozen=True)
class Node:
    """A client's experiment and its folder."""

    experiment: Experiment
    client: int
    folder: pathlib.Path

    def train(self, request: messages.Request) -> ClientUpdate:
        """Runs the client's round, and keeps what stays with it.

        Raises: messages.Refused for a request to another client.
        """
        if request.client != self.client:
            raise messages.Refused(f"this node is client {self.client}, not {request.client}")
        if not re.fullmatch(r"[0-9a-f]{8,64}", request.run):
            raise messages.Refused(f"{shown(request.run)} is no name of a run")
        folder = self.folder / request.run
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        federation, settings = self.experiment.federation, self.experiment.settings
        worker, rounds = federation.worker, self._open_shapes(folder)
        feedback = worker.feedback
        feedback.begin_run(view_of(self.experiment, folder, lambda: worker.policy(request.adapter)))
        feedback.begin_round(request.round)
        try:
            update = client_round(
                federation,
                request.adapter,
                request.state | self._state(folder, request.round),
                self.client,
                request.round,
                jax.random.key(settings.seed),
                request.used,
            )
            feedback.end_round(request.round, update.metrics)
        finally:
            feedback.end_run()
        if settings.record_traces:
            write_traces(folder, request.round, update.traces, worker.renderer.pieces)
        self._keep(folder, request.round, update.client_state)
        saved = {"rounds": rounds + 1, "shapes": self.experiment.shapes.save()}
        write_whole(folder / "shapes.json", json.dumps(saved) + "\n")
        return update

    def write(self, update: ClientUpdate, request: messages.Request) -> RecordDict:
        """Returns what the server gets: the update, or under a secure sum keys alone."""
        federation, number = self.experiment.federation, request.round
        sends, secure = federation.aggregation.rule.sends(number), federation.aggregation.secure_sum
        if secure is None:
            return messages.write_update(update, sends)
        kept = self.experiment.initial_state().aggregation_state  # of which nothing moves
        hidden, totals = hide(federation, self.client, update, kept)
        codes = secure.encode(messages.as_vector(hidden, sends), secure.bound)
        pairs = {name: (float(x.total), float(x.count)) for name, x in totals.items()}
        return begin(self.folder / request.run, self.client, number, codes, pairs)

    def _open_shapes(self, folder: pathlib.Path) -> int:
        """Takes up the padded sizes of earlier rounds; returns how many those were."""
        file = folder / "shapes.json"
        if not file.exists():
            return 0
        saved = json.loads(file.read_text(encoding="utf-8"))
        self.experiment.shapes.load(saved["shapes"])
        if saved["rounds"] >= STEADY:
            self.experiment.shapes.freeze()
        return saved["rounds"]

    def _state(self, folder: pathlib.Path, round: int) -> dict[str, np.ndarray]:
        """The client's part of the algorithm's state before a round."""
        earlier = [number for number in _saved(folder) if number < round]
        if earlier:
            with np.load(folder / "state" / f"{earlier[-1]:05d}.npz") as file:
                return dict(file)
        whole = self.experiment.initial_state().algorithm_state
        return {name: whole[name] for name in self.experiment.federation.algorithm.client_state}

    def _keep(self, folder: pathlib.Path, round: int, state: dict[str, np.ndarray]) -> None:
        if not state:
            return
        target = folder / "state" / f"{round:05d}.npz"
        with writing(target):
            target.parent.mkdir(exist_ok=True)
            temporary = target.with_suffix(".tmp")
            with temporary.open("wb") as out:
                np.savez(out, **state)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, target)
            saved = _saved(folder)
            until = saved.index(round) + 1  # later ones are of rounds that the server has lost
            for number in saved[: max(0, until - KEPT)] + saved[until:]:
                (folder / "state" / f"{number:05d}.npz").unlink()


def _saved(folder: pathlib.Path) -> list[int]:
    """Rounds whose state is kept, rising."""
    return sorted(int(file.stem) for file in (folder / "state").glob("[0-9]*.npz"))
