"""The user's mistakes of docs/troubleshooting.md, each made for real: `python tests/print_errors.py`
prints the table again.

tests/core/test_errors.py runs the same cases and checks that each ends in one message before anything is
traced.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from spear_jax.core.errors import UserError
from spear_jax.experiment import builder, command_line, run_folder
from spear_jax.experiment.checkpoint import Checkpoints
from spear_jax.experiment.run import Run
from spear_jax.experiment.run_logger import RunLogger
from spear_jax.models.io.huggingface import load_model
from spear_jax.models.io.peft import save_adapter
from spear_jax.models.lora import LoraConfig, init_lora

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "llama"
Case = tuple[str, Callable[[], object]]


def started(*overrides: str) -> None:
    """What `train` does before it compiles."""
    config = command_line.read_config(
        ["--config=configs/quickstart.py", *(f"--config.{text}" for text in overrides)]
    )
    builder.build(config, jax.devices()[:1])


def model_cases(tmp: pathlib.Path) -> Iterator[Case]:
    def damaged(name: str, change: Callable[[pathlib.Path], None]) -> Case:
        def make():
            folder = pathlib.Path(
                shutil.copytree(FIXTURE, tmp / name.replace(" ", "-"), dirs_exist_ok=True)
            )
            change(folder)
            load_model(str(folder), "float32")

        return name, make

    def tensors(change: Callable[[dict], None]) -> Callable[[pathlib.Path], None]:
        def apply(folder: pathlib.Path) -> None:
            held = load_file(folder / "model.safetensors")
            change(held)
            save_file(held, folder / "model.safetensors")

        return apply

    def config(**changes) -> Callable[[pathlib.Path], None]:
        def apply(folder: pathlib.Path) -> None:
            file = folder / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

        return apply

    def without_eos(folder: pathlib.Path) -> None:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / file).exists():
                raw = json.loads((folder / file).read_text())
                raw.pop("eos_token", None)
                (folder / file).write_text(json.dumps(raw))

    def truncate(folder: pathlib.Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-500])

    key = "model.layers.0.self_attn.q_proj.weight"
    yield damaged("missing safetensors", lambda folder: (folder / "model.safetensors").unlink())
    yield damaged("truncated safetensors", truncate)
    yield damaged("tensor missing", tensors(lambda held: held.pop(key)))
    yield damaged(
        "tensor extra", tensors(lambda held: held.update(surplus=np.zeros(3, np.float32)))
    )
    yield damaged("tensor of wrong shape", tensors(lambda held: held.update({key: held[key][:-1]})))
    yield damaged("key that is not supported", config(rope_scaling={"type": "yarn", "factor": 4.0}))
    yield damaged("value of a wrong type", config(hidden_size="32"))
    yield damaged("more layers than tensors", config(num_hidden_layers=10**9))
    yield damaged("weights that are no numbers", tensors(lambda held: held[key].fill(np.nan)))
    yield damaged("EOS that is no id", config(eos_token_id=-1))
    yield damaged("tokenizer without EOS", without_eos)


def data_cases(tmp: pathlib.Path) -> Iterator[Case]:
    good = {
        "id": "q1",
        "question": "Which one?",
        "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }

    def table(name: str, rows: list[dict], columns: list[str] | None = None) -> Case:
        def make():
            folder = tmp / name.replace(" ", "-")
            folder.mkdir(exist_ok=True)
            for split in ("train", "test"):
                pd.DataFrame(rows, columns=columns).to_parquet(folder / f"{split}.parquet")
            started("task=arc_challenge", f"data.path={folder}")

        return name, make

    yield table(
        "dataset without a column", [{k: v for k, v in good.items() if k != "answerKey"}] * 4
    )
    yield table("empty split", [], list(good))
    yield table("gold label outside the options", [good, good | {"answerKey": "E"}])

    def csv(name: str, data: bytes) -> Case:
        def make():
            (tmp / "questions.csv").write_bytes(b"question,a,b,c,answer\n" + data)
            started("task=mcqa", f"data.path={tmp / 'questions.csv'}", "data.columns.options=a,b,c")

        return name, make

    yield csv("row of a CSV file with a cell too many", b"Which?,x,y, or z,w,A\n")
    yield csv("text that is not UTF-8", "Which?,café,thé,eau,A\n".encode("cp1252"))
    yield csv("answer that can be read in two ways", b"1 + 1?,1,2,3,2\n")


def run_cases(tmp: pathlib.Path) -> Iterator[Case]:
    def foreign_adapter():
        model = load_model(str(builder.TINY), "float32").config
        lora = LoraConfig(4, 8.0, 0.0, ("q", "v"))
        save_adapter(
            tmp / "adapter", init_lora(jax.random.key(0), lora, model), lora, model, "tiny"
        )
        started(f"lora.init_from={tmp / 'adapter'}")

    def foreign_workdir():
        config = command_line.read_config(["--config=configs/quickstart.py", "--config.seed=1"])
        run_folder.open_workdir(str(tmp / "run"), config, "auto")
        run_folder.open_workdir(
            str(tmp / "run"), command_line.read_config(["--config=configs/quickstart.py"]), "auto"
        )

    def ruined_checkpoint():
        built = builder.build(
            command_line.read_config(["--config=configs/quickstart.py"]), jax.devices()[:1]
        )
        checkpoints = Checkpoints(tmp / "checkpoints", 3, 1)
        checkpoints.save(built.initial_state(), {"round": 0}, {})
        checkpoints.close()
        for file in (tmp / "checkpoints" / "0" / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(b"damaged")
        Checkpoints(tmp / "checkpoints", 3, 1).restore(built.initial_state())

    def used_folder():
        (tmp / "used").mkdir()
        held = """import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()"""
        command = [sys.executable, "-c", held, str(tmp / "used" / run_folder.LOCK)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            Run(command_line.read_config(["--config=quickstart"]), tmp / "used")

    def full_disk():
        logger = RunLogger(tmp, None)
        (tmp / "metrics.jsonl").unlink()
        (tmp / "metrics.jsonl").symlink_to("/dev/full")
        logger.write({"round": 1, "time": 0.0})

    yield "adapter of another rank", foreign_adapter
    yield "workdir of another config", foreign_workdir
    yield "no whole checkpoint left", ruined_checkpoint
    yield "folder in use", used_folder
    yield "full disk", full_disk


def cases(tmp: pathlib.Path) -> Iterator[Case]:
    """(name, what makes the mistake); each raises UserError."""
    for name, override in (
        ("unknown task", "task=fact"),
        ("unknown model", "model=no/such-model"),
        ("unknown algorithm", "algorithm.name=speer"),
        ("mistyped key", "federation.num_client=4"),
        ("more clients than examples", "federation.num_clients=10000"),
        ("prompt over the limit", "data.max_prompt_tokens=20"),
        ("max_lose_ratio out of range", "spear.max_lose_ratio=-1.0"),
        ("dirichlet_alpha out of range", "federation.dirichlet_alpha=0.0"),
        ("temperature out of range", "rollout.temperature=-1.0"),
        (
            "not enough memory",
            "federation.clients_at_once=4 train.batch_size=1000000 train.max_tokens_per_block=1000000",
        ),
        ("DPO without pairs", "algorithm.name=dpo dpo.source=data"),
        ("RLTF-SD without feedback", "algorithm.name=rltf_sd rollout.feedback=none"),
        ("IRIS with one sample a side", "algorithm.name=iris train.batch_size=1"),
        ("GRPO without a group", "algorithm.name=grpo grpo.group=1"),
    ):
        yield name, lambda override=override: started(*override.split())

    def ungraded():
        line = json.dumps({"prompt": "Hello?", "response": "Hello."}) + "\n"
        (tmp / "pairs.jsonl").write_text(20 * line)
        started(
            "task=pairs",
            f"data.path={tmp / 'pairs.jsonl'}",
            "federation.num_clients=1",
            "federation.clients_per_round=1",
        )

    yield "SPEAR on responses that nothing grades", ungraded
    yield from model_cases(tmp)
    yield from data_cases(tmp)
    yield from run_cases(tmp)


def main() -> None:
    print("| mistake | message |\n| --- | --- |")
    with tempfile.TemporaryDirectory() as tmp:
        for name, make in cases(pathlib.Path(tmp)):
            try:
                make()
            except UserError as error:
                print(f"| {name} | {str(error).replace(tmp, 'TMP').replace('|', '/')} |")
            else:
                sys.exit(f"{name}: nothing was refused")


if __name__ == "__main__":
    main()
