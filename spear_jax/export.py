"""Writes a run's adapter as a PEFT folder, or merged into a Hugging Face model."""

import pathlib
from typing import Any

from spear_jax.experiment import builder, command_line, run_folder
from spear_jax.experiment.checkpoint import restore
from spear_jax.experiment.export import check_empty, export_adapter, export_model

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
        "--client", type=int, help="whose adapter, of a run in which every client has its own"
    )
    parser.add_argument(
        "--rank", type=int, help="the adapter's rank, of a run that changed the base weights"
    )
    parser.add_argument(
        "--merge", action="store_true", help="write the whole model, adapter merged"
    )
    parser.add_argument("--quiet", action="store_true", help="print the JSON line only")
    command_line.add_offline(parser)
    args = parser.parse_args(argv)
    command_line.go_offline(args.offline)
    check_empty(args.out)
    config = run_folder.read_run_config(pathlib.Path(args.workdir))
    with config.unlocked():
        config.quantize = "none"  # --merge adds the adapter to the weights as they were given
    built = builder.build(config)
    state, _ = restore(built, pathlib.Path(args.workdir), args.round)
    write = export_model if args.merge else export_adapter
    out = write(built, state, args.out, args.client, args.rank)
    if not args.quiet:
        print(f"round {int(state.round)} of {args.workdir} -> {out}")
    return {"out": str(out), "round": int(state.round), "merged": args.merge}


if __name__ == "__main__":
    command_line.run(main)
