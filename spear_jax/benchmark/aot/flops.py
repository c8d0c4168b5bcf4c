"""Counts floating-point operations in a traced program.

The compiler's own counts do not serve: CUDA's are empty, and a TPU's take the body of a scan once.
"""

import math
from typing import Any

from spear_jax.benchmark.aot.hlo import Count
from spear_jax.core.mesh import CLIENTS


def count_flops(jaxpr: Any) -> Count:
    """Returns the operations of all matrix products, 2 m n k each, of all devices together.

    A scan counts with its length. Loops whose length is data count once, told apart. Of branches
    the one with the most equations counts.
    """
    return _products(jaxpr, lambda left, out, inner: 2.0 * math.prod(out) * inner)


def count_heads(jaxpr: Any, vocabulary: int) -> Count:
    """Returns how often the products with the LM head run; of decoding, once a token."""
    return _products(jaxpr, lambda left, out, inner: float(bool(out) and out[-1] == vocabulary))


def _products(jaxpr: Any, value: Any) -> Count:
    total = Count()

    def visit(jaxpr: Any, runs: Count) -> None:
        nonlocal total
        for equation in jaxpr.eqns:
            params, name = equation.params, equation.primitive.name
            if name == "dot_general":
                ((contracted, _), _), left = (
                    params["dimension_numbers"],
                    equation.invars[0].aval.shape,
                )
                inner = math.prod(left[i] for i in contracted)
                one = value(left, equation.outvars[0].aval.shape, inner)
                total += Count(runs.once * one, runs.loop * one)
            elif name == "scan":
                visit(params["jaxpr"].jaxpr, _times(runs, params["length"]))
            elif name == "while":
                visit(params["body_jaxpr"].jaxpr, Count(0, runs.once + runs.loop))
            elif name == "cond":
                visit(
                    max(params["branches"], key=lambda branch: len(branch.jaxpr.eqns)).jaxpr, runs
                )
            elif name == "shard_map":  # its body is one device's, along the clients' axis
                visit(params["jaxpr"], _times(runs, params["mesh"].shape[CLIENTS]))
            else:
                for inner in params.values():
                    inside = getattr(inner, "jaxpr", inner)
                    if hasattr(inside, "eqns"):
                        visit(inside, runs)

    visit(jaxpr, Count(once=1))
    return total


def _times(runs: Count, times: int) -> Count:
    return Count(runs.once * times, runs.loop * times)
