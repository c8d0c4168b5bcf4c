"""DPO and GRPO against TRL's own trainers on the same arrays: losses, and gradients with respect to
the log-probabilities.

What TRL said stands in fixtures/trl.json (tests/make_trl_fixtures.py, whose docstring tells which
TRL code ran). Ours runs as in training: `Dpo` and `Grpo` with the counts of the whole optimiser
step (train.normalize "global").

Where TRL and we differ, exactly (each is computed here, and what is left is equal):
    1. KL: TRL's default (use_bias_correction_kl) is ρ k3 with a gradient through ρ, which is there
       even where ρ = 1; ours is the k3 of the GRPO paper, TRL's with that switched off.
    2. Sequence ratios with β > 0: TRL adds the mean of the tokens' k3, ours the k3 of the means of
       the log-probabilities, which is never larger.
    3. Sequence ratios of a row without a scored token: it adds nothing to TRL's loss, and the
       constant −A / rows to ours. The gradients are equal.
    4. dapo, where one sampling serves several optimiser steps of different rows: TRL divides by the
       tokens of an average step (num_items_in_batch · accumulation / steps_per_generation), ours by
       the step's own. Our steps on one sampling (grpo.updates) share their rows, and then the two
       are one number.
Nothing in TRL 1.16 to compare with: ratio and scaling as published with SPEAR; cispo with other
reductions than dapo's; label smoothing of the sigmoid, except that TRL's aot is the same on a
single pair. Sequence ratios with other reductions than grpo's are TRL's alone.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.algorithms import losses
from spear_jax.algorithms.base import CommonHyperparams
from spear_jax.algorithms.dpo import Dpo, DpoSettings
from spear_jax.algorithms.grpo import Grpo, GrpoSettings, advantages
from spear_jax.packing.arrays import Batch

TRL = json.loads((pathlib.Path(__file__).parents[1] / "fixtures/trl.json").read_text())
PRECISIONS = [(True, 1e-9), (False, 1e-6)]
ACCUMULATION, LONGEST = 2, 7  # of the GRPO cases
OTHER_STEPS = "dapo, two steps on one sampling"
GRPO_CASES = [name for name in TRL["grpo"]["cases"] if name != OTHER_STEPS]


def common(rows: int, accumulation: int) -> CommonHyperparams:
    return CommonHyperparams(
        examples=1, steps=1, accumulation=accumulation, batch_size=rows, max_new_tokens=LONGEST, temperature=1.0,
        eos_ids=(0,),
    )  # fmt: skip


def dpo_settings(theirs: dict) -> DpoSettings:
    """Ours, for a case's TRL settings."""
    (kind,) = theirs["loss_type"]
    smoothing = theirs.get("label_smoothing", 0.0)
    return DpoSettings(
        kind="sigmoid" if kind == "aot" else kind, beta=theirs["beta"], smoothing=smoothing
    )


def grpo_settings(theirs: dict) -> GrpoSettings:
    """Ours, for a case's TRL settings. TRL's cispo divides as its dapo does."""
    kind = theirs["loss_type"]
    return GrpoSettings(
        ratio="cispo" if kind == "cispo" else theirs.get("importance_sampling_level", "token"),
        reduction="dapo" if kind == "cispo" else kind,
        clip_low=theirs.get("epsilon", 0.2),
        clip_high=theirs["epsilon_high"],
        kl_weight=theirs["beta"],
        updates=theirs["num_iterations"],
    )


def dpo_rows() -> dict:
    """The fixture's pairs as rows, chosen first; logprobs, reference float64[2 pairs, T]."""
    rows = {name: np.concatenate(TRL["dpo"][name]) for name in ("logprobs", "reference", "mask")}
    half = len(rows["mask"]) // 2
    return rows | {
        "label": np.repeat([1, -1], half),
        "advantage": np.zeros(2 * half),
        "old": rows["logprobs"],
    }


def grpo_rows() -> dict:
    """The fixture's rows; logprobs, old, reference float64[rows, T]."""
    rows = {
        name: np.array(TRL["grpo"][name])
        for name in ("logprobs", "old", "reference", "mask", "advantage")
    }
    return rows | {"label": np.ones(len(rows["mask"]), int)}


def packed(rows: dict, index: np.ndarray) -> Batch:
    """One micro-batch, in the precision of the moment."""
    own = {name: jnp.array(array[index]) for name, array in rows.items()}
    weight = jnp.ones(own["mask"].shape, own["logprobs"].dtype)
    return Batch(
        completion_mask=own["mask"], loss_mask=own["mask"], weight=weight,
        advantage=own["advantage"], label=own["label"], ref_logprobs=own["reference"][:, None],
        old_logprobs=own["old"],
    )  # fmt: skip


def step(
    algorithm, rows: dict, micros: list[np.ndarray], less=lambda logprobs: 0.0
) -> tuple[float, np.ndarray]:
    """Our loss of an optimiser step, minus `less` (a function of all rows' log-probabilities), and
    its gradient.
    """
    batches = [packed(rows, index) for index in micros]
    own = [algorithm.denominators(batch, None, {}) for batch in batches]
    counts = [jax.tree.map(lambda *each: sum(each), *own)] * len(own)
    if algorithm.scoring.per_micro_batch:
        counts = [jax.tree.map(lambda x: len(own) * x, one) for one in own]

    def objective(logprobs):
        parts = zip(batches, micros, counts, strict=True)
        return sum(
            algorithm.loss(batch, logprobs[i], one, {})[0] for batch, i, one in parts
        ) - less(logprobs)

    return jax.jit(jax.value_and_grad(objective))(jnp.array(rows["logprobs"]))


def split(count: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, start + size) for start in range(0, count, size)]


def departure(rows: dict, theirs: dict):
    """Ours minus TRL's, as this file's list has it: a function of all rows' log-probabilities."""
    mask, beta, empty = (
        jnp.array(rows["mask"]),
        theirs["beta"],
        -(rows["advantage"] * ~rows["mask"].any(-1)).mean(),
    )
    old, reference = jnp.array(rows["old"]), jnp.array(rows["reference"])

    def corrected(logprobs):  # 1: β Σ m (1 − ρ) k3 / Σ m
        held = old if theirs["num_iterations"] > 1 else jax.lax.stop_gradient(logprobs)
        return (
            beta
            * (mask * (1 - jnp.exp(logprobs - held)) * losses.k3(logprobs, reference)).sum()
            / mask.sum()
        )

    def sequence(
        logprobs,
    ):  # 2 and 3: β mean of (k3 of means − mean of k3), and the rows without a token
        means = losses.k3(*(losses.sequence_mean(x, mask) for x in (logprobs, reference)))
        return (
            empty
            + beta * (means - losses.sequence_mean(losses.k3(logprobs, reference), mask)).mean()
        )

    if theirs["use_bias_correction_kl"]:
        return corrected
    return sequence if "importance_sampling_level" in theirs else lambda logprobs: 0.0


def agree(found: tuple, wanted: dict, tolerance: float) -> None:
    assert float(found[0]) == pytest.approx(wanted["loss"], abs=tolerance)
    np.testing.assert_allclose(found[1], np.array(wanted["grad"]), rtol=0, atol=tolerance)


def check_dpo(case: dict, tolerance: float) -> None:
    rows, size = dpo_rows(), case["micro"]
    pairs = len(rows["mask"]) // 2
    micros = [np.concatenate([index, pairs + index]) for index in split(pairs, size)]
    (wanted,) = case["steps"]
    agree(
        step(Dpo(dpo_settings(case["settings"]), common(size, len(micros))), rows, micros),
        wanted,
        tolerance,
    )


def check_grpo(case: dict, tolerance: float) -> None:
    rows, theirs = grpo_rows(), case["settings"]
    micros = split(len(rows["mask"]), case["micro"])
    algorithm = Grpo(grpo_settings(theirs), common(case["micro"], ACCUMULATION))
    (wanted,) = case["steps"]
    agree(step(algorithm, rows, micros, departure(rows, theirs)), wanted, tolerance)


def check_other_steps(case: dict, tolerance: float) -> None:
    rows, micros = grpo_rows(), split(len(TRL["grpo"]["mask"]), case["micro"])
    algorithm, tokens = (
        Grpo(grpo_settings(case["settings"]), common(case["micro"], ACCUMULATION)),
        rows["mask"].sum(-1),
    )
    for index, wanted in enumerate(case["steps"]):
        own = micros[ACCUMULATION * index : ACCUMULATION * (index + 1)]
        theirs = tokens.sum() * ACCUMULATION / len(micros)
        ours = sum(tokens[i].sum() for i in own)
        assert ours != theirs
        loss, grad = step(algorithm, rows, own)
        agree((loss * ours / theirs, grad * ours / theirs), wanted, tolerance)


def check_advantages(made: dict, scaling: str, tolerance: float) -> None:
    np.testing.assert_allclose(
        advantages(np.array(made["rewards"]), scaling), made[scaling], rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("x64, tolerance", PRECISIONS)
@pytest.mark.parametrize("name", TRL["dpo"]["cases"])
def test_dpo_step_equals_trl(name, x64, tolerance):
    with jax.enable_x64(x64):
        check_dpo(TRL["dpo"]["cases"][name], tolerance)


@pytest.mark.parametrize("x64, tolerance", PRECISIONS)
@pytest.mark.parametrize("name", GRPO_CASES)
def test_grpo_step_of_two_micro_batches_equals_trl(name, x64, tolerance):
    with jax.enable_x64(x64):
        check_grpo(TRL["grpo"]["cases"][name], tolerance)


@pytest.mark.parametrize("x64, tolerance", PRECISIONS)
def test_dapo_divides_by_its_own_tokens_where_trl_divides_by_an_average_step(x64, tolerance):
    with jax.enable_x64(x64):
        check_other_steps(TRL["grpo"]["cases"][OTHER_STEPS], tolerance)


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
def test_advantages_equal_trl(scaling):
    check_advantages(TRL["advantages"], scaling, 1e-6)  # TRL's are float32


@pytest.mark.parametrize("name", GRPO_CASES)
def test_only_the_listed_departures_are_not_zero(name):
    rows, theirs = grpo_rows(), TRL["grpo"]["cases"][name]["settings"]
    value, grad = jax.value_and_grad(departure(rows, theirs))(jnp.array(rows["logprobs"]))
    if name == "sequence":
        assert value == pytest.approx(-0.8 / 8) and not grad.any()  # row 6 has A = 0.8 and no token
    elif name == "sequence with a reference":
        assert value < -0.8 / 8 and grad.any()
    elif name == "dapo on its own samples with corrected KL":
        assert value == 0 and grad.any()
    else:
        assert bool(value) == bool(grad.any()) == ("corrected" in name)


def test_grpo_arrays_pass_the_clip_on_both_sides_for_both_signs():
    rows = grpo_rows()
    mask, change = rows["mask"], rows["logprobs"] - rows["old"]
    means = (change * mask).sum(-1) / np.maximum(1, mask.sum(-1))
    for sign in (1, -1):
        own = np.sign(rows["advantage"]) == sign
        tokens = np.exp(change[own][mask[own]])
        for beyond in (tokens < 0.8, tokens > 1.28, (tokens > 0.8) & (tokens < 1.28)):
            assert beyond.sum() >= 2
        assert (means[own] < np.log(0.8)).any() and (means[own] > np.log(1.28)).any()
    assert set(mask.sum(-1)) == {0, 1, 2, 3, 4, 5}
    assert rows["logprobs"][~mask].all()  # padding holds numbers, which must not count


def test_dpo_arrays_have_margins_on_every_side():
    rows = dpo_rows()
    win, lose = np.split(((rows["logprobs"] - rows["reference"]) * rows["mask"]).sum(-1), 2)
    margins = 0.5 * (win - lose)
    assert margins.min() < 0 and margins.max() > 1 and ((margins > 0) & (margins < 1)).any()
    assert 0 in rows["mask"].sum(-1)


@pytest.mark.live
def test_trl_says_today_what_the_fixture_says_and_what_we_say():
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip(
        "trl",
        minversion="1.16",
        reason="needs trl 1.16, whose trainers take log-probabilities as outputs",
    )
    import make_trl_fixtures

    fresh = make_trl_fixtures.make()
    for part, tolerance in (("dpo", 1e-9), ("grpo", 1e-9), ("advantages", 1e-6)):
        found, shape = jax.tree.flatten(fresh[part])
        kept, kept_shape = jax.tree.flatten(TRL[part])
        assert shape == kept_shape
        for one, other in zip(found, kept, strict=True):
            assert one == (other if isinstance(other, str) else pytest.approx(other, abs=tolerance))
    with jax.enable_x64(True):
        for case in fresh["dpo"]["cases"].values():
            check_dpo(case, 1e-9)
        for name, case in fresh["grpo"]["cases"].items():
            (check_other_steps if name == OTHER_STEPS else check_grpo)(case, 1e-9)
    for scaling in ("group", "batch", "none"):
        check_advantages(fresh["advantages"], scaling, 1e-6)
