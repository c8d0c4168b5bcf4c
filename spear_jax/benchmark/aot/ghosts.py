"""Plays the host's side of a run on devices that are not there.

A ghost is an array without memory: a shape, a dtype, and where it would lie. Whatever is put on a
device becomes a ghost. A jitted function that is called with ghosts is recorded with its arguments,
and returns ghosts. The host's code above it is the run's own, so that what is recorded is what a
run compiles. Read back, a ghost is zeros.
"""

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spear_jax.benchmark.aot.targets import Target, compiler
from spear_jax.core import mesh as mesh_module
from spear_jax.core.errors import UserError

JITTED = type(jax.jit(lambda: None))


class Decoding(Exception):
    """Raised in place of decoding, whose tokens nobody can read."""


class Ghost(jax.ShapeDtypeStruct):
    """An array without memory.

    Attributes:
        value: the host's array that was put down, where there was one.
    """

    value: np.ndarray | None = None

    @classmethod
    def of(cls, x: Any, sharding: Any) -> "Ghost":
        """Returns the ghost of an array, or of another ghost, elsewhere."""
        ghost = cls(np.shape(x), x.dtype, sharding=sharding)
        value = x.value if isinstance(x, Ghost) else x if isinstance(x, np.ndarray) else None
        object.__setattr__(ghost, "value", value)  # its class compares what it is told to set
        return ghost

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the whole array."""
        return self.size * self.dtype.itemsize

    def devices(self) -> set[Any]:
        """Returns the devices on which it would lie."""
        return self.sharding.device_set

    def held(self) -> int:
        """Returns the bytes of one device's part."""
        return int(np.prod(self.sharding.shard_shape(self.shape))) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.zeros(self.shape, dtype or self.dtype)

    def __float__(self) -> float:
        return 0.0

    def __getitem__(self, index: Any) -> "Ghost":
        part = jax.eval_shape(lambda x: x[index], self)
        # the leading axes are never split, and the index takes no others
        kept = self.sharding.spec[self.ndim - part.ndim :]
        return Ghost.of(part, NamedSharding(self.sharding.mesh, PartitionSpec(*kept)))


@dataclasses.dataclass(eq=False)
class Program:
    """One program of a run, traced, lowered and compiled when asked.

    Attributes:
        name: the jitted function's; stage: the part of the round that first started it.
        seconds: {"trace", "compile"}, each {"wall", "cpu"}; lowering counts as compiling.
    """

    name: str
    stage: str
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    mesh: Mesh
    target: Target
    seconds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def traced(self) -> Any:
        began = clock()
        traced = self.function.trace(*self.args, **self.kwargs)
        self.seconds["trace"] = elapsed(began)
        return traced

    @functools.cached_property
    def compiled(self) -> Any:
        with compiler(self.target):
            traced, began = self.traced, clock()
            try:
                compiled = traced.lower().compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise UserError(
                    f"{self.name} does not fit its device: {str(error).splitlines()[0]} Let more "
                    "devices share the base (devices.model), store it smaller (quantize=int8), or "
                    "lower train.max_tokens_per_block or rollout.kv_cache_mb."
                ) from error
            self.seconds["compile"] = elapsed(began)
        return compiled

    def compile(self) -> "Program":
        """Stands in for `Lowered.compile`: returns itself."""
        return self

    @property
    def output_shardings(self) -> Any:
        """Returns the results' shardings; on one device they are known without compiling."""
        if self.mesh.size > 1:
            return self.compiled.output_shardings
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: whole, self.traced.out_info)

    def outputs(self) -> Any:
        """Returns the results as ghosts."""
        return jax.tree.map(Ghost.of, self.traced.out_info, self.output_shardings)


def clock() -> tuple[float, float]:
    """Returns seconds of the wall and of the processors, those of assemblers among them."""
    return time.perf_counter(), sum(os.times()[:4])


def elapsed(began: tuple[float, float]) -> dict[str, float]:
    """Returns the seconds since a reading of `clock`."""
    wall, cpu = clock()
    return {"wall": wall - began[0], "cpu": cpu - began[1]}


class Recorder:
    """Programs that a played run would start, in the order of their first start.

    Attributes:
        stage: the part of the round that is being played, for `Program.stage`.
        programs: by what makes JAX compile another one: function, shapes, shardings, static
            arguments.
        starts: of programs, in their order.
    """

    def __init__(self, mesh: Mesh, target: Target, ends: str):
        self.mesh, self.target, self.ends, self.stage = mesh, target, ends, ""
        self.programs: dict[Any, Program] = {}
        self.starts: list[Program] = []

    def start(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Program:
        """Records a start; raises Decoding for the function named `ends`."""
        args, kwargs = jax.tree.map(_shape, (args, kwargs))
        leaves, tree = jax.tree.flatten((args, kwargs))
        key = (function, tree, *map(_identity, leaves))
        program = self.programs.get(key)
        if program is None:
            name = function.__name__
            program = Program(name, self.stage, function, args, kwargs, self.mesh, self.target)
            self.programs[key] = program
        self.starts.append(program)
        if program.name == self.ends:
            raise Decoding
        return program


class Recorded:
    """A jitted function of which calls with ghosts are recorded."""

    def __init__(self, function: Any, recorder: Recorder):
        self.function, self.recorder = function, recorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(x, Ghost) for x in jax.tree.leaves((args, kwargs))):
            return self.function(*args, **kwargs)
        return self.recorder.start(self.function, args, kwargs).outputs()

    def lower(self, *args: Any, **kwargs: Any) -> Program:
        return self.recorder.start(self.function, args, kwargs)


class _Device:
    """The memory of a device that is not there, as `jax.Device.memory_stats` tells it."""

    def __init__(self, target: Target):
        self.stats = {"bytes_limit": target.memory, "bytes_in_use": 0}

    def memory_stats(self) -> dict[str, int]:
        return dict(self.stats)


def _shape(leaf: Any) -> Any:
    """Returns an array that this machine's JAX made as what it is on the target: uncommitted."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def _identity(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.shape, leaf.dtype, leaf.sharding
    return (leaf.shape, leaf.dtype) if isinstance(leaf, np.ndarray | np.generic) else leaf


@contextlib.contextmanager
def haunted(target: Target) -> Iterator[Callable[[int], None]]:
    """Lets the run's code see the target in place of this machine.

    What it puts on a device becomes a ghost, and what it asks of JAX about the device is the
    target's: the platform, and the memory.

    Yields: a function that takes the bytes which are in use on a device.
    """
    device = _Device(target)
    local = jax.local_devices

    def put(x: Any, sharding: NamedSharding) -> Ghost:
        return Ghost.of(x, sharding)

    def local_devices(*args: Any, **kwargs: Any) -> list[Any]:
        return local(*args, **kwargs) if args or kwargs else [device]

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(mesh_module, "_put", put))
        stack.enter_context(replaced(jax, "default_backend", lambda: target.platform))
        stack.enter_context(replaced(jax, "local_devices", local_devices))
        yield lambda used: device.stats.update(bytes_in_use=used)


@contextlib.contextmanager
def recording(mesh: Mesh, target: Target, ends: str) -> Iterator[Recorder]:
    """Records every jitted function of this package that is called with ghosts.

    Args: ends: the function in whose place `Decoding` is raised.
    """
    recorder = Recorder(mesh, target, ends)
    found = [
        (module, name, value)
        for path, module in list(sys.modules.items())
        if path.split(".")[0] == "spear_jax"
        for name, value in list(vars(module).items())
        if isinstance(value, JITTED)
    ]
    with contextlib.ExitStack() as stack:
        for module, name, value in found:
            stack.enter_context(replaced(module, name, Recorded(value, recorder)))
        yield recorder


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of a module for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
