"""The server: a run whose rounds are trained elsewhere.

All else is a run as any other: the same folder, evaluation, checkpoints, and going on after a kill.
The run folder has one file more, clients.jsonl: who was asked in each round, and what came of it.
"""

import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from spear_jax.core.errors import UserError
from spear_jax.core.files import write_whole, writing
from spear_jax.core.mesh import to_host
from spear_jax.core.surroundings import say
from spear_jax.core.types import Mean
from spear_jax.experiment.builder import Experiment
from spear_jax.experiment.run import Run
from spear_jax.federated.federation import Federation
from spear_jax.federated.round import RoundResult
from spear_jax.federated.round_metrics import BudgetUsed
from spear_jax.federated.single_client import join_sum, join_updates
from spear_jax.flower import messages, secure
from spear_jax.flower.masks import KEY
from spear_jax.flower.messages import Request
from spear_jax.flower.noise import with_secret
from spear_jax.flower.records import Refused, check_protocol
from spear_jax.flower.terms import Terms

PAUSE = 0.25  # seconds between two looks for replies
HELLO = 60.0  # seconds that a node has to say which client it is
GOES_ON = "The rounds before it are kept; `flwr run` on the same app goes on from there."

OK, LOST, LATE, REFUSED = "ok", "lost", "late", "refused"


def check_deployable(experiment: Experiment, quorum: float = 1.0) -> None:
    """Raises UserError for settings that hold in simulation alone.

    Args: quorum: of `Terms`.
    """
    federation, settings = experiment.federation, experiment.settings
    aggregation, rule = federation.aggregation, federation.aggregation.rule
    kept = experiment.initial_state().aggregation_state
    provider = federation.worker.feedback
    for wrong, what, remedy in (
        (federation.local_only, "federation.aggregation is local", "take mean"),
        (federation.participation is not None, "a simulated clock loses clients", "leave participation.* at its defaults"),
        (aggregation.drift is not None, "federation.drift corrects clients in simulation", "set it to none"),
        (federation.ditto is not None, "personal.ditto trains a second adapter in simulation", "set it to False"),
        (settings.personal.finetune > 0, "personal.finetune trains clients after the last round in simulation", "set it to 0"),
        (aggregation.attack is not None, "attack.kind makes clients attack", "set it to none"),
        (aggregation.uplink is not None, "updates are compressed in simulation", "set compression.kind=none"),
        (federation.asynchronous is not None, "rounds without a cohort are simulated", "set participation.mode=sync"),
        (aggregation.root is not None, "the reducer needs a client of the server's", "take another"),
        (rule.personal or rule.changes_base or "rank" in kept,
         f"lora_rule {rule.name!r} sends each client more than the adapter", "take mean or ffa"),
        (bool(federation.algorithm.measures_cohort),
         f"method {settings.algorithm.name!r} measures on the texts of all clients together",
         f"set {federation.algorithm.measures_cohort}"),
        (provider.asks_people or provider.asks_by_id,
         f"rollout.feedback {settings.rollout.feedback!r} asks somebody, whom the server cannot see",
         "name it in each node's --node-config, and set rollout.feedback=oracle here"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"{what}, which real clients do not do; {remedy}.")
    _check_hidden(federation, quorum)


def _check_hidden(federation: Federation, quorum: float) -> None:
    """Raises UserError where noise or a secure sum would not hide what it is asked to."""
    aggregation, schedule = federation.aggregation, federation.schedule
    private, sums = aggregation.privacy is not None, aggregation.secure_sum is not None
    for wrong, message in (
        (aggregation.local_privacy is not None,
         "privacy.local_noise covers a client's update, but its counts of wins and its losses would reach "
         "the server beside it, without noise; take privacy.noise_multiplier, or set local_noise=0."),
        (private and quorum < 1,
         f"--quorum is {quorum:g}, with privacy.noise_multiplier: whose update is late would depend on who "
         "else takes part, which doubles what one client changes; set --quorum=1, and let --deadline "
         "end the rounds."),
        (private and bool(schedule.tokens or schedule.seconds),
         "budget.* sets the learning rate by what clients have generated, to which no noise is added on "
         "its way to other clients; with privacy.noise_multiplier take rounds alone."),
        (sums and aggregation.privacy is not None and aggregation.privacy.adaptive is not None,
         "privacy.adaptive counts the clients within the clip norm, which federation.secure_sum hides; set "
         "one of them to False."),
        (sums and not private and federation.sampling == "poisson",
         "federation.sampling is poisson, which may ask one client alone, and no federation.secure_sum "
         "hides that one; set sampling to uniform, or add privacy.noise_multiplier."),
        (sums and federation.clients_per_round < 2,
         "federation.secure_sum hides a client among others, but federation.clients_per_round is 1; set it "
         "to 2 at least, 3 where clients should not know each other's updates."),
    ):  # fmt: skip
        if wrong:
            raise UserError(message)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of asking a client.

    Attributes:
        result: OK, LOST, LATE or REFUSED; why: in words.
        seconds: until the reply, or until nobody waited any more.
        bytes_down, bytes_up: of the messages.
        update: where the result is OK; keys, where the sum is secure.
    """

    client: int
    result: str
    why: str = ""
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    update: Any = None

    def then(self, other: "Outcome") -> "Outcome":
        """Returns what came of the client after one message more."""
        return dataclasses.replace(
            other,
            seconds=self.seconds + other.seconds,
            bytes_down=self.bytes_down + other.bytes_down,
            bytes_up=self.bytes_up + other.bytes_up,
        )


class Nodes:
    """The connected nodes, by client.

    Args: clients: K; patience: seconds to wait for the first nodes.
    """

    def __init__(self, grid: Grid, clients: int, patience: float):
        self.grid, self.clients, self.patience = grid, clients, patience
        self.node: dict[int, int] = {}  # of a client
        self._heard: set[int] = set()

    def find(self, wanted: Iterable[int]) -> None:
        """Asks new nodes who they are; the first time waits until the wanted clients are there."""
        until = time.monotonic() + self.patience
        self.patience = 0.0
        while True:
            here = set(self.grid.get_node_ids())
            self.node = {client: node for client, node in self.node.items() if node in here}
            self._heard &= here
            self._meet(sorted(here - self._heard))
            if set(wanted) <= self.node.keys() or time.monotonic() >= until:
                return
            time.sleep(PAUSE)

    def _meet(self, new: list[int]) -> None:
        asked = [Message(RecordDict(), node, "query", ttl=HELLO) for node in new]
        replies = self.grid.send_and_receive(asked, timeout=HELLO) if asked else ()
        for reply in replies:
            node = reply.metadata.src_node_id
            self._heard.add(node)
            try:
                self._enter(node, reply)
            except Refused as refused:
                say(f"warning: node {node} is refused: {refused}", sys.stderr)

    def _enter(self, node: int, reply: Message) -> None:
        if reply.has_error():
            self._heard.discard(node)  # asked again before the next round
            raise Refused(reply.error.reason)
        check_protocol(reply.content, "hello")
        client = reply.content["hello"].get("client")
        if not isinstance(client, int) or not 0 <= client < self.clients:
            raise Refused(
                f"it says that it is client {client!r}, not one of 0 to {self.clients - 1}"
            )
        if client in self.node:
            self._heard.discard(node)  # the other one may be gone before the next round
            raise Refused(
                f"it says that it is client {client}, and node {self.node[client]} is that"
            )
        self.node[client] = node


class DeployedRun(Run):
    """A run whose clients are Flower's nodes.

    Args:
        secret: what cohorts and noise are drawn from under privacy; None: drawn for this process, and
            kept nowhere. A round that is repeated after a kill has other noise, and was never sent
            before.
        parts: as for `Run`: callbacks, devices, a reducer.
    Raises: UserError as `Run`, and for settings that hold in simulation alone.
    """

    def __init__(self, grid: Grid, terms: Terms, secret: bytes | None = None, **parts: Any):
        super().__init__(terms.config(), terms.workdir, quiet=True, **parts)
        check_deployable(self.experiment, terms.quorum)
        self.private = self.experiment.federation.aggregation.privacy is not None
        if self.private:
            federation = with_secret(self.experiment.federation, secret or secrets.token_bytes(KEY))
            self.experiment = dataclasses.replace(self.experiment, federation=federation)
        self.grid, self.terms = grid, terms
        self.nodes = Nodes(grid, self.settings.federation.num_clients, terms.deadline)
        self.run_id = self._run_id()

    def _run_id(self) -> str:
        """The run's name for its nodes: drawn once, and kept in the run folder."""
        file = self.workdir / "flower.json"
        if not file.exists():
            write_whole(file, json.dumps({"run": secrets.token_hex(8)}) + "\n")
        return json.loads(file.read_text(encoding="utf-8"))["run"]

    def _run_round(self) -> RoundResult:
        """Asks the cohort's nodes, and joins what they send."""
        federation, number = self.experiment.federation, self.finished_rounds + 1
        cohort, began = federation.cohort(number), time.perf_counter()
        if self.private:
            self.save()  # or a round would be sent twice, with other noise, and counted once
        if cohort.clients:
            self.nodes.find(cohort.clients)
        outcomes = self._ask(cohort.clients, number)
        total, outcomes = self._masked(number, outcomes)
        waited = time.perf_counter() - began
        self._tell(number, outcomes)
        there, used = {x.client: x.update for x in outcomes if x.result == OK}, self._used()
        if not there and cohort.clients and not self.private:
            reasons = "; ".join(f"client {one.client}: {one.result}, {one.why}" for one in outcomes)
            raise UserError(
                f"round {number}: no client has sent an update that can be taken ({reasons[:600]}). "
                f"{GOES_ON}"
            )
        if total is None:
            result = join_updates(federation, self.state, used, cohort, there)
        else:
            cohort = federation.cohort_of(sorted(there), number)
            result = join_sum(federation, self.state, used, cohort, *total)
        count = lambda *results: float(sum(one.result in results for one in outcomes))
        told = {
            "participation/lost": count(LOST),
            "participation/late": count(LATE),
            "participation/refused": count(REFUSED),
            "flower/bytes_down": float(sum(one.bytes_down for one in outcomes)),
            "flower/bytes_up": float(sum(one.bytes_up for one in outcomes)),
            "flower/seconds": waited,
        }
        return result._replace(metrics=result.metrics | told)

    def _used(self) -> BudgetUsed:
        return BudgetUsed.read(self.line)

    def _ask(self, clients: list[int], number: int) -> list[Outcome]:
        """Sends a round's requests; returns what came of them, in the cohort's order."""
        state, federation = self.state, self.experiment.federation
        adapter, mine = to_host(state.lora), federation.algorithm.client_state
        shared = {name: x for name, x in state.algorithm_state.items() if name not in mine}
        # of what others have generated nothing leaves a private server but the noisy adapter
        used = BudgetUsed() if self.private else self._used()
        requests, outcomes = {}, {}
        for client in clients:
            if client not in self.nodes.node:
                outcomes[client] = Outcome(client, LOST, "no node is connected")
                continue
            request = Request(self.run_id, client, number, adapter, shared, used)
            requests[client] = messages.write_request(request)
        sends = federation.aggregation.rule.sends(number)
        read = lambda client, records: messages.read_update(records, state.lora, sends)
        if federation.aggregation.secure_sum is not None:
            read = lambda client, records: secure.read_keys(records)
        enough = max(1, round(self.terms.quorum * len(clients)))
        outcomes |= self._exchange("train", requests, number, read, enough)
        return [outcomes[client] for client in clients]

    def _masked(
        self, number: int, outcomes: list[Outcome]
    ) -> tuple[tuple[Any, dict[str, Mean]] | None, list[Outcome]]:
        """Has clients that have trained add up what they keep, where the sum is secure.

        Returns: the sum of updates and the totals, None where there is none; the outcomes.
        """
        federation = self.experiment.federation
        hiding, sends = federation.aggregation.secure_sum, federation.aggregation.rule.sends(number)
        keys = {one.client: one.update for one in outcomes if one.result == OK}
        if hiding is None or not keys:
            return None, outcomes
        known = {one.client: one for one in outcomes}

        def ask(kind: str, requests: dict[int, RecordDict], read: secure.Reader) -> dict[int, Any]:
            answers = self._exchange(kind, requests, number, read, len(requests))
            for client, one in answers.items():
                known[client] = known[client].then(one)
            return {client: one.update for client, one in answers.items() if one.result == OK}

        size, total = messages.as_vector(self.state.lora, sends).size, None
        try:
            got = secure.collect(ask, keys, self.run_id, number, size)
            update = messages.from_vector(hiding.decode(got.update), self.state.lora, sends)
            totals = {name: Mean(*pair) for name, pair in got.totals.items()}
            total, arrived = (update, totals), got.clients
        except secure.NoSum as error:
            if not self.private:
                raise UserError(f"{error} {GOES_ON}") from error
            say(f"warning: {error}", sys.stderr)
            arrived = set()
        left_out = lambda one: dataclasses.replace(one, result=LOST, why="it is not in the sum")
        ended = [
            left_out(one) if one.result == OK and one.client not in arrived else one
            for one in known.values()
        ]
        return total, ended

    def _exchange(
        self,
        kind: str,
        requests: dict[int, RecordDict],
        number: int,
        read: secure.Reader,
        enough: int,
    ) -> dict[int, Outcome]:
        """Sends clients their requests; returns what came of them.

        Args: kind: the message type; read: takes an answer apart; enough: answers that can be taken,
            after which nobody is waited for.
        """
        outcomes, ttl = {}, self.terms.deadline
        sent = {
            client: Message(records, self.nodes.node[client], kind, ttl=ttl, group_id=str(number))
            for client, records in requests.items()
        }
        down = {client: messages.size(message.content) for client, message in sent.items()}
        began = time.monotonic()
        # one by one: a request of many adapters at once could be too large
        waiting = {next(iter(self.grid.push_messages([m]))): c for c, m in sent.items()}
        good = 0
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                client = waiting.pop(reply.metadata.reply_to_message_id)
                seconds = time.monotonic() - began
                outcomes[client] = _outcome(client, reply, read, seconds, down[client])
                good += outcomes[client].result == OK
            if good >= enough or time.monotonic() - began > self.terms.deadline:
                break
            time.sleep(PAUSE)
        for client in waiting.values():
            seconds = time.monotonic() - began
            outcomes[client] = Outcome(client, LATE, "no reply in time", seconds, down[client])
        return outcomes

    def _tell(self, number: int, outcomes: list[Outcome]) -> None:
        """Writes clients.jsonl, and names on stderr whose update is missing."""
        file = self.workdir / "clients.jsonl"
        with writing(file), file.open("a", encoding="utf-8") as out:
            for one in outcomes:
                line = {"round": number} | vars(one)
                del line["update"]
                out.write(json.dumps(line) + "\n")
        for one in outcomes:
            if one.result != OK:
                told = f"warning: round {number}: client {one.client} is {one.result}: {one.why}"
                say(told, sys.stderr)


def _outcome(
    client: int, reply: Message, read: secure.Reader, seconds: float, down: int
) -> Outcome:
    if reply.has_error():
        return Outcome(client, LOST, reply.error.reason[:200], seconds, down)
    up = messages.size(reply.content)
    try:
        update = read(client, reply.content)
    except Refused as refused:
        return Outcome(client, REFUSED, str(refused), seconds, down, up)
    return Outcome(client, OK, "", seconds, down, up, update)
