"""How much memory a round needs, estimated before anything compiles."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from spear_jax.core.errors import UserError
from spear_jax.core.types import Tally
from spear_jax.models.config import ModelConfig
from spear_jax.models.decoder import REMAT
from spear_jax.models.lora import projection_shapes
from spear_jax.models.token_logprobs import block_positions
from spear_jax.packing.arrays import spans
from spear_jax.packing.shape_buckets import BlockShape

MEMINFO = pathlib.Path("/proc/meminfo")


class Values(NamedTuple):
    """How many numbers a layer holds: a token, as multiples of the width and of the MLP's width; an
    entry of attention's grid, as multiples of the width of all heads and of all key/value heads; a
    pair of query and key, as multiples of the heads.
    """

    width: int
    mlp: int
    heads: int
    kv_heads: int = 0
    scores: int = 0


class BlockSizes(NamedTuple):
    """The sizes of a block that decide its memory.

    Attributes:
        tokens: N.
        entries: of attention's grid, padding included.
        pairs: of a query and a key that attention computes.
        scored: M.
    """

    tokens: int
    entries: int
    pairs: int
    scored: int


# For each kind of remat what a layer keeps for its backward pass, and what that pass holds while it
# runs. Fitted to what XLA's CPU compiler reports for layers of several widths; tests compare both
# with other models. Dropout adds its masks and what they let through.
KEPT = {
    "layers": Values(1, 0, 0),
    "attention": Values(2, 2, 2, 2),
    "nothing": Values(8, 7, 4),
}
HELD = {
    "layers": Values(10, 9, 2, 0, 2),
    "attention": Values(8, 5, 2, 0, 2),
    "nothing": Values(8, 5, 2, 0, 2),
}
KEPT_DROPOUT = {"layers": Values(0, 0, 0), "attention": Values(0, 0, 0), "nothing": Values(3, 1, 0)}
HELD_DROPOUT = Values(4, 5, 0)


def block_sizes(shape: BlockShape) -> BlockSizes:
    """Returns the sizes of a block of this shape."""
    shared = len(shape.shared_prefix)
    tiles = [(1, 0, shared)] * bool(shared) + spans(shape.tiles, shared)
    return BlockSizes(
        tokens=shape.tokens,
        entries=sum(rows * (end - begin) for rows, begin, end in tiles),
        pairs=sum(rows * (end - begin) * end for rows, begin, end in tiles),
        scored=shape.scored,
    )


def bytes_per_client(
    model: ModelConfig,
    block: BlockSizes,
    head_chunk: int,
    adapter: int,
    remat: str,
    itemsize: int = 4,
    dropout: bool = False,
    parts: int = 1,
) -> int:
    """Estimates what one client's local step holds on a device, in bytes, besides the base.

    It holds what all layers keep of a block for the backward pass; then either one layer's backward
    pass or one chunk of logits; and the adapter's gradient, its sum over blocks and two moments.

    Args:
        head_chunk: as `train.head_chunk`.
        adapter: bytes of the adapter.
        itemsize: bytes of an activation; scores and logits are float32.
        dropout: whether the adapter has dropout.
        parts: devices that share the base. They split the MLP, the heads and the vocabulary; what
            is as wide as the model they all hold.
    """

    def size(values: Values, itemsize: float = itemsize) -> float:
        a_token = values.width * model.width + values.mlp * model.mlp_width / parts
        an_entry = (values.heads * model.heads + values.kv_heads * model.kv_heads) / parts
        numbers = block.tokens * a_token + block.entries * an_entry * model.head_width
        return itemsize * numbers + 4 * block.pairs * values.scores * model.heads / parts

    # XLA keeps half of what norms and activation functions leave in the float32 that it has there
    each = (itemsize + 4) / 2 if remat == "nothing" else itemsize
    kept = size(KEPT[remat], each) + dropout * size(KEPT_DROPOUT[remat], each)
    held = size(HELD[remat]) + dropout * size(HELD_DROPOUT)
    positions = min(block_positions(head_chunk, model.vocab_size), block.scored)
    logits = 4 * positions * model.vocab_size / parts
    return int(model.layers * kept + max(held, logits) + 4 * adapter)


def cache_bytes(model: ModelConfig, rows: int, length: int, itemsize: int, parts: int = 1) -> int:
    """Keys and values of a generation batch on a device, in bytes.

    Args:
        length: prompt and completion.
        itemsize: bytes of a value.
        parts: devices that share the base; they split the heads where their number allows.
    """
    heads = model.kv_heads // parts if model.kv_heads % parts == 0 else model.kv_heads
    return rows * length * model.layers * 2 * heads * model.head_width * itemsize


@dataclasses.dataclass(frozen=True)
class GenerationLimits:
    """What one generation batch may take.

    Attributes:
        rows: sequences, on all devices together.
        tokens: columns of the KV cache over all sequences of a device.
        read_tokens: prompt tokens of one prefill on a device.
        steps_per_check: decode steps after which it is asked which sequences go on.
    """

    rows: int
    tokens: int
    read_tokens: int
    steps_per_check: int


# A decode step reads the weights once for all rows. At this many on a device the cache is the larger
# part by far, and further rows would save nothing.
MOST_ROWS = 1024


def generation_limits(
    model: ModelConfig,
    itemsize: int,
    megabytes: int,
    rows: int,
    weights: int,
    devices: int,
    parts: int = 1,
) -> GenerationLimits:
    """Returns the limits that the settings and the device set.

    A GPU or TPU decodes as many sequences as the cache's share of its memory holds: a quarter, or
    half of what the base and its copies leave where that is less. On a CPU 64 sequences and 2,048
    prompt tokens fill the cores, and more would take the memory.

    Args:
        itemsize: bytes of a value.
        megabytes: of keys and values on a device; 0: by the device.
        rows: sequences on all devices; 0: as many as fit.
        weights: bytes of the base on a device; beside it lie a copy with the adapter merged in, and
            one of its layers as decoding reads them.
        devices: that sequences are split over.
        parts: as for `cache_bytes`.
    """
    if jax.default_backend() == "cpu":
        size, most, read_tokens, steps = 272_000_000, 64, 2048, 1
    else:
        stats = jax.local_devices()[0].memory_stats() or {}
        limit = stats.get("bytes_limit")
        size = 272_000_000 if limit is None else min(limit // 4, (limit - 3 * weights) // 2)
        most, read_tokens, steps = MOST_ROWS * devices, 8192, 8
    token = cache_bytes(model, 1, 1, itemsize, parts)
    tokens = max(1, (megabytes * 1_000_000 or size) // token)
    return GenerationLimits(rows or most, tokens, read_tokens, steps)


# numbers of a layer's input that keep a GPU or TPU busy: 16,000 tokens of width 1,536 (measured on
# an H200, docs/performance/accelerators.md)
FILLING = 25_000_000


def filling_tokens(model: ModelConfig) -> int:
    """Returns the tokens that fill this device in one pass of local training, about.

    On a CPU 4,096 do; more would only leave its caches.
    """
    return 4096 if jax.default_backend() == "cpu" else max(4096, FILLING // model.width)


def flops(model: ModelConfig, tally: Tally, trained: float) -> float:
    """An estimate of a round's useful floating-point operations: 2 a token and a weight of the
    projections and the head.

    Attention's own products and the adapters' are left out; the head is counted for generated
    tokens and, as an upper bound, for every trained token.

    Args:
        tally: tokens that rollouts read, scored and generated.
        trained: real tokens of training rows, each times its passes over the weights (2 forward, 2
            backward, since the base is frozen; 2 more for each further forward pass), that is,
            operations a weight.
    """
    layers = model.layers * sum(i * o for i, o in projection_shapes(model).values())
    head = model.width * model.vocab_size
    forward = (
        2.0 * (tally.prompt + tally.scored + tally.generated) * layers
        + 2.0 * tally.generated * head
    )
    return forward + trained * (layers + head)


def device_bytes() -> int | None:
    """Memory that is free on one device, in bytes; on a CPU what Linux calls available. None where
    it cannot be known.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    # MemAvailable and not MemFree: a file cache gives its pages back.
    return _meminfo("MemAvailable")


def whole_device_bytes() -> int | None:
    """Memory that JAX may use on one device, in bytes, in use or not; on a CPU all of the machine's.
    None where it cannot be known.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return _meminfo("MemTotal")


def _meminfo(name: str) -> int | None:
    """A number of Linux's /proc/meminfo, in bytes; None elsewhere."""
    if not MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="utf-8").splitlines())
    return int(fields[name].split()[0]) * 1024


def fitting_remat(each: Callable[[str], int], together: int, whole: int | None) -> str:
    """Returns the least that a backward pass need compute again where `together` clients of
    each(remat) bytes may take half of a device's memory.

    It is a function of the machine and the settings, and not of what is free: a run that goes on
    compiles the same programs. At most the products are kept. More would leave a CPU's caches, and
    was no faster on an H200 (docs/performance/accelerators.md).

    Args: whole: what the base leaves of a device's memory; None where it cannot be known.
    """
    fits = lambda remat: whole is not None and together * each(remat) <= whole // 2
    return next(filter(fits, REMAT[1:]), REMAT[-1])


def fitting(most: int, each: int, free: int | None) -> int:
    """How many clients of `each` bytes train together on a device, of `most`: one on a CPU, whose
    cores one client fills and whose caches its arrays then fit better; elsewhere as many as use
    half of what is free.
    """
    if jax.default_backend() == "cpu":
        return 1
    return max(1, most if free is None else min(most, free // 2 // each))


def check_memory(clients_at_once: int, each: int, free: int | None) -> None:
    """Raises UserError where `clients_at_once` clients of `each` bytes exceed `free`, naming the
    value that would fit.
    """
    if free is None or clients_at_once * each <= free:
        return
    fits = free // each
    advice = (
        f"Set --config.federation.clients_at_once={fits}, which would fit."
        if fits
        else "Not even one client fits: lower train.max_tokens_per_block, or set train.remat=layers."
    )
    raise UserError(
        f"{clients_at_once} clients at once need about {clients_at_once * each / 1e9:.1f} GB for "
        f"local training, but "
        f"{free / 1e9:.1f} GB are free. {advice}"
    )
