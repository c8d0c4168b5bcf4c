"""This system's side: each phase through the functions that a round runs.

All calls into the system stand in this file.
"""

import dataclasses
import functools
import itertools
import logging
import os.path
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from spear_jax.algorithms.base import CommonHyperparams
from spear_jax.algorithms.spear import Spear, SpearSettings
from spear_jax.benchmark.side import Side
from spear_jax.benchmark.workload import Preset, Row, Workload, random_tensor
from spear_jax.core.compilation import Compiles, release_after_compiling
from spear_jax.core.mesh import bytes_on_a_device, make_mesh, replicate, shard_rows
from spear_jax.core.types import Example
from spear_jax.experiment.checkpoint import Checkpoints
from spear_jax.experiment.config import default_config
from spear_jax.experiment.evaluator import Evaluator
from spear_jax.federated import cohort_training, local_training
from spear_jax.federated.aggregation.pipeline import Aggregation, aggregate, init_server
from spear_jax.models import cost_model
from spear_jax.models.config import ModelConfig, parse_config
from spear_jax.models.decoder import Decoder
from spear_jax.models.io.safetensors import SafetensorsFolder
from spear_jax.models.io.tensor_map import DTYPES, MODULES, fill, places
from spear_jax.models.lora import TARGETS, LoraConfig, lora_layers, projection_shapes
from spear_jax.models.params import Adapter, LowRank
from spear_jax.packing import rows as rows_module
from spear_jax.packing.blocks import Keys, choose_block_shape, choose_small, pack_rows
from spear_jax.packing.rows import RowGroup
from spear_jax.rollout.policy import Policy, as_policy
from spear_jax.rollout.prefill import plan_prefill
from spear_jax.rollout.sampler import Sampler
from spear_jax.rollout.scorer import Scorer
from spear_jax.rollout.token_sampling import SamplingConfig

AGGREGATION = Aggregation()
Measured = dict[str, Any]


def build(work: Workload) -> Side:
    """Loads or makes the weights on JAX's first device, and binds the phases."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # as `command_line.run` does
    release_after_compiling()  # as `train` does
    compiles, system = Compiles(), System(work)
    device = jax.devices()[0]
    return Side(
        {
            "rollout": system.rollout,
            "revision": system.revision,
            "evaluation": system.evaluation,
            "local_step": lambda: system.train([steps[:1] for steps in work.rows[:1]])[1],
            "aggregation": system.aggregation,
            "checkpoint": system.checkpoint,
            "round": system.round,
            "cohort": system.cohort,
        },
        None if device.platform == "cpu" else lambda: device.memory_stats()["peak_bytes_in_use"],
        compiles.take,
    )


class RandomTensors:
    """The weights of a config out of `random_tensor`, as a source that `fill` reads."""

    where = "random weights"

    def __init__(self, config: ModelConfig):
        self._shapes = {name: place.shape for place in places(config) for name in place.tensors}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        return random_tensor(name, self._shapes[name])


class Labels:
    """A renderer's stand-in: option number i, named str(i), is the i-th given token."""

    def __init__(self, options: list[int]):
        self.options = options

    def continuation(self, label: str, header: str = "") -> list[int]:
        return [self.options[int(label)]]


class System:
    """The frozen parts and the phases.

    A phase takes the global adapter as it was built, and changes nothing.
    """

    def __init__(self, work: Workload):
        preset = work.preset
        config = parse_config(preset.shape)
        lora = LoraConfig(preset.rank, 2.0 * preset.rank, 0.0, TARGETS)
        self.work, self.preset = work, preset
        self.decoder = Decoder(config, lora, preset.remat, preset.attention)
        self.mesh = make_mesh(jax.devices()[:1])
        source = (
            SafetensorsFolder(pathlib.Path(preset.model)) if preset.model else RandomTensors(config)
        )
        self.base = replicate(fill(config, source, preset.dtype), self.mesh)
        self.lora = replicate(random_adapter(config, lora), self.mesh)
        self.state = init_server(AGGREGATION, self.lora, {}, jax.random.key(0))
        self.algorithm, self.local = spear(preset), local_config(preset)
        self.rate = np.float32(preset.rate)
        steps = [[step_groups(step)] for client in work.rows for step in client]
        longest = max(len(row.prompt) for client in work.rows for step in client for row in step)
        limit = cost_model.filling_tokens(config)
        slots = max(len(groups) for (groups,) in steps)
        prompts = sum(work.prompts, [])
        # a prompt keeps a token of its own behind the shared prefix
        shared_prefix = os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1]
        self.shape = choose_block_shape(
            steps, 1, 1, longest, preset.new_tokens, limit, slots, shared_prefix
        )
        small = choose_small(steps, self.shape)
        self.small = None if small == self.shape or self.local.clients_at_once > 1 else small
        self.folder = tempfile.TemporaryDirectory()
        self.checkpoints = Checkpoints(pathlib.Path(self.folder.name), keep_last=1, keep_best=0)
        self.rounds = itertools.count(1)
        self.cohort_size = 0

    def policy(self) -> Policy:
        """Returns the base with the adapter, as rollouts take it."""
        return as_policy(self.base, self.lora, self.decoder.lora, "none")

    def generate(self, policy: Policy, prompts: list[list[list[int]]]) -> Measured:
        """Generates for all clients' prompts in one batch.

        Returns: the completions, and the padding of prompts and completions.
        """
        flat, new = [prompt for client in prompts for prompt in client], self.preset.new_tokens
        keys = np.random.default_rng(0).integers(0, 1 << 32, (len(flat), 2), np.uint32)
        shared_prefix = os.path.commonprefix(flat)
        sampler, sampling = self.sampler(shared_prefix), self.sampling(len(flat))
        done = sampler.generate(policy.lora, policy.base, flat, keys, sampling)
        plan, batches = plan_prefill(
            sampling, [range(len(flat))], flat, 1, sampler.shapes, len(shared_prefix)
        )
        # all completions are of one length, and end together
        fills = -(-len(batches) // (plan.rows // plan.batch))
        held = fills * plan.rows * new + len(batches) * plan.pack_shape.tokens
        return {
            "answers": [completion.tokens for completion in done],
            "padding": 1 - sum(len(prompt) - len(shared_prefix) + new for prompt in flat) / held,
        }

    def sampler(self, shared_prefix: list[int]) -> Sampler:
        """Builds a sampler with arrays where an experiment has them.

        Placed in another way they would be another program's.
        """
        place, spread = (functools.partial(put, mesh=self.mesh) for put in (shard_rows, replicate))
        return Sampler(self.decoder, place, spread=spread, shared_prefixes=[shared_prefix])

    def sampling(self, rows: int) -> SamplingConfig:
        """Returns how up to so many prompts are completed at once."""
        return sampling_config(self.preset, rows, bytes_on_a_device(self.base))

    def rollout(self) -> Measured:
        return self.generate(self.policy(), self.work.prompts)

    def revision(self) -> Measured:
        return self.generate(self.policy(), self.work.revisions)

    def evaluation(self) -> Measured:
        names = tuple(map(str, range(len(self.work.options))))
        questions = self.work.questions
        sampler = self.sampler(os.path.commonprefix(questions))
        evaluator = Evaluator(
            task=None,
            renderer=Labels(self.work.options),
            sampler=sampler,
            scorer=Scorer(self.decoder, sampler.shapes),
            examples=[Example("", "", names, names, 0) for _ in questions],
            prompts=questions,
            method="choice",
            sampling=self.sampling(1),
            rows=min(len(questions), default_config().eval.rows),
        )
        scores = evaluator.choice_scores(Policy(self.base, self.lora))
        return {"choices": np.argmax(scores, axis=1).tolist()}

    def train(self, rows: list[list[list[Row]]]) -> tuple[Adapter, jax.Array, Measured]:
        """Runs every client's optimiser steps.

        Args: rows: [C][S] lists of rows.
        Returns: Σ w θ and Σ w over clients, and the mean loss over all steps with the padding of
            the rows.
        """
        at_once = min(self.local.clients_at_once, len(rows))
        local = dataclasses.replace(self.local, clients_at_once=at_once)
        small = self.small if at_once == 1 else None
        keys = Keys()
        blocks = [
            [pack_rows([step_groups(step)], self.shape, keys) for step in client] for client in rows
        ]
        depth = max(len(step) for client in blocks for step in client)
        count = len(rows)
        # without dropout no key is read
        members = np.zeros((count, 2), np.uint32), np.ones(count, np.float32), np.ones(count, bool)
        shared = local_training.Broadcast(self.lora, self.base, (), {}, self.rate)
        packed = cohort_training.Rows(blocks, depth, self.shape, small)
        trained = cohort_training.train(
            self.algorithm, self.decoder, local, self.mesh, AGGREGATION, shared, packed, members
        )
        jax.block_until_ready(trained.reduced)
        loss = trained.means["loss"].total.sum() / trained.means["loss"].count.sum()
        measured = {"loss": float(loss), "padding": 1 - trained.tokens / trained.read}
        return trained.reduced, measured

    def aggregation(self) -> Measured:
        weight = np.ones(self.preset.clients, np.float32)
        total = _weighted_sum([self.lora] * self.preset.clients, weight)
        state, _ = aggregate(AGGREGATION, self.state, (total, weight.sum()))
        jax.block_until_ready(state.lora)
        return {}

    def checkpoint(self) -> Measured:
        self.checkpoints.save(self.state.replace(round=np.int32(next(self.rounds))), {}, {})
        self.checkpoints.wait()
        return {}

    def round(self) -> Measured:
        policy = self.policy()
        self.generate(policy, self.work.prompts)
        self.generate(policy, self.work.revisions)
        del policy  # as in a round, the merged weights are not held while training
        return self.train_and_aggregate(self.preset.clients)

    def cohort(self, size: int) -> Measured:
        """Runs `train_and_aggregate`, with the programs of the size before dropped.

        Their memory would count as this size's.
        """
        if size != self.cohort_size:
            jax.clear_caches()
        self.cohort_size = size
        return self.train_and_aggregate(size)

    def train_and_aggregate(self, size: int) -> Measured:
        """Runs a round's second half for any number of clients, which repeat the workload's."""
        rows = [self.work.rows[client % self.preset.clients] for client in range(size)]
        reduced, measured = self.train(rows)
        state, _ = aggregate(AGGREGATION, self.state, reduced)
        jax.block_until_ready(state.lora)
        return measured


@jax.jit
def _weighted_sum(adapters: list[Adapter], weight: jax.Array) -> Adapter:
    """Returns Σ w θ, which `train_cohort` accumulates as clients finish."""
    return jax.tree.map(
        lambda *leaves: sum(w * leaf for w, leaf in zip(weight, leaves, strict=True)), *adapters
    )


def random_adapter(config: ModelConfig, lora: LoraConfig) -> Adapter:
    """Builds the adapter out of `random_tensor` by PEFT's names, as `init_lora` lays it out."""

    def stack(target: str, side: str, shape: tuple[int, int]) -> np.ndarray:
        names = [
            f"layers.{i}.{MODULES[target]}.lora_{side}.weight"
            for i in range(lora_layers(lora, config))
        ]
        return np.stack([random_tensor(name, shape).T for name in names])

    shapes = projection_shapes(config)
    pairs = {
        target: LowRank(
            a=stack(target, "A", (lora.rank, shapes[target][0])),
            b=stack(target, "B", (shapes[target][1], lora.rank)),
        )
        for target in lora.targets
    }
    return Adapter(**pairs)


def sampling_config(preset: Preset, rows: int, weights: int) -> SamplingConfig:
    """Returns the sampling without EOS, so that every completion has exactly new_tokens.

    A batch has as many rows as the config's memory allows. Args: weights: bytes of the base.
    """
    itemsize = DTYPES[preset.dtype].itemsize
    model, megabytes = parse_config(preset.shape), default_config().rollout.kv_cache_mb
    limits = cost_model.generation_limits(model, itemsize, megabytes, rows, weights, 1)
    return SamplingConfig(
        max_new_tokens=preset.new_tokens,
        temperature=preset.temperature,
        top_k=0,
        top_p=preset.top_p,
        eos_ids=(),
        pad_id=0,
        max_rows=limits.rows,
        max_tokens=limits.tokens,
        read_tokens=limits.read_tokens,
        steps_per_check=limits.steps_per_check,
    )


def spear(preset: Preset) -> Spear:
    """Builds the method with the preset's numbers."""
    settings = dataclasses.replace(
        SpearSettings(), lose_weight=preset.lose_weight, margin=preset.margin
    )
    common = CommonHyperparams(
        preset.prompts, preset.steps, 1, preset.wins, preset.new_tokens, preset.temperature, ()
    )
    return Spear(settings, common)


def local_config(preset: Preset) -> local_training.LocalConfig:
    """Returns local training by the config's defaults.

    They are AdamW, clipped at 1, no decay, no regulariser.
    """
    train = default_config().train
    return local_training.LocalConfig(
        clients_at_once=preset.clients_at_once or preset.clients,
        normalize=train.normalize,
        max_grad_norm=train.max_grad_norm,
        weight_decay=train.weight_decay,
        anchor_weight=train.anchor_weight,
        anchor_gradient=train.anchor_gradient,
        prox=0.0,
        ema_decay=train.ema_decay,
        head_chunk=train.head_chunk,
    )


def step_groups(rows: list[Row | None]) -> list[RowGroup]:
    """Returns an optimiser step's rows as the system has them; every completion token counts."""
    return [(training_row(row),) for row in rows if row]


def training_row(row: Row) -> rows_module.TrainingRow:
    """Returns one row, with all of its completion tokens in use."""
    return rows_module.TrainingRow(
        row.prompt, row.completion, np.ones(len(row.completion), bool), row.confidence, row.label
    )
