"""The device mesh: where arrays lie, on one machine or on many.

The mesh is `clients` x `model`. Clients are split over the axis `clients`, and so are the rows of a
generation and the questions of an evaluation. The weights of a base too large for one device are
split over `model`, where the compiler adds the sums that this asks for.

Every process of a multi-host run does all of the host's work, from the same seeds to the same
results. It reads arrays of other hosts through `to_host`. Only the first process writes files.

Source: the layout of the weights is Megatron's (arXiv 1909.08053): projections into a layer by
    columns, out of it by rows.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as Spec

from spear_jax.core.errors import UserError

CLIENTS, MODEL = "clients", "model"
# the axis, from the end, over which a leaf of the base is split; all other leaves are small
_SPLIT = {name: -1 for name in ("q", "k", "v", "gate", "up", "q_bias", "k_bias", "v_bias")}
_SPLIT |= {name: -2 for name in ("o", "down", "embed", "head")}


def init_distributed(where: str) -> None:
    """Joins a run of several processes; called before anything touches a device.

    Args: where: "" for a run of one process; "auto" where the cluster tells (SLURM, TPU pods, Open
        MPI, Kubernetes); else HOST:PORT,COUNT,NUMBER: the first process's address, how many there
        are, and which one this is.
    Raises: UserError for a value of another form, and where the processes do not find one another.
    """
    if not where:
        return
    addresses: dict[str, Any] = {}
    if where != "auto":
        parts = where.split(",")
        if (
            len(parts) != 3
            or ":" not in parts[0]
            or not all(part.isdecimal() for part in parts[1:])
        ):
            raise UserError(
                f"--distributed is {where!r}; give auto, or HOST:PORT,COUNT,NUMBER, for example "
                f"10.0.0.1:1234,2,0."
            )
        addresses = {
            "coordinator_address": parts[0],
            "num_processes": int(parts[1]),
            "process_id": int(parts[2]),
        }
        if addresses["process_id"] >= addresses["num_processes"]:
            raise UserError(
                f"--distributed={where} names process {parts[2]} of {parts[1]}; they are "
                f"numbered from 0."
            )
    try:
        jax.distributed.initialize(**addresses)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--distributed={where}: the processes did not find one another ({reason}). Start "
            f"all of them, with one "
            "address that each can reach; auto needs a cluster that JAX knows."
        ) from error


def is_main_process() -> bool:
    """Returns whether this process writes the run's files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_main(value: Any) -> Any:
    """Returns the first process's value of a number, in every process: all 64 bits of it.

    Measurements differ between processes; a decision by them must not.
    """
    if jax.process_count() == 1:
        return value
    # as two words: JAX's own arrays have 32 bits, and the bytes of a memory have more
    whole = np.asarray([value], np.float64 if isinstance(value, float) else np.int64)
    words = multihost_utils.broadcast_one_to_all(whole.view(np.uint32))
    return type(value)(np.asarray(words, np.uint32).view(whole.dtype)[0])


def make_mesh(devices: list[Any] | None = None, model: int = 1) -> Mesh:
    """Builds a mesh [clients, model] over the given devices (all by default).

    Eight devices with model = 2 are a mesh [4, 2]: four groups of clients, each on two devices that
    share a base.

    Args: model: devices that share one copy of the base.
    Raises: UserError where their number is no multiple of `model`.
    """
    devices = devices or jax.devices()
    if len(devices) % model:
        raise UserError(
            f"devices.model is {model}, which does not divide the {len(devices)} devices there are."
        )
    shape, kinds = (len(devices) // model, model), (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, (CLIENTS, MODEL), axis_types=kinds, devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts the whole tree on every device of the mesh."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, Spec())), tree)


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Puts the tree on the mesh with its leading axis split over the clients."""
    # Over a single one nothing is split. XLA names its results so, and another name compiles again.
    spec = Spec(CLIENTS) if mesh.shape[CLIENTS] > 1 else Spec()
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, spec)), tree)


def over_heads(rows: Sharding, heads: int) -> Sharding:
    """Returns where keys and values [B, heads, ...] lie whose rows lie as `rows` says: their heads
    are split over `model`, as the projections are that make them, where their number allows.
    """
    if not isinstance(rows, NamedSharding):
        return rows
    parts = rows.mesh.shape[MODEL]
    if parts == 1 or heads % parts:
        return rows
    return NamedSharding(rows.mesh, Spec(*(rows.spec or (None,)), MODEL))


def bytes_on_a_device(tree: Any) -> int:
    """Returns how many bytes of the tree's arrays lie on each device."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(map(size, jax.tree.leaves(tree)))


def base_placer(mesh: Mesh) -> Callable[[str, Any], jax.Array]:
    """Returns a function (name, leaf of a base) -> the leaf on the mesh.

    A large leaf is split over `model` where its size allows. On a mesh [4, 2]:

        q       [L, D, H E]   split over the last axis: [L, D, H E / 2] a device
        o       [L, H E, D]   split over the middle axis: [L, H E / 2, D] a device
        embed   [V, D]        split over the vocabulary: [V / 2, D] a device
        norms                 whole on every device
    """

    def place(name: str, leaf: Any) -> jax.Array:
        axis, parts = _SPLIT.get(name), mesh.shape[MODEL]
        if axis is None or parts == 1 or leaf.shape[axis] % parts:
            return replicate(leaf, mesh)
        spec: list[str | None] = [None] * leaf.ndim
        spec[axis] = MODEL
        return _put(leaf, NamedSharding(mesh, Spec(*spec)))

    return place


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    whole = np.asarray(x)  # every process has all of it, and puts down its own part
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def layer_of(leaf: jax.Array, index: int) -> jax.Array:
    """Returns leaf[index] of an array whose first axis lies whole on each device.

    On CPU devices it is a view of the array's memory, not a copy.
    """
    if isinstance(leaf, jax.core.Tracer) or next(iter(leaf.devices())).platform != "cpu":
        return leaf[index]
    # `device_put` takes a numpy array as it lies where its address is aligned, and copies it
    # elsewhere
    parts = [
        jax.device_put(np.asarray(shard.data)[index], shard.device)
        for shard in leaf.addressable_shards
    ]
    if not isinstance(leaf.sharding, NamedSharding):
        return parts[0]
    sharding = NamedSharding(leaf.sharding.mesh, Spec(*leaf.sharding.spec[1:]))
    return jax.make_array_from_single_device_arrays(leaf.shape[1:], sharding, parts)


def to_host(tree: Any) -> Any:
    """Returns the tree as numpy arrays, whole, in every process."""

    def read(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(read, tree)
