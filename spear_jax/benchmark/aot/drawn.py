"""What is drawn of a round that nobody runs: answers, grades and comments.

Prompts are the benchmark's. An answer has its full length, and no text. Which first answers are
right is fixed; no revision is.
"""

import contextlib
from typing import Any, NamedTuple

import numpy as np

from spear_jax.algorithms.base import Algorithm
from spear_jax.benchmark import workload
from spear_jax.benchmark.aot import ghosts
from spear_jax.benchmark.aot.ghosts import Decoding, Program, Recorder
from spear_jax.benchmark.ours import Labels
from spear_jax.benchmark.workload import Workload
from spear_jax.core.types import Example
from spear_jax.experiment.config import Settings
from spear_jax.feedback.base import Feedback, Request
from spear_jax.rollout import prefill
from spear_jax.rollout import sampler as sampler_module
from spear_jax.rollout.sampler import Completion, Sampler
from spear_jax.rollout.tokenized_data import TokenizedData


class Generation(NamedTuple):
    """Answers that are generated together.

    Attributes:
        stage: "rollout", "revision" or "evaluation".
        prompts: their number; new_tokens: of each answer.
        slots: in which answers grow at one time, of all devices.
        prefills: until all prompts are read.
        programs: started for it, each once.
    """

    stage: str
    prompts: int
    new_tokens: int
    slots: int
    prefills: int
    programs: list[Program]

    @property
    def steps(self) -> int:
        """Returns the decode steps: slots are filled anew when all answers in them have ended."""
        return -(-self.prompts // self.slots) * (self.new_tokens - 1)


class DrawnSampler(Sampler):
    """A sampler whose prefill and decode are recorded; its completions are drawn, of full length.

    Attributes:
        generations: what has been generated, in its order.

    Args:
        recorder: told which stage of the round generates.
        work: whose revisions are known by their prompts.
        generates: whether prefill and decode are recorded.
        parts: as `Sampler` takes them.
    """

    def __init__(self, recorder: Recorder, work: Workload, generates: bool, *parts: Any):
        super().__init__(*parts)
        self.recorder, self.generates = recorder, generates
        self.revisions = set(map(tuple, sum(work.revisions, [])))
        self.generations: list[Generation] = []

    def generate(self, lora, base, prompts, keys, config, finished=lambda *_: None, owners=None):
        new = config.max_new_tokens
        if self.generates:
            self._record(lora, base, prompts, keys, config, finished, owners)
        rng, most = np.random.default_rng(workload.SEED), self.decoder.config.vocab_size - 1
        answers = rng.integers(3, most, (len(prompts), new)).tolist()
        completions = [Completion(answer, [-1.0] * new) for answer in answers]
        for number, completion in enumerate(completions):
            finished(number, completion)
        return completions

    def _record(self, lora, base, prompts, keys, config, finished, owners) -> None:
        """Records the programs of a generation up to its first decode."""
        revised = tuple(prompts[0]) in self.revisions
        greedy = config.temperature == 0.0
        stage = "evaluation" if greedy else "revision" if revised else "rollout"
        self.recorder.stage, before = stage, len(self.recorder.starts)
        plans: list[tuple[int, int, int]] = []

        def plan_prefill(config, groups, *rest):
            plan, batches = prefill.plan_prefill(config, groups, *rest)
            plans.append((sum(map(len, groups)), plan.rows * len(groups), len(batches)))
            return plan, batches

        with (
            contextlib.suppress(Decoding),
            ghosts.replaced(sampler_module, "plan_prefill", plan_prefill),
        ):
            super().generate(lora, base, prompts, keys, config, finished, owners)
        self.recorder.stage = ""
        # where adapters take turns, the first ones were played
        ((played, slots, prefills), *_), new = plans, config.max_new_tokens
        prefills = -(-len(prompts) * prefills // played)
        programs = list(dict.fromkeys(self.recorder.starts[before:]))
        self.generations.append(Generation(stage, len(prompts), new, slots, prefills, programs))


class Texts(Labels):
    """A renderer's stand-in, whose texts are the workload's token ids.

    Attributes:
        examples: one a prompt, client after client.
        right: ids of the examples that are answered right at once; the others are revised.
    """

    def __init__(self, work: Workload, tokenizer: Any):
        super().__init__(work.options)
        self.tokenizer = tokenizer
        names = tuple(map(str, range(len(work.options))))
        self.examples: list[Example] = []
        self.prompts, self.revisions = {}, {}
        for client, (prompts, revisions) in enumerate(
            zip(work.prompts, work.revisions, strict=True)
        ):
            for number, prompt in enumerate(prompts):
                example = Example(f"{client} {number}", "", names, names, 0)
                self.examples.append(example)
                self.prompts[example.id] = prompt
                if number < len(revisions):
                    self.revisions[example.id] = revisions[number]
        self.right = self.prompts.keys() - self.revisions.keys()

    def prompt(self, task: Any, example: Example) -> list[int]:
        return self.prompts[example.id]

    privileged = prompt

    def revision(self, task: Any, example: Example, *_: Any) -> list[int]:
        return self.revisions[example.id]

    def decode(self, tokens: list[int]) -> str:
        return ""


class Graded:
    """A task whose grades are drawn beforehand; the rest is the task's own."""

    def __init__(self, task: Any, right: Any):
        self._task, self._right = task, right

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def grade(self, text: str, example: Example) -> bool:
        return example.id in self._right


class Comments(Feedback):
    """Feedback that says something of every answer."""

    def __call__(self, requests: list[Request]) -> list[str]:
        return [""] * len(requests)


def tokens(settings: Settings, work: Workload, algorithm: Algorithm, sampled: int) -> TokenizedData:
    """Returns the training set as `tokenize` does: prompts, and gold responses of full length."""
    prompts, longest = sum(work.prompts, []), settings.data.max_response_tokens
    gold = [list(range(longest)) for _ in prompts] if algorithm.gold else [[] for _ in prompts]
    under = prompts + (sum(work.revisions, []) if "revision" in algorithm.layout.prompts else [])
    most = max(map(len, under))
    completion = max(sampled, longest if algorithm.gold else 0)
    return TokenizedData(
        prompts, gold, gold, -(-most // 8) * 8, completion, most if under != prompts else None
    )
