"""The programs that a round of an experiment compiles on a target.

The experiment is put together by the builder's own parts, and a round of it is played by the run's
own code, but for what is drawn (`drawn`). Weights have shapes alone. The model's tokenizer and the
task's files are not read.
"""

import dataclasses
import functools
import itertools
import os.path
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from spear_jax.algorithms import build_algorithm
from spear_jax.algorithms.base import Algorithm
from spear_jax.benchmark import workload
from spear_jax.benchmark.aot import ghosts
from spear_jax.benchmark.aot.drawn import Comments, DrawnSampler, Generation, Graded, Texts, tokens
from spear_jax.benchmark.aot.ghosts import Program, Recorder
from spear_jax.benchmark.aot.targets import Target
from spear_jax.benchmark.workload import Preset, Workload
from spear_jax.core.errors import UserError, unknown
from spear_jax.core.mesh import CLIENTS, base_placer, make_mesh, replicate, shard_rows
from spear_jax.core.types import Example
from spear_jax.experiment import builder, device_memory
from spear_jax.experiment import config as configs
from spear_jax.experiment.builder import Experiment, OwnParts
from spear_jax.experiment.config import Settings
from spear_jax.experiment.data import build_task
from spear_jax.experiment.evaluator import Evaluator
from spear_jax.experiment.presets import MODELS
from spear_jax.federated.round import NOTHING_USED, round_of
from spear_jax.models.config import parse_config, read_config
from spear_jax.models.io.huggingface import LoadedModel, find_folder, load_tokenizer
from spear_jax.models.io.tensor_map import DTYPES, Place, build_params
from spear_jax.packing.shape_buckets import ShapeBuckets
from spear_jax.rollout.policy import Policy, as_policy
from spear_jax.rollout.scorer import Scorer
from spear_jax.rollout.token_sampling import SamplingConfig
from spear_jax.rollout.worker import RolloutWorker

DECODE = "_decode_until"
APART = {"train", "evaluation", "aggregation"}  # what needs nothing of a generation
# what a round's programs are called here; others keep their function's name
NAMES = {
    "train_cohort": "train",
    "merged_layers": "merge",
    "_copied_layers": "unstack",
    "_prefill": "prefill",
    "prefill_shared_prefix": "shared-prefix",
    DECODE: "decode",
    "_score_candidates": "evaluation",
    "_score_tokens": "score",
    "_finish_and_step": "aggregation",
}


@dataclasses.dataclass(frozen=True)
class Played:
    """A played round.

    Attributes:
        experiment: as a run builds it, its arrays ghosts.
        mesh: of compile-only devices.
        programs: {name: program}, in the order of their first start.
        generations: in their order; starts: of programs outside them, likewise.
    """

    experiment: Experiment
    mesh: Mesh
    programs: dict[str, Program]
    generations: list[Generation]
    starts: list[Program]


def sizes(config: ml_collections.ConfigDict) -> Preset:
    """Returns the sizes of an experiment: its own, with the prompt lengths of the benchmark's preset
    of its model (SmolLM2-135M's, where it has none).

    Raises: UserError where a model's config.json is not there.
    """
    named = {MODELS[name][0]: make() for name, make in workload.PRESETS.items()}
    like = named.get(config.model)
    shape = like.shape if like else read_config(find_folder(config.model))[1]
    preset = workload.config_preset(config, shape, "")
    if like is None:
        return preset
    return dataclasses.replace(preset, lengths=like.lengths, longer=like.longer, head=like.head)


def play(
    config: ml_collections.ConfigDict, target: Target, devices: list[Any], wanted: str = ""
) -> Played:
    """Plays the evaluation and the first round of an experiment on a target's devices.

    On several devices a program's arguments lie where the program before left them, which only its
    compilation tells. Generation is therefore left out where no wanted program needs it.

    Args: wanted: the programs' names, separated by commas; "": all.
    Raises: UserError for a config that a run would refuse, and for quantised weights.
    """
    configs.import_own(config.imports)
    settings = configs.parse(config)
    if settings.quantize != "none":
        raise UserError(
            f"quantize is {settings.quantize!r}; --compile-for knows the shapes of plain weights "
            "alone. Set --config.quantize=none."
        )
    work = workload.make_workload(sizes(config), target.platform)
    mesh = make_mesh(devices, settings.devices.model)
    generates = not wanted or not set(wanted.split(",")) <= APART
    with ghosts.haunted(target) as occupy, ghosts.recording(mesh, target, DECODE) as recorder:
        built = build(settings, work, mesh, recorder, occupy, generates)
        sampler = built.federation.worker.sampler
        state = built.initial_state()
        recorder.stage = "evaluation"
        built.evaluator(built.policies(state)[0])
        recorder.stage = ""
        round_of(built.federation, state, NOTHING_USED, built.federation.cohort(1))
    generations = sampler.generations
    within = {id(program) for generation in generations for program in generation.programs}
    starts = [program for program in recorder.starts if id(program) not in within]
    return Played(built, mesh, named(list(recorder.programs.values())), generations, starts)


def named(programs: list[Program]) -> dict[str, Program]:
    """Returns programs by name: "decode", and of other stages "revision decode"; further programs
    of one name are numbered.
    """
    by_name: dict[str, Program] = {}
    for program in programs:
        name = NAMES.get(program.name, program.name.strip("_"))
        if program.stage not in ("", "rollout", name):
            name = f"{program.stage} {name}"
        free = (f"{name} {number}" for number in itertools.count(2))
        by_name[name if name not in by_name else next(n for n in free if n not in by_name)] = (
            program
        )
    return by_name


def chosen(programs: dict[str, Program], text: str | None) -> dict[str, Program]:
    """Returns the programs of "train,revision decode"; all without a text.

    Raises: UserError for one that the round does not start.
    """
    for name in text.split(",") if text else ():
        if name not in programs:
            raise unknown("program (--programs)", name, programs)
    wanted = text.split(",") if text else list(programs)
    return {name: program for name, program in programs.items() if name in wanted}


def build(
    settings: Settings,
    work: Workload,
    mesh: Mesh,
    recorder: Recorder,
    occupy: Callable[[int], None],
    generates: bool,
) -> Experiment:
    """Builds the experiment as `builder.build` does, on drawn prompts and weights without memory.

    Args:
        occupy: takes the bytes that are in use on a device.
        generates: whether prefill and decode are recorded, and the merge before them.
    """
    model = shapes_of(settings, work.preset, mesh)
    occupy(sum(leaf.held() for leaf in jax.tree.leaves(model.base)))
    algorithm = build_algorithm(settings, model.eos_ids)
    if getattr(algorithm.settings, "retokenise", False):
        raise UserError(
            f"{algorithm.name}.retokenise is on, which trains on answers' texts, and drawn answers "
            f"have none; set --config.{algorithm.name}.retokenise=False for --compile-for."
        )
    decoder = builder.build_decoder(settings, model)
    sampling = builder.sampling_configs(settings, model, mesh)
    place, spread = (functools.partial(put, mesh=mesh) for put in (shard_rows, replicate))
    count, shapes = mesh.shape[CLIENTS], ShapeBuckets()
    kinds = (sum(work.prompts, []), sum(work.revisions, []), work.questions)
    prefixes = [os.path.commonprefix(prompts) for prompts in kinds if len(prompts) > 1]
    sampler = DrawnSampler(
        recorder, work, generates, decoder, place, count, shapes, spread, prefixes
    )
    scorer = Scorer(decoder, shapes, place, count)
    evaluator = build_evaluator(settings, work, sampling[2], sampler, scorer)
    worker = build_worker(settings, work, algorithm, model, mesh, evaluator, sampling, generates)
    decoder = device_memory.choose_remat(settings, decoder, algorithm, worker.data, model, count)
    own = np.arange(len(worker.examples)).reshape(work.preset.clients, -1)
    federation = builder.build_federation(
        settings, algorithm, worker, decoder, model, mesh, shapes, list(own), OwnParts()
    )
    return Experiment(settings, model, federation, evaluator, shapes, None)


def build_evaluator(
    settings: Settings,
    work: Workload,
    greedy: SamplingConfig,
    sampler: DrawnSampler,
    scorer: Scorer,
) -> Evaluator:
    """Builds the evaluator of the workload's questions; gold responses have full length."""
    texts = Texts(work, load_tokenizer(builder.TINY))
    task = Graded(build_task(settings), texts.right)
    labels = texts.examples[0].labels
    answer = list(range(settings.data.max_response_tokens))
    return Evaluator(
        task=task,
        renderer=texts,
        sampler=sampler,
        scorer=scorer,
        examples=[Example("", "", labels, labels, 0) for _ in work.questions],
        prompts=work.questions,
        method=task.scoring if settings.eval.method == "auto" else settings.eval.method,
        sampling=greedy,
        rows=settings.eval.rows,
        responses=[answer for _ in work.questions],
    )


def build_worker(
    settings: Settings,
    work: Workload,
    algorithm: Algorithm,
    model: LoadedModel,
    mesh: Mesh,
    evaluator: Evaluator,
    sampling: tuple[SamplingConfig, SamplingConfig, SamplingConfig],
    generates: bool,
) -> RolloutWorker:
    """Builds the rollout worker of the workload's prompts; without generation nothing is merged."""
    first, revise, _ = sampling
    decoder = evaluator.scorer.decoder
    return RolloutWorker(
        task=evaluator.task,
        renderer=evaluator.renderer,
        feedback=Comments(evaluator.task),
        sampler=evaluator.sampler,
        scorer=evaluator.scorer,
        examples=evaluator.renderer.examples,
        data=tokens(settings, work, algorithm, builder.longest_sampled(algorithm, first, revise)),
        first=first,
        revise=revise,
        num_revisions=settings.rollout.num_revisions,
        score_rows=settings.rollout.max_concurrent_sequences or RolloutWorker.score_rows,
        policy=lambda lora: (
            as_policy(model.base, replicate(lora, mesh), decoder.lora, "none")
            if generates
            else Policy(model.base)
        ),
    )


def shapes_of(settings: Settings, preset: Preset, mesh: Mesh) -> LoadedModel:
    """Returns the model of a shape, its weights ghosts; the last id ends a completion."""
    config, put = parse_config(preset.shape), base_placer(mesh)
    zero = np.zeros((), DTYPES[settings.dtype])

    def weight(place: Place) -> Any:
        return put(place.name, np.broadcast_to(zero, place.leaf_shape))

    base, end = build_params(config, weight), config.vocab_size - 1
    return LoadedModel(config, base, preset.shape, builder.TINY, None, (end,), end, None)
