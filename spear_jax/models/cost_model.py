"""How much memory a round needs, estimated before anything compiles."""

import dataclasses
import pathlib

import jax

from spear_jax.core.errors import UserError
from spear_jax.core.types import Tally
from spear_jax.models.config import ModelConfig
from spear_jax.models.lora import projection_shapes
from spear_jax.models.token_logprobs import block_positions

MEMINFO = pathlib.Path("/proc/meminfo")


def bytes_per_client(
    model: ModelConfig, tokens: int, length: int, head_chunk: int, adapter: int, remat: str
) -> int:
    """An estimate of what one client's local step holds, in bytes, besides the base.

    Activations of a block kept for the backward pass (float32): one residual [tokens, D] a layer,
    with `remat` "attention" also the products, about 4 D + 2 F values a token and layer, with
    "nothing" about 10 D + 4 F and two score matrices of `length` a head; what is computed again for
    one layer; one block of logits; the adapter with gradient, update and two moments.
    """
    inside = 10 * model.width + 4 * model.mlp_width + 2 * model.heads * length
    kept = {
        "layers": model.width,
        "attention": 5 * model.width + 2 * model.mlp_width,
        "nothing": inside,
    }[remat]
    activations = 4 * tokens * (model.layers * kept + inside)
    logits = 2 * 4 * min(block_positions(head_chunk, model.vocab_size), tokens) * model.vocab_size
    return activations + logits + 5 * adapter


def cache_bytes(model: ModelConfig, rows: int, length: int, itemsize: int) -> int:
    """Keys and values of a generation batch, in bytes. Args: length: prompt and completion;
    itemsize: bytes of a value.
    """
    return rows * length * model.layers * 2 * model.kv_heads * model.head_width * itemsize


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
    model: ModelConfig, itemsize: int, megabytes: int, rows: int, weights: int, devices: int
) -> GenerationLimits:
    """Returns the limits that the settings and the device set.

    A GPU or TPU decodes as many sequences as the cache's share of its memory holds: a quarter, or
    half of what the base and its copy leave where that is less. On a CPU 64 sequences and 2,048
    prompt tokens fill the cores, and more would take the memory.

    Args:
        itemsize: bytes of a value.
        megabytes: of keys and values on a device; 0: by the device.
        rows: sequences on all devices; 0: as many as fit.
        weights: bytes of the base on a device; decoding reads a copy of it.
        devices: that sequences are split over.
    """
    if jax.default_backend() == "cpu":
        size, most, read_tokens, steps = 272_000_000, 64, 2048, 1
    else:
        stats = jax.local_devices()[0].memory_stats() or {}
        limit = stats.get("bytes_limit")
        size = 272_000_000 if limit is None else min(limit // 4, (limit - 2 * weights) // 2)
        most, read_tokens, steps = MOST_ROWS * devices, 8192, 8
    tokens = max(1, (megabytes * 1_000_000 or size) // cache_bytes(model, 1, 1, itemsize))
    return GenerationLimits(rows or most, tokens, read_tokens, steps)


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
    if not MEMINFO.exists():
        return None
    # MemAvailable and not MemFree: a file cache gives its pages back.
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="utf-8").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


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
