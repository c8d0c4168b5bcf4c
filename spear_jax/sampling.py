"""Generation with a KV cache: prompts of all clients in one batch, each row with its own key, finished rows leaving early.

Prompts are sorted by length and left-padded into a few length buckets. Decoding runs in segments; after each one the rows
that still generate are compacted into the smallest row bucket that holds them. A row's tokens depend on its prompt and its
key, never on its neighbours.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spear_jax.models.decoder import Decoder, decode_step, head_weight, prefill


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to draw tokens; static.

    Attributes:
        max_new_tokens: completions are cut there.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens (0: all), applied after temperature.
        top_p: then keep the smallest set of most likely tokens with at least this mass.
        eos_ids: generation of a row stops at any of them; the EOS is part of the completion.
        pad_id: fills unused positions.
        segment: decoding steps between two compactions.
        max_rows: rows of one device batch.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    eos_ids: tuple[int, ...]
    pad_id: int
    segment: int = 32
    max_rows: int = 64


@dataclasses.dataclass
class Completion:
    """Sampled ids (EOS included when generated) and their untempered log-probabilities in nats."""

    tokens: list[int]
    logprobs: list[float]


def length_bucket(length: int, step: int = 16) -> int:
    """The padded length for `length` tokens: multiples of `step`, coarser as they grow, at most a third of it padding."""
    size = step
    while size < length:
        size += max(step, step * (size // (4 * step)))
    return size


def row_bucket(rows: int, max_rows: int, multiple: int = 1) -> int:
    """The padded row count for `rows`: max_rows divided by 1, 4, 16, ..., rounded up to the device count."""
    size = max_rows
    while size // 4 >= max(rows, 4):
        size //= 4
    return -(-size // multiple) * multiple


def keep_mask(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Which tokens survive top-k and then top-p, without sorting.

    The k-th largest value, and the smallest value inside the nucleus, are found by bisection over the bit patterns of
    positive floats, which are ordered as the floats are: exact after 31 halvings.

    Args: logits float32[B, V], already divided by the temperature.
    Returns: bool[B, V]; at least the most likely token of a row. Tokens that tie with the last one kept are kept.
    Source: nucleus sampling (arXiv 1904.09751).
    """
    probs = jax.nn.softmax(logits, axis=-1)
    keep = jnp.ones(logits.shape, bool)
    if top_k > 0 and top_k < logits.shape[-1]:
        keep = probs >= _largest_threshold(probs, lambda at_least: at_least.sum(-1) >= top_k)
    if top_p < 1.0:
        probs = jnp.where(keep, probs, 0.0)
        probs = probs / probs.sum(-1, keepdims=True)
        mass = lambda at_least: jnp.where(at_least, probs, 0.0).sum(-1) >= top_p
        keep &= probs >= _largest_threshold(probs, mass)
    return keep


def _largest_threshold(probs: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """float32[B, 1]: the largest τ for which the set {p >= τ} is enough (the set of τ = 0 always counts as enough)."""
    low = jnp.zeros(probs.shape[0], jnp.int32)
    high = jax.lax.bitcast_convert_type(jnp.full(probs.shape[0], 2.0, jnp.float32), jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        fits = enough(probs >= jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None])
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]


def draw(logits: jax.Array, keys: jax.Array, step: jax.Array, config: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """One token a row.

    Args: logits float32[B, V]; keys [B]; step int32[], folded into each row's key.
    Returns: token int32[B]; its untempered log-probability float32[B].
    """
    if config.temperature == 0.0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        tempered = logits / config.temperature
        kept = jnp.where(keep_mask(tempered, config.top_k, config.top_p), tempered, -jnp.inf)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = jax.vmap(jax.random.categorical)(step_keys, kept).astype(jnp.int32)
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, picked - jax.nn.logsumexp(logits, axis=-1)


def start(decoder: Decoder, config: SamplingConfig, capacity: int, lora, base, prompt, mask, keys, live, owner=None):
    """Prefills a batch and draws its first tokens.

    Args: prompt int32[B, P], mask bool[B, P]; keys [B]; live bool[B], false for padding rows; owner None, or int32[B],
        each row's adapter where `lora` stacks several.
    Returns: the decoding state, a dict of arrays with leading axis B (caches: [L, B, P + capacity, N, K]).
    """
    hidden, (keys_cache, values_cache) = prefill(decoder, lora, base, prompt, mask, owner)
    rows = prompt.shape[0]
    room = ((0, 0), (0, 0), (0, capacity), (0, 0), (0, 0))
    state = {
        "cache": (jnp.pad(keys_cache, room), jnp.pad(values_cache, room)),
        "cache_mask": jnp.pad(mask, ((0, 0), (0, capacity))),
        "tokens": jnp.full((rows, capacity), config.pad_id, jnp.int32),
        "logprobs": jnp.zeros((rows, capacity), jnp.float32),
        "live": live,
        "keys": keys,
    }
    if owner is not None:
        state["owner"] = owner
    return _emit(config, state, _head(base, hidden), jnp.int32(0))


def advance(decoder: Decoder, config: SamplingConfig, lora, base, state, step, until):
    """Decodes from `step` up to `until` tokens a row, or until no row is live. Returns (state, step reached)."""
    width = state["cache_mask"].shape[1] - state["tokens"].shape[1]

    def going(carry):
        state, step = carry
        return (step < until) & state["live"].any()

    def body(carry):
        state, step = carry
        token = jax.lax.dynamic_index_in_dim(state["tokens"], step - 1, axis=1, keepdims=False)
        hidden, new = decode_step(decoder, lora, base, token, state["cache"], state["cache_mask"], state.get("owner"))
        at = width + step - 1
        cache = jax.tree.map(
            lambda old, fresh: jax.lax.dynamic_update_slice_in_dim(old, fresh, at, axis=2), state["cache"], new
        )
        seen = jax.lax.dynamic_update_slice_in_dim(state["cache_mask"], jnp.ones((token.shape[0], 1), bool), at, axis=1)
        state = {**state, "cache": cache, "cache_mask": seen}
        return _emit(config, state, _head(base, hidden), step), step + 1

    return jax.lax.while_loop(going, body, (state, step))


def _head(base, hidden):
    return jnp.einsum("bd,vd->bv", hidden, head_weight(base), preferred_element_type=jnp.float32)


def _emit(config, state, logits, step):
    """Draws a token for each row, writes it where the row is live, and ends the rows that drew an EOS."""
    token, logprob = draw(logits, state["keys"], step, config)
    token = jnp.where(state["live"], token, config.pad_id)
    logprob = jnp.where(state["live"], logprob, 0.0)
    ended = jnp.isin(token, jnp.asarray(config.eos_ids, jnp.int32))
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
    return {
        **state,
        "tokens": write(state["tokens"], token[:, None]),
        "logprobs": write(state["logprobs"], logprob[:, None]),
        "live": state["live"] & ~ended,
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(decoder, config, capacity, lora, base, prompt, mask, keys, live, owner):
    keys = jax.random.wrap_key_data(keys)
    state = start(decoder, config, capacity, lora, base, prompt, mask, keys, live, owner)
    return {**state, "keys": jax.random.key_data(state["keys"])}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _advance(decoder, config, lora, base, state, step, until):
    state = {**state, "keys": jax.random.wrap_key_data(state["keys"])}
    state, step = advance(decoder, config, lora, base, state, step, until)
    return {**state, "keys": jax.random.key_data(state["keys"])}, step


@jax.jit
def _take(state, rows):
    """The given rows of a decoding state (caches have their rows on axis 1)."""
    cache = jax.tree.map(lambda c: c[:, rows], state["cache"])
    rest = {name: value[rows] for name, value in state.items() if name != "cache"}
    return {**rest, "cache": cache}


class Sampler:
    """Runs generation on the host's side: buckets, segments, compaction.

    Args:
        decoder: the model's static settings.
        place: puts an array with a leading row axis on the devices (identity on one device).
        devices: row counts are multiples of it.

    Shapes are opened as batches need them; after `freeze`, batches are padded into open shapes wherever one holds them, so
    that nothing compiles any more. The open shapes are part of what a run must remember (`shapes`, `reopen`): padding decides
    the last bits of a logit, so a resumed run must pad as the run that it continues would have.
    """

    def __init__(self, decoder: Decoder, place: Callable = jnp.asarray, devices: int = 1):
        self.decoder, self.place, self.devices = decoder, place, devices
        self.frozen = False
        # (rows, prompt width) of batches, and (rows before, rows after, prompt width) of compactions
        self._shapes: dict[str, set[tuple[int, ...]]] = {}

    def freeze(self) -> None:
        """Prefers open shapes from now on."""
        self.frozen = True

    def shapes(self) -> dict[str, Any]:
        """What `reopen` needs, as JSON: the open shapes of each way of sampling, and whether frozen."""
        return {"frozen": self.frozen, "open": {name: sorted(map(list, found)) for name, found in self._shapes.items()}}

    def reopen(self, shapes: dict[str, Any]) -> None:
        """Restores what `shapes` gave."""
        self.frozen = shapes["frozen"]
        self._shapes = {name: {tuple(shape) for shape in found} for name, found in shapes["open"].items()}

    def generate(
        self,
        lora: dict | None,
        base: dict,
        prompts: list[list[int]],
        keys: np.ndarray,
        config: SamplingConfig,
        report: Callable[[int], None] = lambda rows: None,
        owners: np.ndarray | None = None,
    ) -> list[Completion]:
        """Completes every prompt.

        Args:
            lora: adapter tree, or None when it is merged into `base`.
            prompts: token ids, each non-empty.
            keys: uint32[N, 2] key data, one key a prompt.
            report: called with the number of rows that have finished since the last call.
            owners: int32[N], each prompt's adapter where `lora` stacks several behind the layer axis ([L, C, ...]).
        Returns: one Completion a prompt, in their order.
        """
        done: list[Completion | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for begin in range(0, len(order), config.max_rows):
            chosen = order[begin : begin + config.max_rows]
            self._batch(lora, base, prompts, keys, chosen, config, done, report, owners)
        return done

    def _batch(self, lora, base, prompts, keys, chosen, config, done, report, owners) -> None:
        rows, width = self._fit(config, len(chosen), max(len(prompts[i]) for i in chosen))
        tokens = np.full((rows, width), config.pad_id, np.int32)
        mask = np.zeros((rows, width), bool)
        row_keys = np.zeros((rows, keys.shape[1]), np.uint32)
        for row, index in enumerate(chosen):
            tokens[row, width - len(prompts[index]) :] = prompts[index]
            mask[row, width - len(prompts[index]) :] = True
            row_keys[row] = keys[index]
        live = np.arange(rows) < len(chosen)
        owner = np.array([*chosen, *[-1] * (rows - len(chosen))])
        adapters = None
        if owners is not None:
            adapters = np.zeros(rows, np.int32)
            adapters[: len(chosen)] = owners[chosen]
        inputs = jax.tree.map(self.place, (tokens, mask, row_keys, live, adapters))
        state = _start(self.decoder, config, config.max_new_tokens, lora, base, *inputs)
        step = 1
        while True:
            until = min(step + config.segment, config.max_new_tokens)
            if step < until:
                state, reached = _advance(self.decoder, config, lora, base, state, jnp.int32(step), jnp.int32(until))
                step = int(reached)
            live = np.asarray(state["live"])
            over = step >= config.max_new_tokens or not live.any()
            report(self._harvest(state, owner, np.ones_like(live) if over else ~live, config, done))
            if over:
                return
            state, owner = self._compact(state, owner, live, config, width)

    def _harvest(self, state, owner, ended, config, done) -> int:
        """Copies finished rows to the host, once; returns how many there were."""
        rows = [row for row in np.flatnonzero(ended) if owner[row] >= 0 and done[owner[row]] is None]
        if not rows:
            return 0
        tokens, logprobs = np.asarray(state["tokens"]), np.asarray(state["logprobs"])
        for row in rows:
            ids = tokens[row].tolist()
            length = next((i + 1 for i, t in enumerate(ids) if t in config.eos_ids), len(ids))
            done[owner[row]] = Completion(ids[:length], logprobs[row, :length].tolist())
        return len(rows)

    def _compact(self, state, owner, live, config, width):
        """Drops finished rows when a smaller row bucket holds the rest."""
        rows = row_bucket(int(live.sum()), config.max_rows, self.devices)
        change, shapes = (len(owner), rows, width), self._shapes[repr(config)]
        if rows >= len(owner) or (self.frozen and change not in shapes):
            return state, owner
        shapes.add(change)
        order = np.argsort(~live, kind="stable")[:rows]
        return _take(state, self.place(order)), np.where(live, owner, -1)[order]

    def _fit(self, config: SamplingConfig, count: int, longest: int) -> tuple[int, int]:
        """The (rows, prompt width) to pad a batch to."""
        shapes = self._shapes.setdefault(repr(config), set())
        wanted = (row_bucket(count, config.max_rows, self.devices), length_bucket(longest))
        if self.frozen:
            fitting = [s for s in shapes if len(s) == 2 and s[0] >= count and s[1] >= longest]
            wanted = min(fitting, key=lambda s: (s[0] * s[1], s), default=wanted)
        shapes.add(wanted)
        return wanted
