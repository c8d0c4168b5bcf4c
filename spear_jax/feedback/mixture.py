"""Other providers for other clients."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from spear_jax.core.errors import UserError, shown
from spear_jax.core.types import Example, Trace
from spear_jax.feedback.base import Feedback, Request, RunView, Said
from spear_jax.tasks.base import Task


class Mixture(Feedback):
    """Providers by client, as `feedback.mixture` says: "0-3=service,4=judge,*=oracle".

    Clients that no part names are an error. Where a part judges, the others' answers are graded by
    the task.

    Args: parts: (first client, last client, provider), the first that fits counts (`read_mixture`).
    """

    def __init__(self, task: Task, parts: Sequence[tuple[int, float, Feedback]]):
        super().__init__(task)
        self.parts = list(parts)
        self.asks_people = any(part.asks_people for *_, part in parts)  # type: ignore[misc]
        self.asks_by_id = any(part.asks_by_id for *_, part in parts)  # type: ignore[misc]
        self.judges = any(part.judges for *_, part in parts)

    def longest_texts(self, examples: list[Example]) -> list[str]:
        each = zip(*(part.longest_texts(examples) for part in self._own()), strict=True)
        return [max(texts, key=len) for texts in each]

    def __call__(self, requests: list[Request]) -> list[Said]:
        return self._spread(requests, lambda part, some: part(some))

    def judge(self, requests: list[Request]) -> list[bool | None]:
        def verdicts(part: Feedback, some: list[Request]) -> Sequence[bool | None]:
            if part.judges:
                return part.judge(some)
            return [self.task.grade(request.answer, request.example) for request in some]

        return self._spread(requests, verdicts)

    def converse(
        self, requests: list[Request], take: Callable[[list[Request]], list[Request]]
    ) -> None:
        """People come last: nobody waits for them but their own clients."""
        for part in sorted(self._own(), key=lambda part: part.asks_people):
            some = [request for request in requests if self._part(request.client) is part]
            part.converse(some, take)

    def begin_run(self, run: RunView) -> None:
        for client in range(run.clients):
            self._part(client)
        for part in self._own():
            part.begin_run(run)

    def begin_round(self, number: int) -> None:
        for part in self._own():
            part.begin_round(number)

    def beside(self, clients: Sequence[int]) -> list[Trace]:
        own = [(part, [x for x in clients if self._part(x) is part]) for part in self._own()]
        return [trace for part, some in own if some for trace in part.beside(some)]

    def end_rollouts(self) -> None:
        for part in self._own():
            part.end_rollouts()

    def end_round(self, number: int, metrics: dict[str, float]) -> None:
        for part in self._own():
            part.end_round(number, metrics)

    def end_run(self) -> None:
        for part in self._own():
            part.end_run()

    def take_metrics(self) -> dict[str, float]:
        summed: dict[str, float] = {}
        for part in self._own():
            for name, value in part.take_metrics().items():
                most = name.endswith("_of_most")
                held = summed.get(name, 0.0)
                summed[name] = max(held, value) if most else held + value
        return summed

    def _own(self) -> list[Feedback]:
        return list({id(part): part for *_, part in self.parts}.values())

    def _part(self, client: int) -> Feedback:
        for first, last, part in self.parts:
            if first <= client <= last:
                return part
        raise UserError(
            f"feedback.mixture names no provider for client {client}; add *=PROVIDER at its end."
        )

    def _spread(self, requests: list[Request], call: Any) -> list[Any]:
        """What each client's provider says of its requests, in the order of all."""
        said: list[Any] = [None] * len(requests)
        for part in self._own():
            at = [i for i, request in enumerate(requests) if self._part(request.client) is part]
            for i, found in zip(
                at, call(part, [requests[i] for i in at]) if at else [], strict=True
            ):
                said[i] = found
        return said


def read_mixture(text: str) -> list[tuple[int, float, str]]:
    """Returns the (first client, last client, provider's name) of each part of `feedback.mixture`.

        "0-3=service,*=oracle"  ->  [(0, 3, "service"), (0, inf, "oracle")]

    Raises: UserError for a text of another form.
    """
    parts = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(\*)|(\d+)(?:-(\d+))?)=(\w+)\s*", part)
        if match is None or match[4] == "mixture":
            raise UserError(
                f"feedback.mixture is {shown(text)}, whose part {shown(part)} is none; write "
                "CLIENT=PROVIDER, FIRST-LAST=PROVIDER or *=PROVIDER, parted by commas."
            )
        first = 0 if match[1] else int(match[2])
        last = float("inf") if match[1] else int(match[3] or match[2])
        parts.append((first, last, match[4]))
    return parts
