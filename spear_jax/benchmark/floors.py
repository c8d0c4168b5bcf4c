"""Floors of the phases: the operations and bytes that a phase needs, whoever runs it.

Counted are real tokens, never padding. A distinct (prompt, completion) counts once. A prompt that
several completions share counts once. The prefix that all prompts of a phase share counts once; in
training, where it has a gradient, for each of them. With W the weights of all projections, V D
those of the LM head, L layers, H heads and U key/value heads of width E, and R the rank:

    forward     2 W a token; attention 4 H E a token, layer and visible position (causal: the n-th token sees n);
                head 2 V D for each position whose distribution is needed
    training    twice the forward's products with frozen weights (forward and input gradient), three times its attention
                (whose both sides have gradients), and 6 R (in + out) a token and adapted projection

    prefill     bytes: weights once, the cache written once
    decode      bytes: weights once a step for the whole batch, and every row's cache up to its position
    training    bytes: weights twice

The floor in seconds is the sum over a phase's parts of max(FLOPs / the fastest product, bytes / the
copy rate). Activations, norms, softmax, sampling, the optimiser, and adapters where nothing trains
are left out, so nothing reaches it.
"""

import collections
import dataclasses
import os.path

import numpy as np

from spear_jax.benchmark.workload import Row, Workload
from spear_jax.models import cost_model
from spear_jax.models.config import ModelConfig, parse_config
from spear_jax.models.io.tensor_map import DTYPES, places
from spear_jax.models.lora import projection_shapes


@dataclasses.dataclass(frozen=True)
class Part:
    """Floating-point operations, and bytes that have to move."""

    flops: float
    bytes: float

    def __add__(self, other: "Part") -> "Part":
        return Part(self.flops + other.flops, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Counts:
    """A model's constants.

    Attributes:
        layers: W, weights of all projections.
        head: V D.
        attention: FLOPs of one token for each position it sees, all layers.
        adapter: R (in + out) over all adapted projections: the adapter's own numbers.
        cache: bytes of one token's keys and values.
        size: bytes of a weight.
    """

    layers: int
    head: int
    attention: int
    adapter: int
    cache: int
    size: int

    @property
    def weights(self) -> int:
        """Returns the bytes of projections and head."""
        return (self.layers + self.head) * self.size


def count(model: ModelConfig, rank: int, dtype: str) -> Counts:
    """Returns the constants of a model with adapters of that rank on all projections."""
    shapes, size = projection_shapes(model).values(), DTYPES[dtype].itemsize
    return Counts(
        layers=model.layers * sum(i * o for i, o in shapes),
        head=model.width * model.vocab_size,
        attention=4 * model.layers * model.heads * model.head_width,
        adapter=rank * model.layers * sum(i + o for i, o in shapes),
        cache=2 * model.layers * model.kv_heads * model.head_width * size,
        size=size,
    )


def prefill(c: Counts, lengths: np.ndarray, shared_prefix: int) -> Part:
    """Returns the part of prefilling prompts, with the distribution after each.

    Three prompts of 5 tokens that share their first 3 read 9 tokens: 3 + 3 x 2.

    Args:
        lengths: int[B], tokens of each prompt.
        shared_prefix: tokens that all of them begin with.
    """
    again = shared_prefix * (len(lengths) - 1)
    seen = (lengths * (lengths + 1) / 2).sum() - again * (shared_prefix + 1) / 2
    flops = 2 * c.layers * (lengths.sum() - again) + c.attention * seen + 2 * c.head * len(lengths)
    return Part(float(flops), float(c.weights + c.cache * lengths.sum()))


def decode(c: Counts, lengths: np.ndarray, new: int) -> Part:
    """Returns the part of decoding all of a completion's tokens but the first.

    The prefill gives the first. So it is `new` - 1 steps of the whole batch.

    Args: lengths: int[B], tokens of each prompt.
    """
    steps = new - 1
    seen = (steps * lengths + steps * (steps + 1) / 2).sum()  # the s-th step sees p + s positions
    flops = 2 * (c.layers + c.head) * steps * len(lengths) + c.attention * seen
    return Part(float(flops), float(steps * c.weights + c.cache * seen))


def train(c: Counts, rows: list[Row], shared_prefix: int) -> Part:
    """Returns the part of one forward and backward of a client's rows.

    Args: shared_prefix: tokens that all prompts begin with.
    """
    answers = collections.defaultdict(set)
    for row in rows:
        answers[tuple(row.prompt)].add(tuple(row.completion))
    again = shared_prefix * (len(answers) - 1)
    tokens, scored, seen = -again, 0, -again * (shared_prefix + 1) / 2
    for prompt, completions in answers.items():
        p = len(prompt)
        tokens += p
        seen += p * (p + 1) / 2
        for n in map(len, completions):
            tokens, scored = tokens + n, scored + n
            seen += n * p + n * (n + 1) / 2
    flops = (
        4 * c.layers * tokens
        + 3 * c.attention * seen
        + 4 * c.head * scored
        + 6 * c.adapter * tokens
    )
    return Part(float(flops), 2.0 * c.weights)


def aggregate(c: Counts, clients: int) -> Part:
    """Returns the part of the weighted mean of float32 adapters: all read, one written."""
    return Part(2.0 * clients * c.adapter, 4.0 * (clients + 1) * c.adapter)


def needs(work: Workload) -> dict[str, list[Part]]:
    """Returns the parts of every phase.

    A checkpoint's bytes are the adapter's, as if the disk were memory.
    """
    preset = work.preset
    c = count(parse_config(preset.shape), preset.rank, preset.dtype)
    lengths = lambda prompts: np.array([len(prompt) for client in prompts for prompt in client])
    shared = lambda prompts: len(os.path.commonprefix(sum(prompts, [])))

    def reading(prompts: list[list[list[int]]]) -> Part:
        return prefill(c, lengths(prompts), shared(prompts))

    def generation(prompts: list[list[list[int]]]) -> list[Part]:
        return [reading(prompts), decode(c, lengths(prompts), preset.new_tokens)]

    mean = aggregate(c, preset.clients)
    steps = [train(c, rows, shared(work.prompts)) for client in work.rows for rows in client]
    first, revised = generation(work.prompts), generation(work.revisions)
    return {
        "rollout": first,
        "revision": revised,
        "evaluation": [reading([work.questions])],
        "local_step": [steps[0]],
        "aggregation": [mean],
        "checkpoint": [Part(0.0, 4.0 * c.adapter)],
        "round": [*first, *revised, *steps, mean],
    }


def tokens(work: Workload) -> dict[str, int]:
    """Returns the tokens that `tokens per second` counts.

    They are the generated tokens; of questions and training rows all tokens as they are given.
    """
    preset = work.preset
    trained = [
        [sum(len(r.prompt) + len(r.completion) for r in rows) for rows in client]
        for client in work.rows
    ]
    generated = {
        "rollout": preset.new_tokens * sum(map(len, work.prompts)),
        "revision": preset.new_tokens * sum(map(len, work.revisions)),
    }
    return generated | {
        "evaluation": sum(map(len, work.questions)),
        "local_step": trained[0][0],
        "round": sum(generated.values()) + sum(map(sum, trained)),
    }


def seconds(parts: list[Part], gemm: float, copy: float) -> float:
    """Returns the floor of a phase on a machine of `gemm` FLOP/s and `copy` bytes/s."""
    return sum(max(part.flops / gemm, part.bytes / copy) for part in parts)


def memory_needed(work: Workload, rival: bool) -> int:
    """Estimates the bytes that a benchmark holds at once.

    They are the weights, and the larger of generation and local training.

    Args: rival: whether the rival's process is there too; it holds full-vocabulary logits, once in
        its dtype and three times in float32 (upcast, log-probabilities, gradient), for half of a
        step's rows.
    """
    preset = work.preset
    model = parse_config(preset.shape)
    c = count(model, preset.rank, preset.dtype)
    weights = c.size * sum(int(np.prod(place.leaf_shape)) for place in places(model))
    longest = (
        max(len(prompt) for client in work.revisions + work.prompts for prompt in client)
        + preset.new_tokens
    )
    rows, length = preset.wins + preset.loses, preset.lengths[2] + preset.new_tokens

    def held(rows_at_once: int, trained: int, logits: float) -> float:
        cache = c.cache * longest * rows_at_once
        tokens = trained * length
        block = cost_model.BlockSizes(tokens, tokens, tokens * length, tokens)
        step = cost_model.bytes_per_client(model, block, 0, 4 * c.adapter, preset.remat, c.size)
        return weights + max(cache, step + logits)

    at_once = preset.clients_at_once or preset.clients
    merged = 2 * c.layers * c.size  # copies of the weights, where generation takes them
    ours = held(preset.clients * preset.prompts, rows * at_once, 0.0) + merged
    full = (c.size + 12) * (rows // 2) * length * model.vocab_size
    return int(ours + (held(preset.prompts, rows // 2, full) if rival else 0.0))
