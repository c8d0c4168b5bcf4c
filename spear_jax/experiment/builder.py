"""From a config to everything a run needs, with every check made before anything compiles."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from spear_jax.algorithms import ALGORITHMS, build_algorithm
from spear_jax.algorithms.base import Algorithm
from spear_jax.core.errors import UserError, unknown
from spear_jax.core.mesh import (
    CLIENTS,
    MODEL,
    base_placer,
    broadcast_from_main,
    make_mesh,
    replicate,
    shard_rows,
)
from spear_jax.core.rng import path_rng, purpose
from spear_jax.core.types import Cohort, Example
from spear_jax.experiment import tokenized_data
from spear_jax.experiment.config import check_config, import_own
from spear_jax.experiment.data import build_task, split_clients
from spear_jax.experiment.evaluator import Evaluator
from spear_jax.federated import local_training
from spear_jax.federated.aggregation.server_optimizer import ServerConfig, check_server, init_server
from spear_jax.federated.client_sampling import sample_cohort
from spear_jax.federated.schedule import round_rate
from spear_jax.federated.state import ServerState
from spear_jax.models import cost_model
from spear_jax.models.attention import check_kernel
from spear_jax.models.decoder import Decoder
from spear_jax.models.io import peft
from spear_jax.models.io.huggingface import LoadedModel, load_model
from spear_jax.models.io.quantize_weights import quantiser
from spear_jax.models.lora import LoraConfig, check_lora, init_lora
from spear_jax.models.params import Adapter
from spear_jax.packing.blocks import choose_block_shape, choose_small
from spear_jax.packing.rows import prompts
from spear_jax.packing.shape_buckets import BlockShape
from spear_jax.rollout.policy import Policy, as_policy
from spear_jax.rollout.prompts import PromptRenderer
from spear_jax.rollout.sampler import Sampler
from spear_jax.rollout.scorer import scorer
from spear_jax.rollout.token_sampling import SamplingConfig
from spear_jax.rollout.worker import RolloutWorker
from spear_jax.tasks.base import Task
from spear_jax.tasks.loading import load_examples

TINY = pathlib.Path(__file__).parents[1] / "assets" / "tiny"
LORA_INIT = purpose("lora init")
COHORT = purpose("cohort")


@dataclasses.dataclass
class Experiment:
    """A built experiment: the frozen parts. What changes from round to round is `ServerState`.

    Attributes:
        parts: for each client, the positions of its examples in `worker.examples`.
        prompt_length: P of training batches, the longest training prompt.
        completion_length: T of training batches.
        adapter: what round 1 starts from; None is a new adapter.
    """

    config: ml_collections.ConfigDict
    model: LoadedModel
    decoder: Decoder
    mesh: Mesh
    worker: RolloutWorker
    algorithm: Algorithm
    evaluator: Evaluator
    parts: list[np.ndarray]
    local: local_training.LocalConfig
    server: ServerConfig
    prompt_length: int
    completion_length: int
    adapter: Adapter | None

    def initial_state(self) -> ServerState:
        """The server before round 1."""
        key, lora = jax.random.key(self.config.seed), self.adapter
        if lora is None:
            lora = init_lora(
                jax.random.fold_in(key, LORA_INIT), self.decoder.lora, self.model.config
            )
        kept = self.algorithm.init_state(lora, len(self.worker.examples), self.completion_length)
        if self.server.rule == "local":  # every client has an adapter and a memory of its own
            copies = self.config.federation.num_clients
            lora = jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape)), lora)
            kept = jax.tree.map(lambda x: np.broadcast_to(x, (copies, *np.shape(x))).copy(), kept)
        return init_server(self.server, lora, kept, key)

    def policies(self, lora: Adapter) -> list[Policy]:
        """What to evaluate: the global policy, or under `local` every client's."""
        count = len(self.parts) if self.server.rule == "local" else 0
        own = [jax.tree.map(lambda x, c=c: x[c], lora) for c in range(count)] or [lora]
        if self.evaluator.method == "generate":
            return list(map(self.worker.merge, own))
        return [
            Policy(self.model.base, self.on_devices(one)) for one in own
        ]  # one pass is not worth a merged copy

    def training_shapes(self, steps: list, slots: int) -> tuple[BlockShape, BlockShape | None]:
        """The block size for local training, from the micro-batches of the first steps (every few
        of them, where many), and a smaller one for blocks that fit it (None: they do not, or
        clients train together). slots: items that no step exceeds.
        """
        some = [step for step in steps if any(step)]
        shapes, shared_prefix = (
            self.worker.sampler.shapes,
            self.worker.sampler.shared_prefix(prompts(some)),
        )
        some, name = (
            some[:: 1 + len(some) // 32],
            f"train {len(shared_prefix)}" if shared_prefix else "train",
        )
        most = self.prompt_length, self.completion_length, self.config.train.block_tokens, slots
        rows_per_group = self.algorithm.rows_per_group, self.algorithm.num_packs
        shape = shapes.shape(
            name, lambda: choose_block_shape(some, *rows_per_group, *most, shared_prefix)
        )
        if self.local.clients_at_once > 1 or self.mesh.shape[MODEL] > 1:
            return shape, None  # all that train together would go through both
        small = shapes.shape(f"{name} small", lambda: choose_small(some, shape))
        return shape, None if small == shape else small

    def on_devices(self, tree: Any) -> Any:
        """A tree of host arrays on every device of the mesh."""
        return replicate(tree, self.mesh)

    def cohort(self, round: int) -> Cohort:
        """This round's clients and their host-side random streams; a function of (seed, round)
        alone.
        """
        fed, seed = self.config.federation, self.config.seed
        sizes = np.array([len(part) for part in self.parts], float)
        rng = path_rng(seed, COHORT, round)
        chosen = sample_cohort(fed.num_clients, fed.clients_per_round, sizes, fed.sampling, rng)

        def rngs(slot: int, name: str) -> np.random.Generator:
            client = chosen[slot]
            path = (round + client,) if fed.colliding_streams else (round, client)
            return path_rng(seed, purpose(name), *path)

        return Cohort(round, chosen, [self.parts[c] for c in chosen], rngs)

    def rate(self, round: int, tokens: float, seconds: float) -> float:
        """The learning rate of a round. Where a budget is set, its used share sets the pace, unless
        the rounds run ahead.

        Args: tokens: generated by the end of this round, as far as known; seconds: used before it.
        """
        train, budget, rounds = self.config.train, self.config.budget, self.config.rounds
        used = max(
            tokens / budget.tokens if budget.tokens else 0.0,
            seconds / budget.seconds if budget.seconds else 0.0,
        )
        return round_rate(
            max(round, min(1.0, used) * rounds),
            self.config.rounds,
            train.rate,
            train.rate_min,
            train.warmup_ratio,
            train.warmup,
        )


def build(config: ml_collections.ConfigDict, devices: list[jax.Device] | None = None) -> Experiment:
    """Builds an experiment on the given devices (all by default); raises UserError for every
    mistake that can be known before compiling.
    """
    import_own(config.imports)
    check_config(config)
    if config.algorithm.name not in ALGORITHMS:
        raise unknown("algorithm", config.algorithm.name, ALGORITHMS)
    if config.rollout.feedback == "human" and jax.process_count() > 1:
        raise UserError(
            "rollout.feedback is human, but this run has several processes, each of which would "
            "ask; start it without "
            "--distributed, or set --config.rollout.feedback=oracle."
        )
    settings = _server_config(config)
    task = build_task(config)
    train_set = load_examples(task, "train", config.data.path, config.data.train_limit)
    test_set = load_examples(task, "test", config.data.path, config.eval.limit)
    parts = split_clients(config, train_set)
    mesh = make_mesh(devices, config.devices.model)
    model = open_model(config, mesh)
    algorithm = build_algorithm(config, model.eos_ids)
    algorithm.check(task, train_set, config.rollout.feedback)
    check_kernel(config.attention, jax.default_backend(), config.dtype, model.config.head_width)
    decoder = Decoder(
        model.config, _lora_config(config, model), config.train.remat, config.attention
    )
    adapter = _start_adapter(config, decoder)
    evaluator = build_evaluator(config, task, test_set, model, decoder, mesh)
    used = sorted({int(i) for part in parts for i in part})
    first, revise, _ = _sampling(config, model)
    worker = tokenized_data.build_worker(
        config, algorithm, evaluator, train_set, used, first, revise
    )
    prompt_length = tokenized_data.prompt_length(algorithm, worker, used)
    completion_length = tokenized_data.completion_length(algorithm, worker)
    worker.scorer = scorer(evaluator, prompt_length, completion_length, config.rollout.max_rows)
    local = _local_config(
        config,
        mesh.shape[CLIENTS],
        bytes_per_client(config, decoder, algorithm, prompt_length, completion_length),
    )
    worker.merge = lambda lora: as_policy(
        model.base, replicate(lora, mesh), decoder.lora, config.quantize
    )
    return Experiment(
        config=config,
        model=model,
        decoder=decoder,
        mesh=mesh,
        worker=worker,
        algorithm=algorithm,
        evaluator=evaluator,
        parts=parts,
        local=local,
        server=settings,
        prompt_length=prompt_length,
        completion_length=completion_length,
        adapter=adapter,
    )


def open_model(config: ml_collections.ConfigDict, mesh: Mesh) -> LoadedModel:
    """The config's model, its weights on the mesh; "tiny" is the embedded one."""
    place = quantiser(config.quantize, base_placer(mesh))
    return load_model(str(TINY) if config.model == "tiny" else config.model, config.dtype, place)


def build_evaluator(
    config: ml_collections.ConfigDict,
    task: Task,
    examples: list[Example],
    model: LoadedModel,
    decoder: Decoder,
    mesh: Mesh,
) -> Evaluator:
    """The evaluator of a test set, its prompts rendered and checked."""
    place, spread = (
        functools.partial(shard_rows, mesh=mesh),
        functools.partial(replicate, mesh=mesh),
    )
    renderer = PromptRenderer(
        model.tokenizer, config.data.chat_template, _prompt_limit(config, model)
    )
    method = task.scoring if config.eval.method == "auto" else config.eval.method
    limit = config.data.max_response_tokens
    return Evaluator(
        task=task,
        renderer=renderer,
        decoder=decoder,
        sampler=Sampler(
            decoder,
            place,
            mesh.shape[CLIENTS],
            None,
            spread,
            renderer.shared_prefixes(task, examples),
        ),
        examples=examples,
        prompts=[renderer.prompt(task, example) for example in examples],
        method=method,
        responses=[renderer.response(task, e, limit)[0] for e in examples]
        if method == "likelihood"
        else (),
        sampling=_sampling(config, model)[2],
        rows=config.eval.rows,
        place=place,
        devices=mesh.shape[CLIENTS],
    )


def _lora_config(config: ml_collections.ConfigDict, model: LoadedModel) -> LoraConfig:
    settings = config.lora
    lora = LoraConfig(
        settings.rank,
        settings.alpha,
        settings.dropout,
        tuple(settings.targets),
        settings.last_layers,
    )
    check_lora(lora, model.config)
    return lora


def _start_adapter(config: ml_collections.ConfigDict, decoder: Decoder) -> dict | None:
    """The adapter of lora.init_from, checked against the config's own settings."""
    folder = config.lora.init_from
    if not folder:
        return None
    tree, found = peft.load_adapter(folder, decoder.config)
    for name in ("rank", "alpha", "targets", "last_layers"):
        there, wanted = getattr(found, name), getattr(decoder.lora, name)
        if name == "targets":
            there, wanted = tuple(sorted(there)), tuple(sorted(wanted))
        if there != wanted:
            raise UserError(
                f"the adapter {folder!r} has {name} {there}, but lora.{name} is {wanted}; "
                f"set --config.lora.{name} to the adapter's, or leave lora.init_from empty."
            )
    return tree


def _prompt_limit(config: ml_collections.ConfigDict, model: LoadedModel) -> int:
    longest = max(
        config.rollout.max_new_tokens,
        config.rollout.max_new_tokens_revision,
        config.eval.max_new_tokens,
    )
    shape = model.config.max_positions - longest
    if shape < 8:
        raise UserError(
            f"completions of {longest} tokens leave no room for prompts in the model's "
            f"{model.config.max_positions} "
            "positions; lower rollout.max_new_tokens, rollout.max_new_tokens_revision or "
            "eval.max_new_tokens."
        )
    return min(config.data.max_prompt_tokens, shape)


def _sampling(config: ml_collections.ConfigDict, model: LoadedModel) -> tuple[SamplingConfig, ...]:
    """How first answers, revisions and greedy evaluations are drawn."""
    rollout = config.rollout
    tokens, read = cost_model.generation_tokens(
        model.config, model.base.embed.dtype.itemsize, rollout.cache_mb
    )
    first = SamplingConfig(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        eos_ids=model.eos_ids,
        pad_id=model.pad_id,
        max_rows=rollout.max_rows,
        max_tokens=tokens,
        read_tokens=read,
    )
    revise = dataclasses.replace(first, max_new_tokens=rollout.max_new_tokens_revision)
    greedy = dataclasses.replace(first, temperature=0.0, max_new_tokens=config.eval.max_new_tokens)
    return first, revise, greedy


def _local_config(
    config: ml_collections.ConfigDict, devices: int, each: int
) -> local_training.LocalConfig:
    """The settings of local training; raises UserError where the clients that train together cannot
    fit.

    Args: each: bytes of one client.
    """
    train, fed = config.train, config.federation
    free = cost_model.device_bytes()
    at_once = fed.clients_at_once or cost_model.fitting(
        -(-fed.clients_per_round // devices), each, free
    )
    if fed.aggregation == "local":
        at_once = 1  # a local-only client trains alone
    at_once = broadcast_from_main(at_once)
    cost_model.check_memory(at_once, each, free)
    return local_training.LocalConfig(
        clients_at_once=at_once,
        normalize=train.normalize,
        clip=train.clip,
        weight_decay=train.weight_decay,
        anchor_weight=train.anchor_weight,
        anchor_gradient=train.anchor_gradient,
        prox=fed.prox,
        ema_decay=train.ema_decay,
        head_chunk=train.head_chunk,
    )


def bytes_per_client(
    config: ml_collections.ConfigDict, decoder: Decoder, algorithm: Algorithm, p: int, t: int
) -> int:
    """An estimate for one client. Args: p, t: the longest prompt and completion."""
    lora = jax.eval_shape(
        functools.partial(init_lora, lora=decoder.lora, model=decoder.config), jax.random.key(0)
    )
    adapter = sum(leaf.size * 4 for leaf in jax.tree.leaves(lora))
    common = algorithm.common
    rows = (
        4 * common.accumulation * common.batch_size * algorithm.rows_per_group
    )  # wins and loses, or a group's answers
    tokens = max(
        min(config.train.block_tokens, rows * (p + t)), p + max(2, algorithm.rows_per_group) * t
    )
    return cost_model.bytes_per_client(
        decoder.config, tokens, p + t, config.train.head_chunk, adapter, decoder.remat
    )


def _server_config(config: ml_collections.ConfigDict) -> ServerConfig:
    fed = config.federation
    settings = ServerConfig(fed.aggregation, fed.server_rate, fed.beta1, fed.beta2, fed.tau)
    check_server(settings)
    return settings
