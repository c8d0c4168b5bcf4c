"""From settings to everything that a run needs, in one pass and before anything compiles.

Each part is whole when it is built: parse, data, model, method, feedback, prompts, tokens, shapes,
sampler and scorer, worker, federation, experiment. Nothing is patched in afterwards.
"""

import dataclasses
import datetime
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from spear_jax.algorithms import ALGORITHMS, build_algorithm
from spear_jax.algorithms.base import Algorithm
from spear_jax.core.errors import UserError, shown
from spear_jax.core.mesh import (
    CLIENTS,
    MODEL,
    base_placer,
    broadcast_from_main,
    bytes_on_a_device,
    make_mesh,
    replicate,
    shard_rows,
)
from spear_jax.core.rng import purpose
from spear_jax.core.types import Example, Progress, no_progress
from spear_jax.experiment import config as configs
from spear_jax.experiment import device_memory
from spear_jax.experiment.aggregation import (
    build_aggregation,
    build_asynchronous,
    build_participation,
    check_aggregation,
)
from spear_jax.experiment.config import Settings
from spear_jax.experiment.data import build_task, split_clients, split_root, with_oracle
from spear_jax.experiment.evaluator import Evaluator
from spear_jax.federated import asynchronous, ditto
from spear_jax.federated.aggregation.attacks import attackers
from spear_jax.federated.aggregation.lora_rules.base import LoraRule
from spear_jax.federated.aggregation.pipeline import (
    init_server,
)
from spear_jax.federated.aggregation.reducers import ClientTransform, Reducer
from spear_jax.federated.aggregation.robust.fltrust import FLTrust
from spear_jax.federated.federation import Federation, broadcast_to_clients
from spear_jax.federated.local_training import optimiser
from spear_jax.federated.schedule import Schedule
from spear_jax.federated.state import ServerState
from spear_jax.feedback.attacks import ON_FEEDBACK, with_attackers
from spear_jax.feedback.base import Feedback
from spear_jax.feedback.registry import get_feedback
from spear_jax.models import cost_model
from spear_jax.models.attention import check_kernel
from spear_jax.models.decoder import Decoder
from spear_jax.models.io import peft
from spear_jax.models.io.huggingface import LoadedModel, load_model
from spear_jax.models.io.quantize_weights import quantiser
from spear_jax.models.lora import LoraConfig, check_lora, init_lora
from spear_jax.models.params import Adapter
from spear_jax.packing.shape_buckets import ShapeBuckets
from spear_jax.rollout.policy import Policy, as_policy
from spear_jax.rollout.prompts import PromptRenderer
from spear_jax.rollout.sampler import Sampler
from spear_jax.rollout.scorer import Scorer
from spear_jax.rollout.token_sampling import SamplingConfig
from spear_jax.rollout.tokenized_data import tokenize
from spear_jax.rollout.worker import RolloutWorker
from spear_jax.tasks.base import Task
from spear_jax.tasks.loading import load_examples

TINY = pathlib.Path(__file__).parents[1] / "assets" / "tiny"
LORA_INIT = purpose("lora init")
# arguments of the template that are not the user's
RESERVED = {
    "messages", "conversation", "tokenize", "add_generation_prompt", "continue_final_message",
    "chat_template", "tools", "documents", "return_dict", "return_tensors", "strftime_now",
}  # fmt: skip
LABEL_TOKENS = 8  # room behind a prompt for an option's label


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A built experiment: the frozen parts. What changes from round to round is `ServerState`.

    Attributes:
        shapes: the padded sizes that the run has opened; a run that goes on loads them again.
        adapter: what round 1 starts from; None is a new adapter.
    """

    settings: Settings
    model: LoadedModel
    federation: Federation
    evaluator: Evaluator
    shapes: ShapeBuckets
    adapter: Adapter | None

    def initial_state(self) -> ServerState:
        """Returns the server before round 1."""
        federation, adapter = self.federation, self.adapter
        key = jax.random.key(self.settings.seed)
        if adapter is None:
            decoder = federation.decoder
            adapter = init_lora(jax.random.fold_in(key, LORA_INIT), decoder.lora, decoder.config)
        worker = federation.worker
        state = federation.algorithm.init_state(
            adapter, len(worker.examples), worker.data.completion_length
        )
        if federation.local_only:  # every client has an adapter and a state of its own
            copies = len(federation.clients)
            adapter = jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape)), adapter)
            state = broadcast_to_clients(state, copies)
        clients = 0 if federation.local_only else len(federation.clients)
        server = init_server(federation.aggregation, adapter, state, key, clients)
        kept, drift = dict(server.aggregation_state), federation.aggregation.drift
        if federation.participation is not None:
            kept["clock"] = np.zeros((), np.float64)
        if drift is not None:
            kept |= drift.init(adapter, clients, optimiser(federation.local))
        if federation.asynchronous is not None:
            kept |= asynchronous.init(adapter, federation.clients_per_round)
        if federation.ditto is not None:
            kept |= ditto.init(adapter, clients)
        return dataclasses.replace(server, aggregation_state=kept)

    def adapters(self, state: ServerState) -> list[Adapter]:
        """Returns the global adapter, or every client's where each has its own."""
        federation, adapter = self.federation, state.lora
        if federation.local_only:
            count = len(federation.clients)
            return [jax.tree.map(lambda x, c=c: x[c], adapter) for c in range(count)]
        if federation.ditto is not None:
            own, count = state.aggregation_state["personal"], len(federation.clients)
            return [jax.tree.map(lambda x, c=c: x[c], own) for c in range(count)]
        return federation.aggregation.rule.policies(adapter, state.aggregation_state)

    def policies(self, state: ServerState) -> list[Policy]:
        """Returns what to evaluate: the global policy, or every client's where each has its own."""
        return self._policies_of(self.adapters(state), state)

    def policy_of(self, adapter: Adapter, state: ServerState) -> Policy:
        """Returns the policy of an adapter, on the base of that state."""
        return self._policies_of([adapter], state)[0]

    def _policies_of(self, own: list[Adapter], state: ServerState) -> list[Policy]:
        federation = self.federation.on_base(state.aggregation_state)
        if self.evaluator.method == "generate":
            return list(map(federation.worker.policy, own))
        # one pass is not worth a merged copy
        return [Policy(federation.base, federation.on_devices(one)) for one in own]


@dataclasses.dataclass(frozen=True)
class OwnParts:
    """Parts passed as objects, in place of those that the config names.

    Attributes:
        client: the id of the only client whose data is here: all of the training set is its own,
            and there is no test set. None: the clients share the training set.
    """

    task: Task | None = None
    feedback: Feedback | None = None
    reducer: Reducer | None = None
    lora_rule: LoraRule | None = None
    optimizer: optax.GradientTransformation | None = None
    transforms: tuple[ClientTransform, ...] = ()
    client: int | None = None


def build(
    config: ml_collections.ConfigDict,
    devices: list[jax.Device] | None = None,
    progress: Progress = no_progress,
    own: OwnParts = OwnParts(),
) -> Experiment:
    """Builds an experiment.

    Args:
        devices: all by default.
        progress: called with (stage, rows finished since the last call, rows of the stage).
        own: parts passed as objects.
    Raises: UserError for every mistake that can be known before compiling.
    """
    configs.import_own(config.imports)
    settings = configs.parse(config)
    task = own.task or build_task(settings)
    feedback = own.feedback or get_feedback(
        settings.rollout.feedback, task, settings.rollout.hint_words, settings.feedback
    )
    check_processes(feedback)
    check_finetuning(settings, feedback)
    train_set = load_examples(task, "train", settings.data.path, settings.data.train_limit)
    test_set = train_set
    if own.client is None:
        test_set = load_examples(task, "test", settings.data.path, settings.eval.limit)
    trusts = isinstance(own.reducer, FLTrust) or settings.federation.reducer == "fltrust"
    if settings.attack.kind in ON_FEEDBACK:
        bad = attackers(settings.seed, settings.federation.num_clients, settings.attack.fraction)
        feedback = with_attackers(
            feedback, settings.attack.kind, bad, settings.attack.target, train_set
        )
    clients = split_clients(settings, train_set, own.client)
    if trusts:
        clients = split_root(settings, clients)
        feedback = with_oracle(settings, feedback)
    mesh = make_mesh(devices, settings.devices.model)
    model = open_model(settings, mesh)
    algorithm = build_algorithm(settings, model.eos_ids)
    if feedback.judges:  # the task need not grade then
        check_verdicts(algorithm)
    else:
        algorithm.check(task, train_set, settings.rollout.feedback)
    decoder = build_decoder(settings, model)
    adapter = starting_adapter(settings, decoder)
    check_frozen(settings, adapter)
    evaluator = build_evaluator(settings, task, test_set, model, decoder, mesh, progress)
    worker = build_worker(
        settings, algorithm, feedback, evaluator, train_set, clients, model, mesh, progress
    )
    decoder = device_memory.choose_remat(
        settings, decoder, algorithm, worker.data, model, mesh.shape[CLIENTS]
    )
    shapes = evaluator.scorer.shapes
    federation = build_federation(
        settings, algorithm, worker, decoder, model, mesh, shapes, clients, own
    )
    return Experiment(settings, model, federation, evaluator, shapes, adapter)


def build_worker(
    settings: Settings,
    algorithm: Algorithm,
    feedback: Feedback,
    evaluator: Evaluator,
    examples: list[Example],
    clients: list[np.ndarray],
    model: LoadedModel,
    mesh: Mesh,
    progress: Progress,
) -> RolloutWorker:
    """Builds the rollout worker: the training set as token ids, with the evaluator's renderer,
    sampler and scorer.
    """
    first, revise, _ = sampling_configs(settings, model, mesh)
    decoder = evaluator.scorer.decoder
    return RolloutWorker(
        task=evaluator.task,
        renderer=evaluator.renderer,
        feedback=feedback,
        sampler=evaluator.sampler,
        scorer=evaluator.scorer,
        examples=examples,
        data=tokenize(
            evaluator.task,
            evaluator.renderer,
            feedback,
            examples,
            sorted({int(i) for own in clients for i in own}),
            algorithm.gold,
            algorithm.layout.prompts,
            first.max_new_tokens,
            longest_sampled(algorithm, first, revise),
            settings.data.max_response_tokens,
        ),
        first=first,
        revise=revise,
        num_revisions=settings.rollout.num_revisions,
        policy=lambda lora: as_policy(
            model.base, replicate(lora, mesh), decoder.lora, settings.quantize
        ),
        score_rows=settings.rollout.max_concurrent_sequences or RolloutWorker.score_rows,
        progress=progress,
    )


def check_verdicts(algorithm: Algorithm) -> None:
    """Raises UserError for a method whose wins and loses people cannot decide."""
    if not algorithm.takes_verdicts:
        able = [name for name, method in ALGORITHMS.items() if method.takes_verdicts]
        raise UserError(
            f"feedback.asks is 'verdict', but method {algorithm.name!r} grades by the gold answer; set "
            f"--config.feedback.asks=hint, or take one of {', '.join(able)}."
        )
    if algorithm.settings.strict_format:
        raise UserError(
            f"feedback.asks is 'verdict', but {algorithm.name}.strict_format has the task grade what is "
            f"rewritten; set --config.{algorithm.name}.strict_format=False, or feedback.asks=hint."
        )


def check_processes(feedback: Feedback) -> None:
    """Raises UserError where every process of a run would ask somebody."""
    if (feedback.asks_people or feedback.asks_by_id) and jax.process_count() > 1:
        raise UserError(
            f"feedback {type(feedback).__name__!r} asks somebody, but this run has several "
            "processes, each of which would ask; start it without --distributed, or set "
            "--config.rollout.feedback=oracle."
        )


def check_finetuning(settings: Settings, feedback: Feedback) -> None:
    """Raises UserError where clients that train after the last round would ask people."""
    if settings.personal.finetune and feedback.asks_people:
        raise UserError(
            f"personal.finetune is {settings.personal.finetune}, which rolls out after the last round, "
            f"when feedback {type(feedback).__name__!r} asks nobody any more; set "
            "--config.rollout.feedback=oracle, or finetune=0."
        )


def open_model(settings: Settings, mesh: Mesh) -> LoadedModel:
    """Loads the settings' model, its weights on the mesh; "tiny" is the embedded one."""
    place = quantiser(settings.quantize, base_placer(mesh))
    name = str(TINY) if settings.model == "tiny" else settings.model
    return load_model(name, settings.dtype, place)


def build_decoder(settings: Settings, model: LoadedModel) -> Decoder:
    """Builds the decoder with the settings' adapter."""
    kernel = settings.attention_kernel
    check_kernel(kernel, jax.default_backend(), settings.dtype, model.config.head_width)
    given = settings.lora
    lora = LoraConfig(given.rank, given.alpha, given.dropout, given.targets, given.last_layers)
    check_lora(lora, model.config)
    # rollouts and evaluation have no backward pass, and what suits training is not known yet
    remat = "attention" if settings.train.remat == "auto" else settings.train.remat
    return Decoder(model.config, lora, remat, kernel)


def build_renderer(
    settings: Settings, model: LoadedModel, longest: int | None = None
) -> PromptRenderer:
    """Builds the renderer; raises UserError where completions leave no room for prompts.

    Args: longest: of the completions, in tokens; None: the longest of rollouts and evaluation.
    """
    rollout = settings.rollout
    if longest is None:
        longest = max(
            rollout.max_new_tokens, rollout.max_new_tokens_revision, settings.eval.max_new_tokens
        )
    room = model.config.max_positions - longest
    if room < 8:
        raise UserError(
            f"completions of {longest} tokens leave no room for prompts in the model's "
            f"{model.config.max_positions} positions; lower whichever of rollout.max_new_tokens, "
            "rollout.max_new_tokens_revision, eval.max_new_tokens and data.max_response_tokens is "
            "that long."
        )
    limit = min(settings.data.max_prompt_tokens, room)
    arguments, date = template_arguments(settings)
    return PromptRenderer(model.tokenizer, settings.data.chat_template, limit, arguments, date)


def template_arguments(settings: Settings) -> tuple[dict[str, Any], datetime.date]:
    """Returns the chat template's arguments and the date that it is told.

    Raises: UserError for a text that is no JSON object, and for a date of another form.
    """
    text, date = settings.data.chat_template_kwargs, settings.data.date
    try:
        arguments = json.loads(text) if text else {}
        if not isinstance(arguments, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"data.chat_template_kwargs is {shown(text)}; it must be a JSON object, for example "
            "--config.data.chat_template_kwargs='{\"enable_thinking\": false}'."
        ) from error
    taken = RESERVED & arguments.keys()
    if taken:
        raise UserError(
            f"data.chat_template_kwargs sets {min(taken)!r}, which is set here; leave it out."
        )
    try:
        return arguments, datetime.date.fromisoformat(date)
    except ValueError as error:
        raise UserError(
            f"data.date is {shown(date)}; it must be a day such as 2024-07-26. Set "
            "--config.data.date."
        ) from error


def sampling_configs(
    settings: Settings, model: LoadedModel, mesh: Mesh
) -> tuple[SamplingConfig, SamplingConfig, SamplingConfig]:
    """Returns how first answers, revisions and greedy evaluations are sampled."""
    rollout = settings.rollout
    limits = cost_model.generation_limits(
        model.config,
        model.base.embed.dtype.itemsize,
        rollout.kv_cache_mb,
        rollout.max_concurrent_sequences,
        bytes_on_a_device(model.base),
        mesh.shape[CLIENTS],
        mesh.shape[MODEL],
    )
    first = SamplingConfig(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        eos_ids=model.eos_ids,
        pad_id=model.pad_id,
        max_rows=limits.rows,
        max_tokens=broadcast_from_main(limits.tokens),
        read_tokens=limits.read_tokens,
        steps_per_check=limits.steps_per_check,
    )
    revise = dataclasses.replace(first, max_new_tokens=rollout.max_new_tokens_revision)
    greedy = dataclasses.replace(
        first, temperature=0.0, max_new_tokens=settings.eval.max_new_tokens
    )
    return first, revise, greedy


def longest_sampled(algorithm: Algorithm, first: SamplingConfig, revise: SamplingConfig) -> int:
    """Returns the longest sampled completion of a training row, in tokens."""
    encoded_anew = int(getattr(algorithm.settings, "retokenise", False))  # an EOS is then added
    return max(first.max_new_tokens, revise.max_new_tokens) + encoded_anew


def build_evaluator(
    settings: Settings,
    task: Task,
    examples: list[Example],
    model: LoadedModel,
    decoder: Decoder,
    mesh: Mesh,
    progress: Progress = no_progress,
) -> Evaluator:
    """Builds the evaluator of a test set, its prompts rendered and checked, with the sampler, the
    scorer and the shape buckets that the rest of a run shares.
    """
    method = task.scoring if settings.eval.method == "auto" else settings.eval.method
    completions = {
        "generate": settings.eval.max_new_tokens,
        "likelihood": settings.data.max_response_tokens,
        "choice": LABEL_TOKENS,
    }
    renderer = build_renderer(settings, model, completions[method])
    place, spread = (functools.partial(put, mesh=mesh) for put in (shard_rows, replicate))
    count, shapes = mesh.shape[CLIENTS], ShapeBuckets()
    prefixes = renderer.shared_prefixes(task, examples)
    limit, responses = settings.data.max_response_tokens, []
    if method == "likelihood":
        responses = [renderer.response(task, example, limit)[0] for example in examples]
    return Evaluator(
        task=task,
        renderer=renderer,
        sampler=Sampler(decoder, place, count, shapes, spread, prefixes),
        scorer=Scorer(decoder, shapes, place, count),
        examples=examples,
        prompts=[renderer.prompt(task, example) for example in examples],
        method=method,
        sampling=sampling_configs(settings, model, mesh)[2],
        rows=settings.eval.rows,
        responses=responses,
        progress=progress,
    )


def starting_adapter(settings: Settings, decoder: Decoder) -> Adapter | None:
    """Loads the adapter of lora.init_from; None where it is empty.

    Raises: UserError where the adapter differs from the config's own settings.
    """
    folder = settings.lora.init_from
    if not folder:
        return None
    tree, there = peft.load_adapter(folder, decoder.config)
    for name in ("rank", "alpha", "targets", "last_layers"):
        given, wanted = getattr(there, name), getattr(decoder.lora, name)
        if name == "targets":
            given, wanted = tuple(sorted(given)), tuple(sorted(wanted))
        if given != wanted:
            raise UserError(
                f"the adapter {folder!r} has {name} {given}, but lora.{name} is {wanted}; "
                f"set --config.lora.{name} to the adapter's, or leave lora.init_from empty."
            )
    return tree


def check_frozen(settings: Settings, adapter: Adapter | None) -> None:
    """Raises UserError where FFA would freeze an a of zeros, under which nothing can be learnt."""
    if settings.federation.lora_rule != "ffa" or adapter is None:
        return
    if not any(np.any(pair.a) for pair in adapter.by_name().values()):
        raise UserError(
            f"federation.lora_rule is 'ffa', but a of the adapter {settings.lora.init_from!r} is all "
            "zero, so that no update has an effect; take another adapter, or leave lora.init_from empty."
        )


def build_federation(
    settings: Settings,
    algorithm: Algorithm,
    worker: RolloutWorker,
    decoder: Decoder,
    model: LoadedModel,
    mesh: Mesh,
    shapes: ShapeBuckets,
    clients: list[np.ndarray],
    own: OwnParts,
) -> Federation:
    """Builds the federation; raises UserError where the clients that train together cannot fit."""
    fed, train = settings.federation, settings.train
    each = device_memory.bytes_per_client(settings, decoder, algorithm, worker.data)
    devices = mesh.shape[CLIENTS]
    together = device_memory.clients_together(
        settings, model.config, algorithm, worker.data, devices
    )
    aggregation = build_aggregation(
        settings, decoder, own.reducer, own.lora_rule, own.optimizer, own.transforms,
        list(map(len, clients)),
    )  # fmt: skip
    check_aggregation(settings, aggregation, algorithm, decoder)
    return Federation(
        algorithm=algorithm,
        worker=worker,
        decoder=decoder,
        base=model.base,
        mesh=mesh,
        shapes=shapes,
        clients=clients,
        local=device_memory.local_config(settings, together, each),
        aggregation=aggregation,
        schedule=Schedule(
            settings.rounds,
            train.learning_rate,
            train.learning_rate_min,
            train.warmup,
            train.warmup_ratio,
            settings.budget.tokens,
            settings.budget.seconds,
        ),
        participation=build_participation(settings),
        asynchronous=build_asynchronous(settings),
        ditto=settings.personal.pull if settings.personal.ditto else None,
        local_only=fed.aggregation == "local",
        clients_per_round=fed.clients_per_round,
        sampling=fed.sampling,
        colliding_streams=fed.colliding_streams,
        max_tokens_per_block=device_memory.max_tokens_per_block(settings, decoder.config),
        seed=settings.seed,
        cohort_limit=settings.privacy.cohort_limit,
    )
