"""No silent recompilation, and no copies of the base."""

import gc

import jax
import pytest
from run_sizes import small

import spear_jax as sj
from spear_jax.experiment import evaluator
from spear_jax.federated import cohort_training
from spear_jax.federated.aggregation import pipeline
from spear_jax.models.decoder import merged_layers
from spear_jax.rollout import sampler, scorer


@pytest.mark.parametrize("task", ["facts", "reasoned"])
def test_nothing_compiles_after_the_second_round_and_the_base_stays_single(task, tmp_path):
    config = small(task, **{"rounds": 5, "eval.every": 1, "federation.aggregation": "fedavg"})
    programs = (
        sampler._prefill, sampler._decode_until, sampler._take, cohort_training._train,
        pipeline._finish_and_step, merged_layers, evaluator._score_candidates, scorer._score_tokens,
    )  # fmt: skip
    before = held()  # other tests' bases, for example
    run = sj.Run(config, tmp_path, quiet=True, devices=jax.devices()[:1])
    counts, compiled = [], []
    for round in run:
        counts.append([program._cache_size() for program in programs])
        compiled.append(round.metrics["compile/programs"])
    assert counts[1] == counts[2] == counts[3] == counts[4]
    assert compiled[2:] == [0, 0, 0]  # not the least operation
    embed = run.experiment.model.base.embed
    alike = {place for place in held() - before if place[1:] == (embed.shape, embed.dtype)}
    assert {pointer for pointer, *_ in alike} == {embed.unsafe_buffer_pointer()}


def held():
    """(pointer, shape, dtype) of every array on a single device."""
    gc.collect()
    single = [x for x in jax.live_arrays() if len(x.devices()) == 1]
    return {(x.unsafe_buffer_pointer(), x.shape, x.dtype) for x in single}
