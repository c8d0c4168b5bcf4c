"""LoRA dropout: masks of the right frequency, independent of one another, from few random words."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.models import decoder
from spear_jax.models.lora import LoraConfig

TOKENS, WIDTH, RANK = 64, 33, 2


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.99, 1 - 1e-9])
def test_masks_keep_the_stated_share_and_are_independent(dropout):
    masks, kept = decoder._keep_masks(jax.random.key(0), dropout, (3, 1001, 333))
    halves = np.asarray(masks)[0, :500].ravel(), np.asarray(masks)[0, 501:].ravel()
    masks = np.asarray(masks).reshape(3, -1)
    assert kept > 0 and abs(kept - (1 - dropout)) <= 1.01 / 65536
    spread = 5 * np.sqrt(kept * (1 - kept) / masks.shape[1])
    assert np.abs(masks.mean(1) - kept).max() < spread
    # two projections of one input, neighbours of one mask, and the halves of its random words
    neighbours = masks[0, 1:], masks[0, :-1]
    for one, other in [(masks[0], masks[1]), (masks[1], masks[2]), neighbours, halves]:
        assert abs((one & other).mean() - kept**2) < spread * np.sqrt(masks[0].size / one.size)


def dropped(names, x, key, dropout=0.1):
    """Dropout of an input, scaled: the A of every projection is the identity."""
    lora = LoraConfig(RANK, 2.0, dropout, tuple(names))
    return decoder._inner(lora, dict.fromkeys(names, jnp.eye(x.shape[-1])), x, key)


def test_what_is_kept_is_scaled_up_by_the_share_that_is_kept():
    x = jnp.full((2000, WIDTH), 3.0)
    found = dropped(("gate", "up"), x, jax.random.key(1))
    for values in found.values():
        kept = 1 - round(0.1 * 65536) / 65536
        np.testing.assert_allclose(np.unique(values), [0.0, 3.0 / kept], rtol=1e-6)
        assert abs(values.mean() / 3.0 - 1) < 5 * np.sqrt(0.1 / values.size)
    assert (found["gate"] != found["up"]).any()


@pytest.mark.parametrize("names", [("q", "k", "v"), ("down",)])
def test_a_random_word_gives_two_entries_of_a_mask(names):
    trace = jax.make_jaxpr(lambda x, key: dropped(names, x, key))
    equations = trace(jnp.ones((TOKENS, WIDTH)), jax.random.key(0)).jaxpr.eqns
    drawn = list(words_of(equations))
    assert drawn == [len(names) * TOKENS * WIDTH // 2]  # one draw for all that read one input


def words_of(equations):
    for equation in equations:
        if equation.primitive.name == "random_bits":
            yield equation.outvars[0].aval.size
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from words_of(inner.eqns)
