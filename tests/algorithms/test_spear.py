"""SPEAR's rollout and pools on the embedded model: roles, rows, weights, and the published
switches.
"""

import dataclasses

import jax
import numpy as np
import pytest

from spear_jax.algorithms.feedback_rollout import FeedbackRollout, completion_ids
from spear_jax.algorithms.spear import protected_ids
from spear_jax.core.rng import path_key
from spear_jax.experiment import builder, presets
from spear_jax.federated import round as rounds

DEVICES = slice(0, 1)


def build(task="facts", **changes):
    config = presets.quickstart(task)
    config.update_from_flattened_dict(
        {
            "federation.clients_per_round": 3,
            "rollout.examples": 12,
            "train.steps": 2,
            "train.batch_size": 4,
        }
        | changes
    )
    return builder.build(config, jax.devices()[DEVICES])


def collect(built, round=1):
    state = built.initial_state()
    key = path_key(jax.random.wrap_key_data(state.key), rounds.ROUND, round)
    policy = built.federation.worker.policy(state.lora)
    return built.federation.algorithm.collect(
        built.federation.worker,
        policy,
        built.federation.cohort(round),
        state.algorithm_state,
        key,
        0,
    )


@pytest.fixture(scope="module")
def facts():
    built = build()
    return built, collect(built)


def rows_of(got, slot):
    return [row for step in got.rows[slot] for micro in step for row in micro if row is not None]


def test_every_trace_asks_a_client_about_its_own_example(facts):
    built, got = facts
    cohort = built.federation.cohort(1)
    own = {
        c: {built.federation.worker.examples[i].id for i in part}
        for c, part in zip(cohort.clients, cohort.indices, strict=True)
    }
    assert len(got.traces) == 36
    assert all(trace.example.id in own[trace.client] for trace, _, _ in got.traces)
    assert len({(trace.client, trace.example.id) for trace, _, _ in got.traces}) == 36


def test_roles_confidences_and_revisions_follow_the_verdicts(facts):
    _, got = facts
    for trace, role, confidence in got.traces:
        assert (role == "win") == trace.first.correct
        if trace.first.correct:
            assert len(trace.attempts) == 1
        else:
            assert confidence == (1.0 if trace.last.correct else 0.5)
            assert trace.last.correct or len(trace.attempts) == 3
            assert all(not attempt.correct for attempt in trace.attempts[:-1])
            assert all(attempt.feedback for attempt in trace.attempts[1:])
    assert {role for _, role, _ in got.traces} >= {"win", "lose"}


def test_rows_are_sampled_ids_under_the_original_prompt(facts):
    built, got = facts
    sampled = {}
    for trace, _, _ in got.traces:
        for attempt in trace.attempts:
            sampled.setdefault(tuple(trace.first.prompt), []).append(
                (attempt.completion, attempt.correct)
            )
    for slot in range(3):
        for row in rows_of(got, slot):
            assert (row.completion, row.label > 0) in sampled[tuple(row.prompt)]


def test_lose_rows_touch_only_the_answers_letter_and_win_rows_every_token(facts):
    built, got = facts
    for row in rows_of(got, 0):
        if row.label > 0:
            assert row.loss_mask.all()
        else:
            text = built.federation.worker.renderer.decode(
                [t for t, m in zip(row.completion, row.loss_mask, strict=True) if m]
            )
            assert text.strip() in ("A", "B", "C", "D", "")


def test_recorded_loses_say_which_tokens_unlikelihood_may_touch(facts):
    _, got = facts
    masks = {}
    for slot in range(3):
        masks |= {
            (tuple(r.prompt), tuple(r.completion)): r.loss_mask.tolist()
            for r in rows_of(got, slot)
            if r.label < 0
        }
    loses = [trace.first for trace, role, _ in got.traces if role == "lose"]
    drawn = [first for first in loses if (tuple(first.prompt), tuple(first.completion)) in masks]
    assert drawn and all(first.unlikelihood_mask is not None for first in loses)
    for first in drawn:
        assert first.unlikelihood_mask == masks[tuple(first.prompt), tuple(first.completion)]
    assert all(
        trace.first.unlikelihood_mask is None for trace, role, _ in got.traces if role != "lose"
    )


def test_unlikelihood_is_held_to_the_answer_as_the_task_says_always_or_never(facts):
    built, got = facts
    worker = built.federation.worker
    trace = next(trace for trace, _, _ in got.traces if not trace.first.correct)
    wrong = trace.example.labels[1 - trace.example.gold if trace.example.gold < 2 else 0]
    ids = worker.renderer.tokenizer.encode(f" {wrong}\nAnswer", add_special_tokens=False)
    first = dataclasses.replace(trace.first, completion=ids, text=worker.renderer.decode(ids))
    longer = dataclasses.replace(trace, attempts=[first])
    unlikelihood_mask = {}
    for asked in ("auto", "always", "never"):
        settings = dataclasses.replace(built.federation.algorithm.settings, answer_only=asked)
        unlikelihood_mask[asked] = (
            dataclasses.replace(built.federation.algorithm, settings=settings)
            ._lose_row(worker, longer, ())
            .loss_mask
        )
    assert unlikelihood_mask["never"].all() and len(ids) > 1
    assert (
        unlikelihood_mask["always"].sum() == 1
        and (unlikelihood_mask["auto"] == unlikelihood_mask["always"]).all()
    )


def test_weights_are_wins_and_the_cap_holds(facts):
    built, got = facts
    for slot, client in enumerate(built.federation.cohort(1).clients):
        traces = [(t, role) for t, role, _ in got.traces if t.client == client]
        wins = sum(t.last.correct for t, _ in traces)
        assert got.weight[slot] == wins and got.active[slot] == (wins > 0)
        assert sum(role == "lose" for _, role in traces) <= 2 * wins
    assert got.metrics["rollout/wins"] == got.weight.sum()


def test_rollouts_of_a_round_batched_together_equal_rollouts_client_by_client(facts):
    built, got = facts
    state = built.initial_state()
    key = path_key(jax.random.wrap_key_data(state.key), rounds.ROUND, 1)
    policy = built.federation.worker.policy(state.lora)
    cohort = built.federation.cohort(1)
    for slot in range(3):
        alone = dataclasses.replace(
            cohort,
            clients=cohort.clients[slot : slot + 1],
            indices=cohort.indices[slot : slot + 1],
            rngs=lambda s, name, slot=slot: cohort.rngs(slot, name),
        )
        one = built.federation.algorithm.collect(built.federation.worker, policy, alone, {}, key, 0)
        together = [t for t, _, _ in got.traces if t.client == cohort.clients[slot]]
        for (left, _, _), right in zip(one.traces, together, strict=True):
            assert left.example.id == right.example.id
            assert [a.completion for a in left.attempts] == [a.completion for a in right.attempts]


def test_clients_without_wins_weigh_nothing_and_as_published_their_rollouts(facts):
    built, got = facts
    cohort = built.federation.cohort(1)
    losing = [
        dataclasses.replace(t, attempts=[dataclasses.replace(a, correct=False) for a in t.attempts])
        for t, _, _ in got.traces
    ]
    asks = [(t.client, 0, 0) for t in losing]
    for setting, weight in (("zero", 0.0), ("rollouts", 12.0)):
        settings = dataclasses.replace(built.federation.algorithm.settings, skip_weight=setting)
        algorithm = dataclasses.replace(built.federation.algorithm, settings=settings)
        empty = algorithm.pools(built.federation.worker, cohort, FeedbackRollout(losing, asks, {}))
        assert empty.weight.tolist() == [weight] * 3 and not empty.active.any()
        assert all(row is None for step in empty.rows[0] for micro in step for row in micro)


def test_a_client_with_fewer_examples_than_asked_uses_all_it_has():
    built = build(
        **{"rollout.examples": 10_000, "data.train_limit": 120, "federation.min_examples": 2}
    )
    got = collect(built)
    assert len(got.traces) == sum(len(part) for part in built.federation.cohort(1).indices)


def test_published_retokenisation_closes_every_completion_with_eos():
    built = build(
        **{
            "spear.retokenise": True,
            "rollout.max_new_tokens": 1,
            "rollout.max_new_tokens_revision": 1,
        }
    )
    got = collect(built)
    assert all(
        trace.first.unlikelihood_mask is None for trace, _, _ in got.traces
    )  # what is trained on was not sampled
    rows = [row for slot in range(3) for row in rows_of(got, slot)]
    eos = built.model.eos_ids[0]
    assert rows and all(row.completion[-1] == eos and len(row.completion) >= 2 for row in rows)
    ours = build(**{"rollout.max_new_tokens": 1, "rollout.max_new_tokens_revision": 1})
    assert all(
        len(row.completion) == 1 for slot in range(3) for row in rows_of(collect(ours), slot)
    )


def test_a_text_that_encodes_to_more_tokens_than_were_sampled_still_fits(facts):
    built, got = facts
    attempt = dataclasses.replace(got.traces[0][0].first, text="\ufffd\ufffd zq\ufffdzq\ufffd")
    room = built.federation.worker.first.max_new_tokens
    assert len(built.model.tokenizer.encode(attempt.text.strip(), add_special_tokens=False)) > room
    ids = completion_ids(built.federation.worker, attempt, retokenise=True)
    assert len(ids) == room + 1 and ids[-1] == built.model.eos_ids[0]


def test_reasoned_loses_keep_a_tail_window_without_protected_ids():
    built = build("reasoned")
    got = collect(built)
    protected = set(protected_ids(built.federation.worker, math_ops=False))
    marker = built.model.tokenizer.encode(" Answer:", add_special_tokens=False)
    assert set(marker) <= protected
    loses = [row for slot in range(3) for row in rows_of(got, slot) if row.label < 0]
    assert loses
    for row in loses:
        kept = [t for t, m in zip(row.completion, row.loss_mask, strict=True) if m]
        assert (
            len(kept) <= 8
            and not protected & set(kept)
            and not set(built.model.eos_ids) & set(kept)
        )
        unmasked = [i for i, t in enumerate(row.completion) if t not in built.model.eos_ids]
        assert set(np.flatnonzero(row.loss_mask)) <= set(unmasked[-8:])


def test_strict_format_trains_on_rewrites_that_are_right_and_well_formed():
    built = build(**{"spear.strict_format": True})
    # every right first answer is declared ill-formed once, so that the branch runs
    seen = set()
    original = built.federation.worker.task.well_formed
    built.federation.worker.task.well_formed = lambda text, example: (
        original(text, example) if example.id in seen else bool(seen.add(example.id))
    )
    got = collect(built)
    first_right = [t for t, _, _ in got.traces if t.first.correct]
    fixed = sum(t.last.correct for t, _, _ in got.traces if not t.first.correct)
    assert first_right and fixed <= got.metrics["rollout/wins"] < fixed + len(first_right) + 1
    assert all(role != "lose" for t, role, _ in got.traces if t.first.correct)


def test_silent_feedback_gives_loses_of_half_confidence():
    got = collect(build(**{"rollout.feedback": "none"}))
    assert all(len(trace.attempts) == 1 for trace, _, _ in got.traces)
    assert {confidence for trace, _, confidence in got.traces if not trace.first.correct} == {0.5}
