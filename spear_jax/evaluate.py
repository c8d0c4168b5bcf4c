"""Measures accuracy with its 95 % confidence interval.

Of a run's checkpoint, or of a model with or without a PEFT adapter. With --model,
--config.a.b=VALUE changes how it is asked: columns, templates, lengths.
"""

import argparse
import pathlib
from typing import Any

from spear_jax.core.compilation import enable_compilation_cache
from spear_jax.core.errors import UserError, shown
from spear_jax.core.mesh import make_mesh, replicate
from spear_jax.experiment import builder, command_line, run_folder
from spear_jax.experiment.checkpoint import restore
from spear_jax.experiment.config import default_config, flatten, parse
from spear_jax.experiment.data import build_task
from spear_jax.experiment.evaluator import Accuracy
from spear_jax.experiment.run import mean_accuracy
from spear_jax.experiment.run_logger import ProgressBars
from spear_jax.models.decoder import Decoder
from spear_jax.models.io import peft
from spear_jax.models.lora import LoraConfig
from spear_jax.rollout.policy import Policy, as_policy
from spear_jax.tasks.loading import load_examples

NO_LORA = LoraConfig(rank=1, alpha=1.0, dropout=0.0, targets=())

# config fields that have flags of their own
FLAGS = {
    "model": "--model",
    "task": "--task",
    "data.path": "--data",
    "dtype": "--dtype",
    "quantize": "--quantize",
    "eval.limit": "--limit",
}

# config fields that evaluation reads, beside those
READ = (
    "imports",
    "data.",
    "eval.method",
    "eval.rows",
    "eval.max_new_tokens",
    "rollout.kv_cache_mb",
    "rollout.max_concurrent_sequences",
)

EXAMPLES = """
    python -m spear_jax.evaluate --workdir=runs/quickstart
    python -m spear_jax.evaluate --workdir=runs/quickstart --round=11
    python -m spear_jax.evaluate --model=models/smollm2-135m-instruct --task=arc_challenge --data=PATH --limit=200
    python -m spear_jax.evaluate --model=models/smollm2-135m-instruct --task=qa --data=own.csv --config.data.columns.answers=key
    python -m spear_jax.evaluate --model=Qwen/Qwen2.5-1.5B --adapter=adapters/arc --task=arc_challenge
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("evaluate", __doc__, EXAMPLES)
    parser.add_argument("--workdir", help="a run folder of `train`")
    parser.add_argument("--round", type=int, help="a saved round (default: the newest)")
    parser.add_argument(
        "--model", help='instead of a run: a model folder, Hub id, .gguf file, or "tiny"'
    )
    parser.add_argument("--adapter", default="", help="a PEFT adapter folder for --model")
    parser.add_argument("--task", help="the task for --model")
    parser.add_argument("--data", default="", help="a local dataset file or folder for --model")
    parser.add_argument("--limit", type=int, default=0, help="first n examples (default: all)")
    parser.add_argument("--dtype", help="float32 (default) or bfloat16, for --model")
    parser.add_argument("--quantize", help="none (default), int8 or nf4, for --model")
    parser.add_argument("--quiet", action="store_true", help="print the JSON line only")
    command_line.add_offline(parser)
    args, overrides = parser.parse_known_args(argv)
    command_line.go_offline(args.offline)
    if bool(args.workdir) == bool(args.model):
        raise UserError("give either --workdir (a run) or --model with --task; see --help.")
    if args.model and not args.task:
        raise UserError("--model needs --task, for example --task=arc_challenge.")
    _check(args, overrides)
    enable_compilation_cache()
    accuracy, where = of_run(args) if args.workdir else of_model(args, overrides)
    low, high = accuracy.interval
    if not args.quiet:
        print(
            f"{where}: {accuracy.accuracy:.1%} of {accuracy.count} right (95 % interval {low:.1%} "
            f"to {high:.1%}), {accuracy.method}"
        )
    return {
        "accuracy": accuracy.accuracy,
        "interval": [low, high],
        "stderr": accuracy.stderr,
        "correct": accuracy.correct,
        "count": accuracy.count,
        "method": accuracy.method,
        **({} if accuracy.nll is None else {"nll": accuracy.nll}),
    }


def _check(args: argparse.Namespace, overrides: list[str]) -> None:
    """Raises UserError for an argument that would do nothing."""
    if args.workdir:
        beside = [f"--{name}" for name in ("adapter", "task", "data", "dtype", "quantize")]
        given = [flag for flag in beside if getattr(args, flag[2:])] + overrides
        if given:
            raise UserError(
                f"{shown(given[0])} does nothing beside --workdir: a run is evaluated by its own "
                "config; the flag goes with --model."
            )
    elif args.round is not None:
        raise UserError(
            f"--round={args.round} does nothing beside --model; it goes with --workdir."
        )
    for override in overrides:
        name = override.partition("=")[0].removeprefix("--config.")
        if name in FLAGS:
            raise UserError(f"{shown(override)}: this field has a flag here; give {FLAGS[name]}.")
        if name in flatten(default_config()) and not name.startswith(READ):
            raise UserError(
                f"{shown(override)}: evaluation does not read this field; leave it out. It reads "
                f"{', '.join(name.removesuffix('.') for name in READ)}."
            )


def of_run(args: argparse.Namespace) -> tuple[Accuracy, str]:
    """Measures a saved round on the run's own test set."""
    folder = pathlib.Path(args.workdir)
    config = run_folder.read_run_config(folder)
    if args.limit:
        with config.unlocked():
            config.eval.limit = args.limit
    bars = ProgressBars(args.quiet)
    built = builder.build(config, progress=bars.stage_rows)
    state, _ = restore(built, folder, args.round)
    policies = built.policies(state)
    accuracies = [built.evaluator(policy) for policy in policies]
    bars.close()
    where = f"{args.workdir}, round {int(state.round)}"
    if len(accuracies) > 1:
        where += f", mean of {len(accuracies)} clients' adapters"
    return mean_accuracy(accuracies), where


def of_model(args: argparse.Namespace, overrides: list[str]) -> tuple[Accuracy, str]:
    """Measures a model, with its adapter where one is given. Args: overrides: of config fields."""
    command_line.import_named(overrides)
    config = default_config()
    config.model, config.task, config.data.path = args.model, args.task, args.data
    config.dtype, config.quantize = args.dtype or "float32", args.quantize or "none"
    config.eval.limit = args.limit
    config.eval.max_new_tokens = 256
    settings = parse(command_line.apply_overrides(config, overrides))
    task = build_task(settings)
    examples = load_examples(task, "test", settings.data.path, settings.eval.limit)
    mesh = make_mesh()
    model = builder.open_model(settings, mesh)
    tree, lora = None, NO_LORA
    if args.adapter:
        tree, lora = peft.load_adapter(args.adapter, model.config)
    bars = ProgressBars(args.quiet)
    evaluator = builder.build_evaluator(
        settings, task, examples, model, Decoder(model.config, lora), mesh, bars.stage_rows
    )
    if tree is None:
        policy, where = Policy(model.base), args.model
    else:
        policy, where = Policy(model.base, replicate(tree, mesh)), f"{args.model} + {args.adapter}"
        if evaluator.method == "generate":
            policy = as_policy(policy.base, policy.lora, lora, settings.quantize)
    accuracy = evaluator(policy)
    bars.close()
    return accuracy, where


if __name__ == "__main__":
    command_line.run(main)
