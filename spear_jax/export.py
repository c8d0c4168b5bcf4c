"""A run's adapter as a PEFT folder, or merged into a full Hugging Face model folder."""

import pathlib
from typing import Any

import jax
import numpy as np

from spear_jax.core.errors import UserError
from spear_jax.experiment import builder, command_line, run_folder
from spear_jax.experiment.checkpoint import restore
from spear_jax.models.io.huggingface import save_model
from spear_jax.models.io.peft import save_adapter
from spear_jax.models.lora import merge_lora
from spear_jax.models.params import Adapter

EXAMPLES = """
    python -m spear_jax.export --workdir=runs/arc --out=adapters/arc
    python -m spear_jax.export --workdir=runs/arc --round=10 --out=models/arc --merge
"""


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("export", __doc__, EXAMPLES)
    parser.add_argument("--workdir", required=True, help="a run folder of `train`")
    parser.add_argument("--round", type=int, help="a saved round (default: the newest)")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument(
        "--client", type=int, help="whose adapter, of a run with federation.aggregation=local"
    )
    parser.add_argument(
        "--merge", action="store_true", help="write the whole model, adapter merged"
    )
    parser.add_argument("--quiet", action="store_true", help="print the JSON line only")
    command_line.add_offline(parser)
    args = parser.parse_args(argv)
    command_line.go_offline(args.offline)
    out = pathlib.Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={args.out} exists and is not an empty folder; give a new one.")
    config = run_folder.read_run_config(pathlib.Path(args.workdir))
    with config.unlocked():
        config.quantize = "none"  # --merge adds the adapter to the weights as they were given
    built = builder.build(config)
    state, _ = restore(built, pathlib.Path(args.workdir), args.round)
    lora = _chosen(built, state.lora, args.client)
    if args.merge:
        merged = merge_lora(built.model.base, lora, built.decoder.lora)
        model = built.model
        save_model(
            out,
            jax.tree.map(np.asarray, merged),
            model.raw_config,
            model.tokenizer,
            model.generation_config,
        )
    else:
        # PEFT loads the base from this name; the embedded model has a folder only
        base = str(built.model.source) if config.model == "tiny" else config.model
        save_adapter(out, lora, built.decoder.lora, built.model.config, base)
    if not args.quiet:
        print(f"round {int(state.round)} of {args.workdir} -> {out}")
    return {"out": str(out), "round": int(state.round), "merged": args.merge}


def _chosen(built: builder.Experiment, lora: Adapter, client: int | None) -> Adapter:
    """The global adapter, or one client's of a local-only run."""
    if built.server.rule != "local":
        if client is not None:
            raise UserError(
                f"--client={client}, but the run has one global adapter; leave --client out."
            )
        return lora
    count = built.config.federation.num_clients
    if client is None or not 0 <= client < count:
        raise UserError(
            f"a local-only run has an adapter for each client; give --client=0 to {count - 1}, "
            f"not {client}."
        )
    return jax.tree.map(lambda x: x[client], lora)


if __name__ == "__main__":
    command_line.run(main)
