"""Five hundred malformed inputs: each is refused with one message that names what is wrong.

A seeded generator makes them, each from a whole input with one thing broken. `SEED=7 pytest
tests/test_malformed.py` makes others.
"""

import json
import math
import os
import pathlib
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator

import gguf_files
import ml_collections
import numpy as np
import pytest
from safetensors.numpy import save_file

from spear_jax import evaluate, export, score, train
from spear_jax.core.errors import UserError, shown
from spear_jax.experiment import command_line, run_folder
from spear_jax.experiment import config as experiment_config
from spear_jax.experiment.checkpoint import Checkpoints
from spear_jax.federated.state import ServerState
from spear_jax.models.config import read_config
from spear_jax.models.io.huggingface import load_model, open_model
from spear_jax.models.io.peft import load_adapter
from spear_jax.tasks import get_task
from spear_jax.tasks.loading import load_examples

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "llama"
SEED = int(os.environ.get("SEED", 0))
LONGEST_MESSAGE = 1500  # characters
MEMORY = 512 << 20  # bytes that one kind of input may add to the process
NAN, INF = math.nan, math.inf

# what was broken, a word that the message must hold, and the call that must refuse it
Broken = tuple[str, str, Callable[[], object]]


def config_fields(draw: random.Random, tmp: pathlib.Path) -> Iterator[Broken]:
    """A value of a wrong type, none that is a number, or one out of range, in a field."""
    del tmp
    wrong = {
        "float": [NAN, INF, -INF, "x", None, [1.0], {"a": 1.0}, True, "9" * 3000],
        "int": [0.5, "5", None, True, [1], NAN, -(10**30), {"a": 1}, "9" * 3000, 10**5000],
        "bool": ["yes", 1, None, 0.0, [True]],
        "str": [None, 5, ["x"], 0.5, {"a": "b"}, True],
        "tuple": [5, None, [1], {"a": "b"}, True, 0.5],
    }
    fields = list(_leaves(experiment_config.default_config().to_dict()))
    while True:
        path, default = draw.choice(fields)
        if path == "algorithm.name":
            continue
        value = draw.choice(wrong[type(default).__name__])

        def parse(path=path, value=value):
            values = experiment_config.default_config().to_dict()
            *groups, name = path.split(".")
            held = values
            for group in groups:
                held = held[group]
            held[name] = value
            return experiment_config.parse(ml_collections.ConfigDict(values))

        yield f"{path} = {shown(value, 40)}", path, parse


def _leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def command_lines(draw: random.Random, tmp: pathlib.Path) -> Iterator[Broken]:
    """Arguments of `train`, `evaluate`, `export` and `score`."""
    work = f"--workdir={tmp / 'run'}"
    fields = {
        "rounds": ["abc", "1e3", "", "1.5", "None", "-1", "nan", "9" * 3000],
        "lora.targets": ["5", "(", "q,", "('z',)", "None", "(1,)", "-" * 20_000 + "1"],
        "lora.alpha": ["nan", "inf", "-1", "0", "x", ""],
        "rollout.temperature": ["nan", "-0.1", "1e400", "hot"],
        "federation.tau": ["nan", "0", "-inf"],
        "seed": ["-1", "1.5", "x"],
        "train.warmup": ["maybe", "2"],
        "federation.partition": ["evenly", "", "5"],
        "imports": ["None", "5", "('no_such_module',)"],
        "data.templates.question": ["{question:>999999999999}", "{q}", "{", "{question.__class__}"],
    }
    whole = [
        ("--config=quickstar", "quickstar"),
        ("--config=no/such.py", "no/such"),
        ("--config=quickstart:what", "what"),
        ("--config=spear:facts", "facts"),
        ("--config=spear:fact,tiny", "fact"),
        ("--config=spear:facts,tiny,huge", "huge"),
        ("--confg=quickstart", "--confg"),
        ("--config.rounds=3", "config"),
    ]
    others = [
        (evaluate.main, [], "--workdir"),
        (evaluate.main, ["--model=tiny"], "--task"),
        (evaluate.main, ["--model=tiny", "--task=fact"], "fact"),
        (evaluate.main, ["--model=tiny", "--task=facts", "--limit=-3"], "-3"),
        (evaluate.main, ["--model=tiny", "--task=facts", "--limit=many"], "many"),
        (evaluate.main, ["--model=tiny", "--task=facts", "--dtype=int4"], "int4"),
        (evaluate.main, ["--model=tiny", "--task=facts", "--quantize=int3"], "int3"),
        (evaluate.main, [f"--workdir={tmp / 'none'}"], "none"),
        (export.main, [f"--workdir={tmp / 'none'}", f"--out={tmp / 'out'}"], "none"),
        (evaluate.main, ["--model=tiny", "--task=facts", "--config.model=other"], "--model"),
        (export.main, [f"--workdir={tmp / 'none'}"], "--out"),
        (score.main, [], "--workdir"),
        (score.main, [f"--workdir={tmp / 'none'}"], "none"),
        (train.main, ["--config=quickstart"], "--workdir"),
        (train.main, ["--config=quickstart", work, "--resume=perhaps"], "perhaps"),
        (train.main, ["--config=quickstart", work, "--distributed=host"], "host"),
    ]
    while True:
        kind = draw.random()
        if kind < 0.6:
            name = draw.choice(list(fields))
            value = draw.choice(fields[name])
            word = name.split(".")[-1].removesuffix("s")
            args = (train.main, ["--config=quickstart", work, f"--config.{name}={value}"], word)
        elif kind < 0.7:
            args = (train.main, ["--config=quickstart", work, "--config.round=3"], "round")
        elif kind < 0.85:
            flag, word = draw.choice(whole)
            args = (train.main, [work, flag], word)
        else:
            args = draw.choice(others)
        main, argv, word = args
        yield " ".join(argv)[-70:], word, lambda main=main, argv=argv: _exits(main, argv)


class Exits(Exception):
    """A command that ended by itself, with its exit code."""


def _exits(main: Callable, argv: list[str]) -> None:
    try:
        command_line.run(main, argv)
    except SystemExit as end:
        raise Exits(end.code) from None


def data_files(draw: random.Random, tmp: pathlib.Path) -> Iterator[Broken]:
    """Files of questions, whose rows, cells, encodings or syntax are broken."""
    good = {"question": "Which floats?", "options": ["rock", "ice"], "answer": "B"}
    cells = {
        "question": ["", None, "   ", []],
        "options": ["rock", [], ["ice"], ["", "ice"], None, ["a"] * 27, 5, {"a": "b"}],
        "answer": ["", None, "C", 2, -1, 0.5, "neither", [], True, {"a": 1}],
    }
    texts = [
        ("x.jsonl", b"", "x.jsonl"),
        ("x.jsonl", b"\xff\xfe\xfa{", "x.jsonl"),
        ("x.jsonl", b'{"question": "q", "options": ["a", "b"], "answer": "A"}\n{"question"', "2"),
        ("x.jsonl", b'["a", "b"]\n', "x.jsonl"),
        ("x.jsonl", b"5\n", "x.jsonl"),
        ("x.jsonl", b"[" * 100_000 + b"\n", "x.jsonl"),
        ("x.json", b'{"rows": 5}', "x.json"),
        ("x.json", b"[1, 2]", "x.json"),
        ("x.json", b"[{]", "x.json"),
        ("x.csv", b"question,options\na,b\n", "answer"),
        ("x.csv", b"question,a,b,answer\nq,x,y\n", "x.csv"),
        ("x.csv", b'question,a,b,answer\n"q,x,y,A\n', "x.csv"),
        ("x.csv", b"", "x.csv"),
        ("x.csv", b"\x00\x01\x02", "x.csv"),
        ("x.csv", b"question,a,a,answer\nq,x,y,A\n", "x.csv"),
        ("x.parquet", b"PAR1 but not really", "x.parquet"),
        ("x.txt", b"question", "x.txt"),
    ]
    number = 0
    while True:
        number += 1
        if draw.random() < 0.6:
            column = draw.choice(list(cells))
            value = draw.choice(cells[column])
            at = draw.randrange(12)
            rows = [good | ({column: value} if i == at else {}) for i in range(12)]
            name = draw.choice(["rows.jsonl", "rows.json"])
            lines = [json.dumps(row) for row in rows]
            text = "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"
            what, word, raw, columns = f"{column} = {value!r:.40}", f"{at}", text.encode(), {}
        else:
            name, raw, word = draw.choice(texts)
            what = f"{name}: {raw[:40]!r}"
            columns = {"options": "a,b"} if b"a,b" in raw or b"a,a" in raw else {}
        folder = tmp / str(number)
        folder.mkdir()
        (folder / name).write_bytes(raw)

        def load(file=folder / name, columns=columns):
            task = get_task("mcqa", columns=columns)
            return [load_examples(task, split, str(file)) for split in ("train", "test")]

        yield what, word, load


def model_folders(draw: random.Random, tmp: pathlib.Path) -> Iterator[Broken]:
    """Model folders whose JSON files state what is not there, or cannot be."""
    counts = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    counts += ("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")
    wrong = {name: ["64", -1, 0, 2.5, [4], True, 10**9, 10**30, {"a": 1}] for name in counts}
    wrong["max_position_embeddings"].remove(10**9)  # no memory hangs on it
    wrong |= {
        "rms_norm_eps": ["small", NAN, INF, -1.0, [1e-6], None],
        "rope_theta": ["x", NAN, INF, -1.0, [1e4]],
        "rope_parameters": [5, "yarn", [1], {"rope_type": "yarn", "factor": 4.0}],
        "hidden_act": ["gelu", 5, None, ["silu"]],
        "model_type": ["mamba", 5, None, ["llama"], "x" * 3000],
        "mlp_bias": [True, "yes"],
        "attention_bias": ["yes", 2],
        "eos_token_id": [-1, 10**9, "0", [], 0.5, [0, -1], True],
        "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    }
    files = {
        "config.json": [b"", b"[]", b"5", b"{", b"\xff\xfe\x00", b'{"a":' * 50_000, b'"text"'],
        "generation_config.json": [b"[]", b"{", b"\xff\xfa", b'{"eos_token_id": -1}', b"5"],
        "tokenizer.json": [b"", b"{}", b"[1]", b"\xff\xfa", b"{"],
        "tokenizer_config.json": [b"{", b"[1]", b"\xff\xfa"],
        "model.safetensors": [b"", b"{}", b"\xff" * 100],
    }
    number = 0
    while True:
        number += 1
        folder = pathlib.Path(shutil.copytree(FIXTURE, tmp / str(number), symlinks=True))
        if draw.random() < 0.65:
            raw = json.loads((folder / "config.json").read_text())
            name = draw.choice(list(wrong))
            value = draw.choice(wrong[name])
            if raw.get(name) == value and type(raw.get(name)) is type(value):
                continue
            (folder / "config.json").write_text(json.dumps(raw | {name: value}))
            what, word = f"{name} = {str(value)[:40]!r}", name
        else:
            word = draw.choice(list(files))
            content = draw.choice(files[word])
            (folder / word).write_bytes(content)
            what = f"{word}: {content[:30]!r}"
            word = "tokenizer" if word.startswith("tokenizer") else word
        yield what, word, lambda folder=folder: open_model(str(folder))


def safetensors_headers(draw: random.Random, tmp: pathlib.Path) -> Iterator[Broken]:
    """Safetensors files with a broken header, or with numbers that are none."""
    file = FIXTURE / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    names = sorted(name for name in header if name != "__metadata__")
    number = 0
    while True:
        number += 1
        name = draw.choice(names)
        kind = draw.choice(["length", "dtype", "shape", "offsets", "cut", "nan", "gone", "spare"])
        changed, body, stated = json.loads(json.dumps(header)), raw[8 + length :], None
        if kind == "length":
            stated = draw.choice([0, 1, 2**40, 2**63 - 1, 5])
        elif kind == "dtype":
            changed[name]["dtype"] = draw.choice(["F33", 5, None, "I64", "text"])
        elif kind == "shape":
            changed[name]["shape"] = draw.choice([[10**12], [-1], "x", [2, 2], None, [1.5]])
        elif kind == "offsets":
            changed[name]["data_offsets"] = draw.choice([[0, 10**12], [4, 0], [0], "x", [-4, 0]])
        elif kind == "cut":
            body = body[: draw.randrange(len(body))]
        elif kind == "nan":
            begin, end = header[name]["data_offsets"]
            at = begin + 4 * draw.randrange((end - begin) // 4)
            bad = np.float32(draw.choice([NAN, INF, -INF])).tobytes()
            body = body[:at] + bad + body[at + 4 :]
        elif kind == "gone":
            del changed[name]
        else:
            changed["model.spare.weight"] = changed.pop(name)
        text = json.dumps(changed).encode()
        folder = pathlib.Path(shutil.copytree(FIXTURE, tmp / str(number)))
        stated = len(text) if stated is None else stated
        (folder / file.name).write_bytes(struct.pack("<Q", stated) + text + body)
        word = name if kind == "nan" else str(folder)
        load = lambda folder=folder: load_model(str(folder), "float32")
        yield f"{kind} of {name}", word, load


def gguf_metadata(draw: random.Random, tmp: pathlib.Path) -> Iterator[Broken]:
    """GGUF files cut off, or with metadata of a wrong type or without sense."""
    whole = gguf_files.write_gguf(tmp / "whole.gguf", "llama")
    raw = whole.read_bytes()
    wrong = {
        "llama.attention.layer_norm_rms_epsilon": ["small", NAN, -1.0, INF],
        "llama.rope.freq_base": ["x", NAN, INF, -1.0],
        "llama.rope.scaling.type": ["yarn", "longrope", "what"],
        "llama.rope.dimension_count": [np.uint32(2), "x"],
        "llama.block_count": ["x", np.uint32(10**9), np.uint32(0), 1.5],
        "llama.attention.head_count": ["x", np.uint32(0), np.uint32(7), [4, 4]],
        "llama.embedding_length": ["x", np.uint32(0), np.uint32(10**9)],
        "llama.feed_forward_length": ["x", np.uint32(0), [1, 2]],
        "llama.expert_count": [np.uint32(8)],
        "tokenizer.ggml.model": ["bert", "llama", np.uint32(5)],
        "tokenizer.ggml.pre": ["nonsense", np.uint32(5)],
        "tokenizer.ggml.tokens": ["abc", None, ["a"]],
        "tokenizer.ggml.merges": ["abc", None, ["nothing here"]],
        "tokenizer.ggml.eos_token_id": [np.uint32(10**9), "x", None],
        "split.count": [np.uint32(3)],
    }
    number = 0
    while True:
        number += 1
        file = tmp / f"{number}.gguf"
        if draw.random() < 0.3:
            at = draw.randrange(len(raw) - 1)
            file.write_bytes(raw[:at])
            what, word = f"cut at {at}", str(file)
        else:
            key = draw.choice(list(wrong))
            value = draw.choice(wrong[key])
            gguf_files.write_gguf(file, "llama", **{key: value})
            # the tokenizer's are named as such; the others by their key
            word = "token" if key.startswith("tokenizer") else key.removeprefix("llama.")
            what = f"{key} = {value!r:.40}"
        yield what, word, lambda file=file: open_model(str(file))


def adapters(draw: random.Random, tmp: pathlib.Path) -> Iterator[Broken]:
    """PEFT folders with broken settings, or tensors that do not fit."""
    model = read_config(FIXTURE)[0]
    shapes = {"A": (4, model.width), "B": (model.heads * model.head_width, 4)}
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight": np.ones(
            shape, np.float32
        )
        for i in range(model.layers)
        for side, shape in shapes.items()
    }
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    wrong = {
        "peft_type": ["IA3", None, 5, ["LORA"]],
        "r": ["4", 0, -1, 2.5, None, 10**9, NAN, [4], True],
        "lora_alpha": ["8", NAN, INF, None, [8], 0, -1],
        "lora_dropout": ["x", NAN, 1.5, -0.1, [0.1]],
        "use_dora": [True],
        "bias": ["all", 5],
        "modules_to_save": [["lm_head"]],
        "init_lora_weights": ["pissa", "olora"],
        "rank_pattern": [{"q_proj": 8}],
    }
    number = 0
    while True:
        number += 1
        folder = tmp / str(number)
        folder.mkdir()
        held, given = dict(tensors), dict(settings)
        kind = draw.choice(["settings", "settings", "tensor", "json"])
        text = None
        if kind == "settings":
            word = draw.choice(list(wrong))
            given[word] = draw.choice(wrong[word])
            what = f"{word} = {given[word]!r}"
            word = word.removeprefix("lora_")
        elif kind == "tensor":
            word = draw.choice(sorted(held))
            bad = [None, np.ones((3, 3), np.float32), np.full_like(held[word], NAN)]
            new = draw.choice(bad)
            held.pop(word)
            held |= {} if new is None else {word: new}
            what = f"{word}: {None if new is None else new.shape}"
            word = "layer" if new is None else word
        else:
            text = draw.choice([b"", b"[]", b"5", b"{", b"\xff\xfa", b'{"a":' * 50_000])
            what, word = f"adapter_config.json: {text[:20]!r}", "adapter_config.json"
        raw = json.dumps(given).encode() if text is None else text
        (folder / "adapter_config.json").write_bytes(raw)
        save_file(held, folder / "adapter_model.safetensors")
        yield what, word, lambda folder=folder: load_adapter(folder, model)


def run_folders(draw: random.Random, tmp: pathlib.Path) -> Iterator[Broken]:
    """Run folders whose config.json is not one."""
    whole = experiment_config.default_config().to_dict()
    texts = [b"", b"[]", b"5", b"{", b"\xff\xfa", b'{"a":' * 50_000, b"null", b'"x"']
    groups = [name for name, value in whole.items() if isinstance(value, dict)]
    number = 0
    while True:
        number += 1
        folder = tmp / str(number)
        folder.mkdir()
        if draw.random() < 0.4:
            text = draw.choice(texts)
            what, word = f"config.json: {text[:20]!r}", "config.json"
        else:
            word = draw.choice(groups)
            value = draw.choice([5, None, [1], "x"])
            text = json.dumps(whole | {word: value}).encode()
            what = f"{word} = {value!r}"
        (folder / "config.json").write_bytes(text)

        def read(folder=folder):
            return experiment_config.parse(run_folder.read_run_config(folder))

        yield what, word, read


def checkpoints(draw: random.Random, tmp: pathlib.Path) -> Iterator[Broken]:
    """Checkpoints with a file that is cut, gone, changed, or says something else."""
    state = ServerState(
        {"a": np.arange(4096, dtype=np.float32)}, {}, {}, np.int32(3), np.arange(2, dtype=np.uint32)
    )
    line, shapes = {"round": 3, "eval/accuracy": 0.5}, {"first": [[8, 16]]}
    saved = Checkpoints(tmp / "whole", 3, 1)
    saved.save(state, line, shapes)
    saved.close()
    texts = [b"", b"[]", b"5", b"{", b"{}", b"null", b'{"digest": 5}', b"\xff\xfa"]
    number = 0
    while True:
        number += 1
        folder = pathlib.Path(shutil.copytree(tmp / "whole", tmp / str(number)))
        file = draw.choice(sorted(x for x in (folder / "3").rglob("*") if x.is_file()))
        raw = file.read_bytes()
        kind = draw.choice(["cut", "gone", "text", "bit"])
        if kind == "gone":
            file.unlink()
        elif kind == "text":
            file.write_bytes(draw.choice(texts))
        elif raw:
            at = draw.randrange(len(raw))
            bit = bytes([raw[at] ^ 1 << draw.randrange(8)])
            file.write_bytes(raw[:at] + (bit + raw[at + 1 :] if kind == "bit" else b""))
        what = f"{kind}: {file.relative_to(folder)}"

        def restore(folder=folder):
            found = Checkpoints(folder, 3, 1, read_only=True).restore(state)
            if found is None:
                raise UserError(f"{folder} has no checkpoint")
            restored, meta = found
            np.testing.assert_equal(vars(restored), vars(state))
            if (meta["line"], meta["shapes"]) == (line, shapes):  # that byte says nothing
                raise UserError(f"{folder} is whole")
            return meta

        yield what, str(folder), restore


KINDS = {
    config_fields: 130,
    checkpoints: 20,
    command_lines: 70,
    data_files: 80,
    model_folders: 90,
    safetensors_headers: 40,
    gguf_metadata: 30,
    adapters: 25,
    run_folders: 15,
}


def test_there_are_five_hundred():
    assert sum(KINDS.values()) == 500


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_malformed_inputs_are_refused_by_name(kind, tmp_path, capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inputs = kind(random.Random(f"{SEED}{kind.__name__}"), tmp_path)
    failures = []
    for _ in range(KINDS[kind]):
        what, word, call = next(inputs)
        problem = _problem(call, word, capsys)
        if problem:
            failures.append(f"{what}\n    {problem}")
    assert not failures, f"{len(failures)} of {KINDS[kind]}:\n" + "\n".join(failures)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert taken < MEMORY, f"{taken >> 20} MB more"


def _problem(call: Callable[[], object], word: str, capsys) -> str:
    """What is wrong with how an input was refused; "" where nothing is."""
    capsys.readouterr()
    try:
        found = call()
    except UserError as error:
        message = str(error)
    except Exits as end:
        message = capsys.readouterr().err
        if end.args[0] != 2:
            return f"exit {end.args[0]}: {message[-300:]}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        return f"traceback: {type(error).__name__}: {str(error)[:300]}"
    else:
        return f"accepted: {str(found)[:200]}"
    if word not in message:
        return f"does not name {word!r}: {message[:300]}"
    if len(message) > LONGEST_MESSAGE or "Traceback" in message:
        return f"{len(message)} characters: {message[:300]}"
    return ""
