"""The decoder as a Flax NNX module, for tools that expect one.

The decoder itself is pure functions over typed trees. `NnxDecoder` holds the same arrays as
`nnx.Param` (the base) and `nnx.LoRAParam` (the adapter) and calls the same functions, so that
`nnx.split`, `nnx.state`, filters, `nnx.Optimizer` and Orbax see an ordinary model:

    model = NnxDecoder(decoder, base, adapter)
    logits = model(tokens, mask)                              # decoder.logits
    adapter_state = nnx.state(model, nnx.LoRAParam)           # {"lora": {"q": {"a": ..., "b": ...}}}
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.LoRAParam)
    base, adapter = model.base_params(), model.adapter()      # back to typed trees
"""

from typing import Any

import jax
from flax import nnx

from spear_jax.core.errors import UserError
from spear_jax.core.pytrees import to_dicts
from spear_jax.models.decoder import Decoder, logits
from spear_jax.models.params import Adapter, DecoderParams, LayerParams, LowRank


class NnxDecoder(nnx.Module):
    """A decoder with its base and adapter as NNX variables, under the names of the typed trees.

    `nnx.LoRAParam` is a subclass of `nnx.Param`: the filter `nnx.LoRAParam` selects the adapter
    alone, and `nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))` the base alone.

    Args:
        decoder: static settings.
        base: with stacked layers, not quantised.
        adapter: None for a model without one.
    Raises: UserError where the layers are unstacked or quantised.
    """

    def __init__(self, decoder: Decoder, base: DecoderParams, adapter: Adapter | None = None):
        if not base.stacked or not all(isinstance(w, jax.Array) for w in _weights(base)):
            raise UserError(
                "the base has unstacked or quantised layers, which NnxDecoder does not hold; give "
                "the base as load_model(folder, dtype) returns it."
            )
        self.decoder = decoder
        self.base = _variables(to_dicts(base), nnx.Param)
        self.lora = _variables({} if adapter is None else to_dicts(adapter), nnx.LoRAParam)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Computes every logit, float32[B, T, V]. Args: tokens int32[B, T]; mask bool[B, T]."""
        return logits(self.decoder, self.adapter(), self.base_params(), tokens, mask)

    def base_params(self) -> DecoderParams:
        """Returns the base as a typed tree of the same arrays."""
        values = _values(self.base)
        return DecoderParams(**values | {"layers": LayerParams(**values["layers"])})

    def adapter(self) -> Adapter | None:
        """Returns the adapter as a typed tree of the same arrays; None without one."""
        pairs = {target: LowRank(**pair) for target, pair in _values(self.lora).items()}
        return Adapter(**pairs) if pairs else None


def _weights(base: DecoderParams) -> list[Any]:
    return list(base.layers.by_name().values())


def _variables(tree: dict[str, Any], kind: type[nnx.Variable]) -> nnx.Dict:
    """Wraps each leaf of nested dicts in a variable."""
    return nnx.Dict(
        {
            name: _variables(value, kind) if isinstance(value, dict) else kind(value)
            for name, value in tree.items()
        }
    )


def _values(node: nnx.Dict) -> dict[str, Any]:
    """Takes the values out of `_variables` again."""
    return {
        name: _values(child) if isinstance(child, nnx.Dict) else child[...]
        for name, child in node.items()
    }
