"""Imports a run of the published SPEAR code as a run folder.

Its history.json becomes a run folder that report and analysis read, and one of its
adapter_round_N.pt a PEFT adapter folder that `evaluate --adapter` and `lora.init_from` take.

Writes OUT/config.json (its config through the table of docs/guides/from-published-code.md, preset
reference), OUT/metrics.jsonl, OUT/summary.json, OUT/adapter/, and OUT/published/ with its own JSON
files as they were. Reading a .pt file needs torch.
"""

import json
import math
import pathlib
import re
import shutil
from typing import Any

import numpy as np

from spear_jax.analysis import runs
from spear_jax.core.errors import UserError
from spear_jax.core.files import write_whole
from spear_jax.experiment import command_line
from spear_jax.experiment.published.yaml_config import flatten, to_config
from spear_jax.models.io.peft import write_adapter

EXAMPLES = """
    python -m spear_jax.published --run=SPEAR/runs/arc_challenge_qwen1.5b_spear_44 --out=runs/published-44
    python -m spear_jax.published --run=SPEAR/runs/arc_challenge_qwen1.5b_spear_44 --out=runs/published-44-round5 --round=5
    python -m spear_jax.report --workdir=runs/published-44 --out=reports/published
    python -m spear_jax.evaluate --model=Qwen/Qwen2.5-1.5B --adapter=runs/published-44/adapter --task=arc_challenge
"""
# a client's log entry -> our metric; everything else that is a number stays published/<name>
SUMS = {
    "wins": "rollout/wins",
    "losses": "rollout/loses",
    "n_eff": "published/n_eff",
    "n_traces": "published/n_traces",
}
MEANS = {
    "win_loss": "train/win_nll",
    "kl": "opsd/divergence",
    "avg_reward": "rollout/first_accuracy",
} | {"avg_r0": "rollout/first_accuracy"}
NO_NUMBERS = ("client_id", "steps", "algo", "skipped", "reason")


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("published", __doc__, EXAMPLES)
    parser.add_argument(
        "--run", required=True, help="the output_dir of a run of the published code"
    )
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument(
        "--round",
        type=int,
        help="whose adapter (default: the newest saved; none where none is saved)",
    )
    parser.add_argument("--quiet", action="store_true", help="no table")
    args = parser.parse_args(argv)
    run, out = pathlib.Path(args.run), pathlib.Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={args.out} exists and is not an empty folder; give a new one.")
    given = flatten(read_json(run / "config.json"), str(run / "config.json"))
    config = to_config(given, str(run / "config.json"), "reference")
    lines = metrics(read_json(run / "history.json"), run / "history.json", given)
    file = adapter_file(run, args.round)
    tensors = read_adapter(file) if file else {}
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", json.dumps(config.to_dict(), indent=1) + "\n")
    write_whole(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    (out / "published").mkdir()
    for name in run.glob("*.json"):
        shutil.copyfile(name, out / "published" / name.name)
    result: dict[str, Any] = {"out": str(out), "rounds": len(lines), "adapter": None}
    if file:
        lora = config.lora
        write_adapter(
            out / "adapter",
            tensors,
            lora.rank,
            lora.alpha,
            lora.dropout,
            targets_of(tensors),
            config.model,
        )
        result["adapter"] = {"folder": str(out / "adapter"), "round": round_of(file)}
    if any("eval/accuracy" in line for line in lines):
        write_whole(out / "summary.json", json.dumps(runs.summarise(out), indent=1) + "\n")
        if not args.quiet:
            print(runs.round_table(out))
    return result


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Reads one of the run's JSON files; raises UserError where it is missing or damaged."""
    if not file.is_file():
        raise UserError(
            f"{file.parent} has no {file.name}; give the output_dir of a run of the published "
            f"code as --run."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file} is not valid JSON ({error}); it may have been cut short while it was written."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; it is not of the published code.")
    return content


def metrics(
    history: dict[str, Any], file: pathlib.Path, given: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, one a round.

    `time` counts back from the file's own time by the seconds of later rounds. Evaluations are left
    out, since the file does not keep their times.

    Raises: UserError where the file has no rounds.
    """
    rounds = history.get("history")
    if (
        not isinstance(rounds, list)
        or not all(isinstance(entry, dict) and "round" in entry for entry in rounds)
        or not rounds
    ):
        raise UserError(
            f"{file} has no rounds under 'history'; it is not of the published code, or no round "
            f"was finished."
        )
    plain = given.get("grpo.reward_scale", 1.0) == 1.0 and given.get("grpo.reward_clip") is None
    means = {
        name: ours for name, ours in MEANS.items() if plain or ours != "rollout/first_accuracy"
    }
    left, spent, lines = sum(entry.get("seconds", 0.0) for entry in rounds), 0.0, []
    for entry in rounds:
        spent += entry.get("seconds", 0.0)
        line = {
            "round": int(entry["round"]),
            "time": file.stat().st_mtime - (left - spent),
            "budget/seconds": spent,
        }
        # of rollout, training and aggregation together
        line["published/seconds"] = entry.get("seconds", 0.0)
        line |= of_clients(entry.get("client_logs", []), means)
        held = entry.get("eval")
        if held:
            p, n = held["accuracy"], held["n"]
            line |= {
                "eval/accuracy": p,
                "eval/count": float(n),
                "eval/stderr": math.sqrt(p * (1 - p) / max(1, n)),
            }
        lines.append(line)
    return lines


def of_clients(logs: list[dict[str, Any]], means: dict[str, str]) -> dict[str, float]:
    """Returns a round's metrics over its clients.

    Wins, loses and traces are summed. Losses are averaged by the micro-steps that they are means
    of:

        >>> log = [{"wins": 3, "win_loss": 1.0, "steps": 1}, {"wins": 1, "win_loss": 2.0, "steps": 3}]
        >>> line = of_clients(log, MEANS)
        >>> line["rollout/wins"], line["train/win_nll"]
        (4.0, 1.75)
    """
    line = {
        "round/clients": float(len(logs)),
        "round/clients_without_wins": float(sum(log.get("skipped", False) for log in logs)),
    }
    names = {name for log in logs for name in log} - set(NO_NUMBERS)
    for name in sorted(names):
        rows = [log for log in logs if isinstance(log.get(name), int | float)]
        if name in SUMS:
            line[SUMS[name]] = float(sum(log[name] for log in rows))
            continue
        # rates of answers are means over samples, not over steps
        weights = [
            log.get("n_traces", 1) if name in ("avg_r0", "avg_r1") else log.get("steps", 0)
            for log in rows
        ]
        if sum(weights):
            value = float(np.average([log[name] for log in rows], weights=weights))
            line[means.get(name, f"published/{name}")] = value
    return line


def adapter_file(run: pathlib.Path, round: int | None) -> pathlib.Path | None:
    """Returns the .pt file of a round, or the newest.

    It is None where the run has none and none is asked for.
    """
    files = {round_of(file): file for file in run.glob("adapter_round_*.pt")}
    if round is None:
        return files[max(files)] if files else None
    if round not in files:
        saved = ", ".join(map(str, sorted(files))) or "none"
        raise UserError(
            f"{run} has no adapter of round {round}; saved: {saved}. Give one of these as --round."
        )
    return files[round]


def round_of(file: pathlib.Path) -> int:
    """Returns the round of an adapter_round_N.pt; raises UserError for another name."""
    named = re.fullmatch(r"adapter_round_(\d+)", file.stem)
    if not named:
        raise UserError(f"{file} is named unlike adapter_round_N.pt; rename it, or move it away.")
    return int(named[1])


def read_adapter(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a saved state dict, float32.

    Only tensors are read; no code in the file is run.

    Raises: UserError where torch is missing, or the file holds anything but PEFT's LoRA tensors.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{file} is a torch file, and torch is not installed; `pip install "
            f"spear-jax[torch]`, or take the .pt files away to "
            "import the history alone."
        ) from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {name: tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:  # pickle's, zip's and torch's errors have no common type
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{file} cannot be read as an adapter ({type(error).__name__}: {first}); copy it again."
        ) from error
    if not tensors or not all(re.search(r"\.lora_[AB]\.weight$", name) for name in tensors):
        raise UserError(
            f"{file} holds other tensors than LoRA's; it is not of the published code with "
            f"lora.bias none."
        )
    return tensors


def targets_of(tensors: dict[str, np.ndarray]) -> list[str]:
    """Returns the full names of the adapted modules, as the published code gives them to PEFT."""
    names = dict.fromkeys(
        re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in tensors
    )
    return list(names)


if __name__ == "__main__":
    command_line.run(main)
