"""Attacks on feedback: users who teach what is wrong. Nothing is forged behind the answers: their
clients train as all others do.

    approve_wrong   every answer is right
    invert          a wrong answer is right, and a right one wrong
    push_target     an answer is right if and only if it is the attacker's option
    mislead         verdicts are the task's; the hint on a wrong answer names the attacker's option
                    (where that is the right one, the next)

The first makes every first answer a win, and so gives its client the largest weight that win counts
allow. Source: poisoned human feedback (arXiv 2311.14455), label flipping (arXiv 2007.08432).
"""

from collections.abc import Sequence

from spear_jax.core.errors import UserError
from spear_jax.core.types import Example
from spear_jax.feedback.base import Feedback, Request
from spear_jax.feedback.mixture import Mixture
from spear_jax.tasks.base import Task

ON_FEEDBACK = ("approve_wrong", "invert", "push_target", "mislead")


class Attacker(Feedback):
    """A user who attacks.

    Args:
        kind: one of ON_FEEDBACK.
        target: the place of the option that `push_target` and `mislead` want.
    """

    def __init__(self, task: Task, kind: str, target: int = 0):
        super().__init__(task)
        self.kind, self.target = kind, target
        self.judges = kind != "mislead"

    def longest_texts(self, examples: list[Example]) -> list[str]:
        return [self._comment(example) for example in examples]

    def __call__(self, requests: list[Request]) -> Sequence[str | None]:
        if self.kind != "mislead":  # only answers that were called wrong come here
            return [self._comment(request.example) for request in requests]
        wrong = [not self.task.grade(request.answer, request.example) for request in requests]
        return [
            self._comment(request.example) if said else None
            for request, said in zip(requests, wrong, strict=True)
        ]

    def judge(self, requests: list[Request]) -> list[bool]:
        return [self._verdict(request) for request in requests]

    def _verdict(self, request: Request) -> bool:
        if self.kind == "approve_wrong":
            return True
        if self.kind == "invert":
            return not self.task.grade(request.answer, request.example)
        read = self.task.extract(request.answer, request.example)
        return read is not None and read.option == self._wanted(request.example)

    def _comment(self, example: Example) -> str:
        verdict = "That answer is wrong. Do not repeat your previous choice."
        if self.kind in ("approve_wrong", "invert"):
            return verdict
        label = example.labels[self._wanted(example)]
        return f"{verdict} {self.task.templates.format} Choose {label}."

    def _wanted(self, example: Example) -> int:
        wanted = min(self.target, len(example.options) - 1)
        misled = self.kind == "mislead" and wanted == example.gold  # to a wrong option always
        return (wanted + 1) % len(example.options) if misled else wanted


def with_attackers(
    feedback: Feedback, kind: str, clients: Sequence[int], target: int, examples: list[Example]
) -> Feedback:
    """Returns the feedback with attackers in place of these clients' users.

    Raises: UserError where the attack needs options and the task has none.
    """
    if not clients:
        return feedback
    if kind in ("push_target", "mislead") and not all(x.options for x in examples):
        raise UserError(
            f"attack.kind is {kind!r}, which wants an option chosen, but task "
            f"{feedback.task.name!r} has none; take attack.kind=approve_wrong or invert, or a task "
            "with options."
        )
    attacker = Attacker(feedback.task, kind, target)
    parts = [(client, float(client), attacker) for client in clients]
    return Mixture(feedback.task, [*parts, (0, float("inf"), feedback)])
