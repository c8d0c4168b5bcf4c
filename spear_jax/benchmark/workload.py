"""The workload of a benchmark: sizes, prompts and training rows, the same for both sides.

All are drawn from one seed. Nothing here imports JAX: the rival's process reads this module, and
its memory is measured.
"""

import dataclasses
import json
import math
import pathlib
import zlib
from typing import Any

import numpy as np

from spear_jax.core.errors import UserError, unknown

SEED = 0
DRAWN = 1 << 22  # numbers of a tensor; more would take a minute for a billion weights
TINY = pathlib.Path(__file__).parents[1] / "assets" / "tiny"
PHASES = ("rollout", "revision", "evaluation", "local_step", "aggregation", "checkpoint", "round")


@dataclasses.dataclass(frozen=True)
class Preset:
    """The sizes of a benchmark.

    Attributes:
        name: for tables and messages.
        shape: the model's config.json.
        model: a folder with its weights; "" makes random ones.
        dtype: of the base, "float32" or "bfloat16"; adapters are float32.
        clients: of a round.
        prompts: questions that a client asks.
        right, fixed: how many are answered right at once, and after a revision.
        lengths: mean, lowest and highest number of tokens of a question's prompt.
        head: tokens of the prefix that all prompts share, as a chat template makes it.
        new_tokens: of every completion.
        revisions: of a client.
        longer: tokens of a revision prompt beyond its question's.
        questions, options: of the evaluation.
        wins, loses: rows of an optimiser step.
        steps: of a client's round.
        rank: of the adapter, which sits on all seven projections of every layer; alpha is twice the
            rank.
        remat: the part that our backward pass computes again, as `train.remat`.
        rival_remat: whether the rival's does so with layers.
        clients_at_once: clients trained together (ours); 0 means all.
        attention: our kernel, as `attention_kernel`.
        temperature, top_p: of sampling; 0 is greedy.
        margin: of unlikelihood.
        lose_weight: its weight beside likelihood's 1.
        rate: of AdamW.
        settle: seconds for which a side runs a phase before it is timed, and then for as long
            timed.
    """

    name: str
    shape: dict[str, Any]
    model: str
    dtype: str
    clients: int
    prompts: int
    right: int
    fixed: int
    lengths: tuple[int, int, int]
    head: int
    new_tokens: int
    revisions: int
    longer: int
    questions: int
    wins: int
    loses: int
    steps: int
    options: int = 4
    rank: int = 16
    remat: str = "attention"
    rival_remat: bool = False
    clients_at_once: int = 1
    attention: str = "xla"
    temperature: float = 0.8
    top_p: float = 0.95
    margin: float = 0.3
    lose_weight: float = 0.1
    rate: float = 5e-5
    settle: float = 10.0


@dataclasses.dataclass(frozen=True)
class Row:
    """A training row: a win (label +1) or a lose (label -1) with its trace's confidence."""

    prompt: list[int]
    completion: list[int]
    confidence: float
    label: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """Token ids of a benchmark's prompts and rows.

    Attributes:
        prompts, revisions: [clients][...] prompts.
        questions: of the evaluation.
        options: the id of each option's label.
        rows: [clients][steps] lists of rows, wins first.
        platform: where it runs, "cpu" or "gpu".
    """

    preset: Preset
    prompts: list[list[list[int]]]
    revisions: list[list[list[int]]]
    questions: list[list[int]]
    options: list[int]
    rows: list[list[list[Row]]]
    platform: str = "cpu"


def _llama(**changes: Any) -> dict[str, Any]:
    """Returns the config.json of SmolLM2-135M, changed where named."""
    return {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        **changes,
    }


def _tiny() -> Preset:
    return Preset(
        name="tiny", shape=json.loads((TINY / "config.json").read_text(encoding="utf-8")), model=str(TINY), dtype="float32",
        clients=2, prompts=4, right=1, fixed=2, lengths=(24, 16, 40), head=4, new_tokens=4, revisions=2, longer=24,
        questions=4, wins=2, loses=2, steps=2, rank=4, settle=0.0,
    )  # fmt: skip


def _smollm2() -> Preset:
    """Returns the preset of SmolLM2-135M on ARC-Challenge.

    Lengths are those of ARC-Challenge's questions behind SmolLM2's chat template, whose first 24
    tokens never change.
    """
    return Preset(
        name="smollm2-135m", shape=_llama(), model="", dtype="float32",
        clients=3, prompts=16, right=4, fixed=6, lengths=(119, 60, 232), head=24, new_tokens=32, revisions=6, longer=271,
        questions=16, wins=4, loses=4, steps=2,
    )  # fmt: skip


def _qwen() -> Preset:
    """Returns SPEAR's published ARC-Challenge setting.

    The base model has no chat template, so prompts share no head.
    """
    shape = _llama(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, intermediate_size=8960, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=131072,
    )  # fmt: skip
    return Preset(
        name="qwen2.5-1.5b", shape=shape, model="", dtype="bfloat16",
        clients=3, prompts=160, right=40, fixed=60, lengths=(119, 60, 232), head=0, new_tokens=256, revisions=60, longer=271,
        questions=64, wins=16, loses=16, steps=5, rival_remat=True,
    )  # fmt: skip


PRESETS = {"tiny": _tiny, "smollm2-135m": _smollm2, "qwen2.5-1.5b": _qwen}


def read_preset(name: str) -> Preset:
    """Returns the preset of that name; raises UserError where there is none."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]()


def read_phases(text: str | None) -> list[str]:
    """Returns the phases of "rollout,round", in the order in which they run."""
    names = text.split(",") if text else PHASES
    for name in names:
        if name not in PHASES:
            raise unknown("phase", name, PHASES)
    return [name for name in PHASES if name in names]


def read_cohorts(text: str | None) -> list[int]:
    """Returns the cohort sizes of "1,3,10", rising."""
    parts = text.split(",") if text is not None else []
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(
            f"--clients is {text!r}; give whole numbers from 1, for example --clients=1,3,10."
        )
    return sorted({int(part) for part in parts})


def config_preset(config: Any, shape: dict[str, Any], model: str) -> Preset:
    """Returns an experiment's sizes.

    They are its clients, examples, new tokens, sampling, steps and rows of a micro-batch, rank,
    dtype. Prompt lengths and the shares of answers that are right or fixed are smollm2-135m's. A
    remat that a run chooses by its device ("auto") is "layers" here, on both sides.

    Args: shape, model: as in `Preset`, of the config's own model.
    """
    usual, prompts = _smollm2(), config.rollout.examples
    share = lambda count: count * prompts // usual.prompts
    remat = "layers" if config.train.remat == "auto" else config.train.remat
    return dataclasses.replace(
        usual,
        name="config",
        shape=shape,
        model=model,
        dtype=config.dtype,
        clients=config.federation.clients_per_round,
        prompts=prompts,
        right=max(1, share(usual.right)),
        fixed=share(usual.fixed),
        new_tokens=config.rollout.max_new_tokens,
        revisions=max(1, share(usual.revisions)),
        wins=config.train.batch_size,
        loses=config.train.batch_size,
        steps=config.train.steps,
        rank=config.lora.rank,
        remat=remat,
        rival_remat=remat == "layers",
        clients_at_once=config.federation.clients_at_once,
        attention=config.attention_kernel,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
    )


def make_workload(preset: Preset, platform: str) -> Workload:
    """Draws everything from SEED; raises UserError where the model has too few positions."""
    rng = np.random.default_rng(SEED)
    vocab = preset.shape["vocab_size"]
    ids = lambda count: rng.integers(3, vocab, count).tolist()
    heads = ids(preset.head), ids(preset.head)  # of questions and of revisions
    longest = preset.lengths[2] + preset.longer + preset.new_tokens
    if longest > preset.shape.get("max_position_embeddings", longest):
        raise UserError(
            f"prompts and completions of preset {preset.name!r} have up to {longest} tokens, "
            f"more than the "
            f"{preset.shape['max_position_embeddings']} positions of this model; give another "
            f"--model or --preset."
        )

    def question() -> list[int]:
        return heads[0] + ids(question_length(rng, preset.lengths) - preset.head)

    prompts = [[question() for _ in range(preset.prompts)] for _ in range(preset.clients)]
    revisions = [
        [
            heads[1] + prompt[preset.head :] + ids(preset.longer)
            for prompt in client[: preset.revisions]
        ]
        for client in prompts
    ]
    rows = [draw_rows(preset, client, rng) for client in prompts]
    questions = [question() for _ in range(preset.questions)]
    options = rng.choice(np.arange(3, vocab), preset.options, replace=False).tolist()
    return Workload(preset, prompts, revisions, questions, options, rows, platform)


def question_length(rng: np.random.Generator, lengths: tuple[int, int, int]) -> int:
    """Draws the tokens of a question's prompt.

    They are log-normal with a spread of 22 %, as ARC's are, within the bounds.
    """
    mean, low, high = lengths
    spread = 0.22
    return int(np.clip(round(mean * np.exp(rng.normal(-(spread**2) / 2, spread))), low, high))


def draw_rows(
    preset: Preset, prompts: list[list[int]], rng: np.random.Generator
) -> list[list[Row]]:
    """Draws [steps] lists of a client's rows, by the system's own rule.

    The pools are those that its rollouts give. A question answered right at once gives a win, a
    fixed one a win and a lose under the same prompt, each other one a lose. A lose weighs 1 where
    it was fixed and 0.5 elsewhere. With right = 1 and fixed = 1, of 3 prompts:

        wins    (prompt 0, 1.0)  (prompt 1, 1.0)
        loses   (prompt 1, 1.0)  (prompt 2, 0.5)
    """
    from spear_jax.packing.rows import draw  # here, because it imports JAX

    answer = lambda: rng.integers(3, preset.shape["vocab_size"], preset.new_tokens).tolist()
    wins, loses = [], []
    for index, prompt in enumerate(prompts):
        fixed = preset.right <= index < preset.right + preset.fixed
        if index < preset.right or fixed:
            wins.append(Row(prompt, answer(), 1.0, 1))
        if index >= preset.right:
            loses.append(Row(prompt, answer(), 1.0 if fixed else 0.5, -1))
    return [
        draw(wins, preset.wins, rng) + draw(loses, preset.loses, rng) for _ in range(preset.steps)
    ]


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the random weight of a Hugging Face or PEFT name, float32, the same in every process.

    Norms are 1; matrices [out, in] are uniform with variance 1 / in; embeddings and the rest are
    small. An adapter's B is not zero, as after some rounds. A large tensor repeats its first DRAWN
    numbers.
    """
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    plain = len(shape) == 1 or "embed" in name or "lora_B" in name
    bound = np.float32(0.03 if plain else (3.0 / shape[1]) ** 0.5)
    rng, count = np.random.default_rng([SEED, zlib.crc32(name.encode())]), math.prod(shape)
    drawn = rng.uniform(-bound, bound, min(count, DRAWN)).astype(np.float32)
    return np.resize(drawn, shape)
