"""A small model, adapter and cohort that tests of local training share.

conftest.py has the fixtures.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from spear_jax.algorithms.base import CommonHyperparams
from spear_jax.algorithms.spear import Spear, SpearSettings
from spear_jax.federated import cohort_training
from spear_jax.federated.local_training import LocalConfig
from spear_jax.models.decoder import Decoder
from spear_jax.models.io.huggingface import load_model
from spear_jax.models.lora import LoraConfig, init_lora
from spear_jax.packing.blocks import Keys, choose_block_shape, choose_small, pack_rows
from spear_jax.packing.rows import TrainingRow, groups_of

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
C, S, A, B, P, T = 6, 2, 2, 2, 9, 5
MARGIN = 0.004  # of unlikelihood; about half of the model's tokens are likelier


def spear(batch_size=B, accumulation=A, **changes):
    settings = SpearSettings(lose_weight=0.5, margin=MARGIN)
    common = CommonHyperparams(4, S, accumulation, batch_size, T, 1.0, (2,))
    return Spear(dataclasses.replace(settings, **changes), common)


def local_config(**changes):
    defaults = dict(
        clients_at_once=1, normalize="global", max_grad_norm=1.0, weight_decay=0.01, anchor_weight=0.0, anchor_gradient=True,
        prox=0.0, ema_decay=0.0, head_chunk=16,
    )  # fmt: skip
    return LocalConfig(**(defaults | changes))


def load_small_model():
    return load_model(str(FIXTURES / "qwen2"), "float32")


TARGETS = ("q", "down")


def make_decoder(model, dropout=0.0, remat="attention", targets=TARGETS):
    return Decoder(model.config, LoraConfig(4, 8.0, dropout, targets), remat)


def make_lora(model, targets=TARGETS):
    tree = init_lora(jax.random.key(1), LoraConfig(4, 8.0, 0.0, targets), model.config)
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(2), x.shape), tree)


def make_rows(model):
    """[C][S][A] lists of B wins and B loses."""
    rng = np.random.default_rng(0)
    vocab = model.config.vocab_size

    def row(label):
        length = int(rng.integers(1, T + 1))
        prompt = rng.integers(3, vocab, rng.integers(2, P + 1)).tolist()
        mask = rng.random(length) < 0.8
        mask[0] = True
        completion = rng.integers(3, vocab, length).tolist()
        return TrainingRow(prompt, completion, mask, float(rng.choice([0.5, 1.0])), label)

    micro = lambda: [row(1) for _ in range(B)] + [row(-1) for _ in range(B)]
    return [[[micro() for _ in range(A)] for _ in range(S)] for _ in range(C)]


def rows_of(cohort):
    """A cohort's rows, packed as local training takes them."""
    steps = [[[sum((groups_of(m, 1) for m in step), [])] for step in client] for client in cohort]
    shape = choose_block_shape(sum(steps, []), 1, 1, P, T, 64)
    small = choose_small(sum(steps, []), shape)
    assert small != shape
    keys = Keys()
    blocks = [[pack_rows(step, shape, keys) for step in own] for own in steps]
    return cohort_training.Rows(
        blocks, max(len(step) for own in blocks for step in own), shape, small
    )


def close(left, right, bound=1e-5):
    """Every tensor within `bound` of its norm."""
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


def mostly_close(left, right, bound):
    """Every tensor within a tenth of `bound` of its norm, but for one number in a hundred, and within
    ten times `bound` with that. AdamW divides by the gradient, so that rounding of a gradient near
    zero moves a number as far as any gradient does.
    """
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        apart, norm = np.sort(np.abs(np.asarray(a) - np.asarray(b)), axis=None), np.linalg.norm(b)
        assert np.linalg.norm(apart[: len(apart) * 99 // 100]) <= bound / 10 * norm
        assert np.linalg.norm(apart) <= 10 * bound * norm
