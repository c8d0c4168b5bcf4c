"""A cohort in portions: the same numbers as in one, and no more rows on a device than two
portions'.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_sizes import SMALL
from small_cohort import C, S, close, local_config, make_decoder, rows_of, spear

from spear_jax.core.mesh import make_mesh, replicate
from spear_jax.experiment import builder, run_logger
from spear_jax.experiment.presets import method_config
from spear_jax.federated import cohort_training, local_training
from spear_jax.federated import round as rounds
from spear_jax.federated.aggregation.pipeline import Aggregation
from spear_jax.federated.round_metrics import BudgetUsed


def train(model, lora, cohort, devices=1, at_once=1, keep=False, carried=None, rate=1e-2, **more):
    mesh, rows = make_mesh(jax.devices()[:devices]), rows_of(cohort)
    if at_once > 1:
        rows = cohort_training.Rows(rows.blocks, rows.depth, rows.shape, None)
    shared = replicate(local_training.Broadcast(lora, model.base, (), {}, jnp.float32(rate)), mesh)
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(9), C)))
    members = keys, np.arange(1, C + 1, dtype=np.float32), np.arange(C) != 1
    static = spear(), make_decoder(model, dropout=0.1), local_config(clients_at_once=at_once), mesh
    return cohort_training.train(
        *static, Aggregation(), shared, rows, members, keep, carried, **more
    )


def copied(states):
    """States to go on from that stay there."""
    return jax.tree.map(lambda x: x.copy(), states)


@pytest.mark.parametrize("devices, at_once, cohort_chunks", [(1, 4, 2), (2, 1, 3)])
def test_portions_give_what_one_portion_gives_and_clients_go_on_from_their_own_states(
    model,
    lora,
    cohort,
    monkeypatch,
    devices,
    at_once,
    cohort_chunks,
):
    def twice():
        first = train(model, lora, cohort, devices, at_once, keep=True)
        states = copied(first.states)
        return first, train(model, lora, cohort, devices, at_once, keep=True, carried=states)

    whole = twice()
    monkeypatch.setattr(cohort_training, "CHUNK_BYTES", 1)
    parts = twice()
    for one, other in zip(whole, parts, strict=True):
        assert len(one.states) == 1 and len(other.states) == cohort_chunks
        close(other.reduced[0], one.reduced[0])
        assert float(other.reduced[1]) == float(one.reduced[1]) == sum(range(1, C + 1))
        assert (other.tokens, other.read) == (one.tokens, one.read) and one.tokens < one.read
        assert all(mean.total.shape == mean.count.shape == (C,) for mean in one.means.values())
        for name, mean in one.means.items():
            np.testing.assert_allclose(
                other.means[name].total, mean.total, rtol=1e-5, atol=1e-6, err_msg=name
            )
        adapters = [
            jax.tree.map(lambda x: np.asarray(x)[:, :C], cohort_training.stacked(x.states, C))
            for x in (other, one)
        ]
        close(*adapters, 1e-4)  # of single clients; Adam enlarges rounding in theirs
    moved = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(),
        whole[0].reduced[0],
        whole[1].reduced[0],
    )
    assert max(jax.tree.leaves(moved)) > 1e-3  # the second phase did go on


def test_no_third_portions_rows_lie_on_the_device(model, lora, cohort, monkeypatch):
    monkeypatch.setattr(cohort_training, "CHUNK_BYTES", 1)
    plain, found = cohort_training.Rows.arrays, []
    depth = rows_of(cohort).depth

    def arrays(rows, begin, size):
        work = plain(rows, begin, size)
        shape = work.blocks.target.shape
        assert shape[:3] == (1, S, depth)
        found.append(sum(x.shape == shape and x.dtype == jnp.int32 for x in jax.live_arrays()))
        return work

    monkeypatch.setattr(cohort_training.Rows, "arrays", arrays)
    done = []
    train(model, lora, cohort, report=done.append)
    assert done == [0] + [1] * C
    # `target` and `source` have this shape. While a portion is packed, only that before it is
    # there.
    assert len(found) == C and max(found) <= 2


@pytest.mark.parametrize(
    "each", [1, 300_000, cohort_training.CHUNK_BYTES, 3 * cohort_training.CHUNK_BYTES]
)
@pytest.mark.parametrize(
    "cohort, at_once, devices", [(1, 1, 1), (1000, 1, 1), (1000, 16, 1), (333, 4, 8), (5, 64, 8)]
)
def test_portions_are_whole_chunks_of_bounded_size_that_cover_the_cohort(
    cohort, at_once, devices, each
):
    size, chunk = cohort_training.chunk_size(cohort, each, at_once, devices), at_once * devices
    assert size % chunk == 0
    assert size * each <= max(cohort_training.CHUNK_BYTES, chunk * each)
    cohort_chunks = -(-cohort // size)
    assert (
        cohort_chunks * size < cohort + cohort_chunks * chunk
    )  # less than a chunk of each portion is padding


def test_a_grpo_round_in_portions_with_adapters_on_the_host_equals_the_round_in_one(monkeypatch):
    config = method_config("grpo", "facts,tiny,small")
    config.update_from_flattened_dict(
        SMALL
        | {
            "federation.aggregation": "fedavg",
            "federation.clients_per_round": 3,
            "train.steps": 2,
            "rollout.max_concurrent_sequences": 8,
        }
    )
    results = []
    for cohort_chunk in (cohort_training.CHUNK_BYTES, 1):
        monkeypatch.setattr(cohort_training, "CHUNK_BYTES", cohort_chunk)
        built = builder.build(config, jax.devices()[:1])
        state, metrics, told = rounds.run_round(
            built.federation, built.initial_state(), BudgetUsed()
        )
        assert metrics["grpo/mixed_groups"] > 0
        results.append(
            (state.lora, [trace.first.completion for trace, _, _ in told], metrics["train/loss"])
        )
    (one, said, loss), (other, again, same) = results
    assert said == again and loss == pytest.approx(same, rel=1e-4)
    # A chunk of one client is another program. Adam divides its rounding by gradients near zero.
    close(other, one, 1e-3)


def test_a_stages_bar_knows_its_total_and_another_attempt_begins_another(monkeypatch):
    monkeypatch.setattr(run_logger, "on_terminal", lambda quiet: True)
    progress, seen = run_logger.ProgressBars(False), []
    progress.begin(2, 0)
    for stage, rows, total in [
        ("revision", 1, 2),
        ("revision", 1, 2),
        ("revision", 1, 3),
        ("train", 0, 5),
        ("train", 4, 5),
    ]:
        progress.stage_rows(stage, rows, total)
        seen.append((progress.stage.n, progress.stage.total))
    progress.close()
    assert seen == [(1, 2), (2, 2), (1, 3), (0, 5), (4, 5)]


def test_states_that_come_back_take_the_memory_of_those_carried(model, lora, cohort):
    first = train(model, lora, cohort, keep=True)
    used = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(first.states)]
    second = train(model, lora, cohort, keep=True, carried=first.states)
    assert all(x.is_deleted() for x in jax.tree.leaves(first.states))
    assert used == [x.unsafe_buffer_pointer() for x in jax.tree.leaves(second.states)]
    train(model, lora, cohort, carried=second.states)  # the last phase sends nothing back
    assert not any(x.is_deleted() for x in jax.tree.leaves(second.states))


def test_a_client_that_loses_its_update_goes_on_with_its_old_adapter_and_moments(
    model, lora, cohort
):
    """A rate at which Adam's step is infinite, though gradients are finite."""
    first = train(model, lora, cohort, keep=True)
    lost = train(model, lora, cohort, keep=True, carried=copied(first.states), rate=np.inf)
    (before,), (after,) = first.states, lost.states
    active = np.arange(C) != 1
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[:C][active], np.asarray(old)[:C][active])
    moved = train(model, lora, cohort, keep=True, carried=copied(first.states)).states[0]
    counts = lambda states: np.asarray(jax.tree.leaves(states.opt_state)[0])[:C][active]
    assert (counts(moved) > counts(before)).all()
