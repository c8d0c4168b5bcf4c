"""`benchmark`: floors by hand, the workload's properties, both sides' parity on the tiny preset,
errors, and the command.
"""

import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from processes import environment

from spear_jax.benchmark import __main__ as benchmark
from spear_jax.benchmark import floors, machine, progress, report, rival, side, workload
from spear_jax.benchmark.floors import Part
from spear_jax.benchmark.workload import PHASES, Row
from spear_jax.core.errors import UserError
from spear_jax.experiment import command_line, processes
from spear_jax.experiment.config import default_config
from spear_jax.models.config import parse_config

# Width 4, two layers, 2 heads and 1 key/value head of width 2, mlp width 6, 10 tokens.
SHAPE = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 6,
    "tie_word_embeddings": True,
}
RANK = 3
# A layer has q 4x4, k 4x2, v 4x2, o 4x4, gate 4x6, up 4x6, down 6x4: 16 + 8 + 8 + 16 + 24 + 24 + 24
# = 120 weights.
W = 240  # of two layers
HEAD = 40  # 4 * 10
SEEN = 32  # FLOPs for each token and position it sees: 4 * 2 heads * width 2 = 16 a layer
# in + out: q 8, k 6, v 6, o 8, gate 10, up 10, down 10 = 58 a layer, times 2 layers and rank 3
ADAPTER = 348
CACHE = 32  # bytes of a token: keys and values, 2 layers, 1 head of width 2, 4 bytes


def counts(dtype="float32"):
    return floors.count(parse_config(SHAPE), RANK, dtype)


def test_constants_of_a_small_model_by_hand():
    c = counts()
    assert (c.layers, c.head, c.attention, c.adapter, c.cache, c.size) == (
        W,
        HEAD,
        SEEN,
        ADAPTER,
        CACHE,
        4,
    )
    assert c.weights == 4 * (W + HEAD) and counts("bfloat16").weights == 2 * (W + HEAD)
    assert counts("bfloat16").cache == CACHE / 2


def test_prefill_and_decode_floors_by_hand():
    lengths = np.array([2, 3])
    # 5 tokens; positions seen 1 + 2 and 1 + 2 + 3; the head after each prompt
    bytes_ = 4 * (W + HEAD) + CACHE * 5
    assert floors.prefill(counts(), lengths, 0) == Part(2 * W * 5 + SEEN * 9 + 2 * HEAD * 2, bytes_)
    # a first token that both have: one token less, which saw itself
    assert floors.prefill(counts(), lengths, 1) == Part(2 * W * 4 + SEEN * 8 + 2 * HEAD * 2, bytes_)
    # two steps for three new tokens: the first prompt's see 3 and 4 positions, the second's 4 and
    # 5; both read all of them
    flops = 2 * (W + HEAD) * 4 + SEEN * 16
    assert floors.decode(counts(), lengths, 3) == Part(flops, 2 * 4 * (W + HEAD) + CACHE * 16)
    assert floors.decode(counts(), lengths, 1) == Part(0, 0)
    assert floors.aggregate(counts(), 3) == Part(2 * 3 * ADAPTER, 4 * 4 * ADAPTER)


def row(prompt, completion, label=1):
    return Row(list(prompt), list(completion), 1.0, label)


def test_training_floor_by_hand_counts_shared_prompts_and_repeated_rows_once():
    # one row: 2 + 1 tokens that see 1 + 2 + 3 positions; one of them is predicted
    alone = Part(4 * W * 3 + 3 * SEEN * 6 + 4 * HEAD * 1 + 6 * ADAPTER * 3, 2 * 4 * (W + HEAD))
    assert floors.train(counts(), [row((1, 2), (3,))], 0) == alone
    assert floors.train(counts(), [row((1, 2), (3,)), row((1, 2), (3,))], 0) == alone
    # a second completion of two tokens under the same prompt: they see 3 and 4 positions; the
    # prompt is not read again
    both = Part(4 * W * 5 + 3 * SEEN * 13 + 4 * HEAD * 3 + 6 * ADAPTER * 5, 2 * 4 * (W + HEAD))
    assert floors.train(counts(), [row((1, 2), (3,)), row((1, 2), (3, 4), -1)], 1) == both
    # another prompt that opens with the first token: 2 more tokens, which see 2 and 3 positions
    behind = Part(4 * W * 5 + 3 * SEEN * 11 + 4 * HEAD * 2 + 6 * ADAPTER * 5, 2 * 4 * (W + HEAD))
    assert floors.train(counts(), [row((1, 2), (3,)), row((1, 4), (3,))], 1) == behind


def test_a_floor_is_the_sum_of_what_bounds_each_part():
    parts = [Part(100, 10), Part(10, 100)]
    # 100 FLOPs at 10/s and 10 bytes at 5/s: 10 s and 2 s; 10 FLOPs and 100 bytes: 1 s and 20 s
    assert floors.seconds(parts, gemm=10, copy=5) == 30


def test_needs_of_the_phases_add_up_and_every_phase_has_some():
    work = workload.make_workload(workload.read_preset("tiny"), "cpu")
    needs, tokens = floors.needs(work), floors.tokens(work)
    assert set(needs) == set(PHASES)
    total = lambda name: sum(part.flops for part in needs[name])
    model, head = floors.count(parse_config(work.preset.shape), 4, "float32"), work.preset.head
    steps = [floors.train(model, rows, head) for own in work.rows for rows in own]
    assert total("local_step") == steps[0].flops
    trained = sum(step.flops for step in steps)
    assert total("round") == total("rollout") + total("revision") + trained + total("aggregation")
    # two clients x four prompts x four new tokens, two clients x two revisions x four
    assert (tokens["rollout"], tokens["revision"]) == (32, 16)


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m", "qwen2.5-1.5b"])
def test_a_workload_has_the_preset_s_counts_and_lengths(name):
    preset = workload.read_preset(name)
    work = workload.make_workload(preset, "cpu")
    mean, low, high = preset.lengths
    flat = [prompt for own in work.prompts for prompt in own]
    assert [len(own) for own in work.prompts] == [preset.prompts] * preset.clients
    assert all(low <= len(prompt) <= high for prompt in flat)
    assert np.mean([len(prompt) for prompt in flat]) == pytest.approx(mean, rel=0.1)
    assert all(prompt[: preset.head] == flat[0][: preset.head] for prompt in flat)
    for own, revised in zip(work.prompts, work.revisions, strict=True):
        assert len(revised) == preset.revisions
        for prompt, longer in zip(own, revised, strict=False):
            assert (
                len(longer) == len(prompt) + preset.longer
                and longer[preset.head :][:5] == prompt[preset.head :][:5]
            )
    assert len(work.questions) == preset.questions and len(set(work.options)) == preset.options == 4
    ids = {token for prompt in flat + work.questions for token in prompt}
    assert min(ids) >= 3 and max(ids) < preset.shape["vocab_size"]


def test_lengths_of_the_smollm2_preset_are_those_of_arc():
    rng = np.random.default_rng(1)
    lengths = [workload.question_length(rng, (119, 60, 232)) for _ in range(4000)]
    assert (
        np.mean(lengths) == pytest.approx(119, abs=1)
        and 60 <= min(lengths) < 75
        and 190 < max(lengths) <= 232
    )


def test_training_rows_come_from_the_pools_that_rollouts_give_without_replacement():
    preset = workload.read_preset("smollm2-135m")
    work = workload.make_workload(preset, "cpu")
    shared = 0
    for own, steps in zip(work.prompts, work.rows, strict=True):
        place = {tuple(prompt): index for index, prompt in enumerate(own)}
        assert len(steps) == preset.steps
        for rows in steps:
            assert [r.label for r in rows] == [1] * 4 + [-1] * 4
            assert len({(*r.prompt, *r.completion) for r in rows}) == 8  # none twice
            assert all(len(r.completion) == preset.new_tokens for r in rows)
            # 4 right at once give wins, 6 fixed a win and a lose of confidence 1, 6 never fixed a
            # lose of 0.5
            for r in rows:
                index = place[tuple(r.prompt)]
                assert index < 10 if r.label > 0 else index >= 4
                assert r.confidence == (0.5 if index >= 10 else 1.0)
            shared += len({tuple(r.prompt) for r in rows}) < 8
    assert shared  # some step has a win and a lose under one prompt


def test_everything_is_drawn_from_one_seed():
    preset = workload.read_preset("smollm2-135m")
    assert workload.make_workload(preset, "cpu") == workload.make_workload(preset, "cpu")
    shape = (64, 48)
    weight = workload.random_tensor("model.layers.0.mlp.up_proj.weight", shape)
    np.testing.assert_array_equal(
        weight, workload.random_tensor("model.layers.0.mlp.up_proj.weight", shape)
    )
    assert not np.array_equal(
        weight, workload.random_tensor("model.layers.1.mlp.up_proj.weight", shape)
    )
    assert weight.dtype == np.float32 and weight.var() == pytest.approx(1 / 48, rel=0.05)
    assert workload.random_tensor("model.norm.weight", (3,)).tolist() == [1, 1, 1]
    assert workload.random_tensor("layers.0.mlp.up_proj.lora_B.weight", (8, 2)).any()


def test_an_experiment_s_config_gives_its_sizes():
    config = default_config()
    config.rollout.examples, config.train.batch_size, config.lora.rank = 32, 6, 2
    preset = workload.config_preset(config, workload.read_preset("tiny").shape, str(workload.TINY))
    assert (preset.prompts, preset.right, preset.fixed, preset.revisions) == (32, 8, 12, 12)
    assert (preset.wins, preset.loses, preset.rank, preset.clients, preset.steps) == (6, 6, 2, 5, 5)
    config.train.remat = "auto"  # which names no remat that a decoder has
    auto = workload.config_preset(config, workload.read_preset("tiny").shape, "")
    assert (auto.remat, auto.rival_remat) == ("layers", True)


def test_the_rival_s_process_holds_no_jax():
    # and what its process imports of the commands: spear-jax, and the benchmark's own file
    code = "import sys; from spear_jax import __main__; from spear_jax.benchmark import __main__, rival, side"
    code += "; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def small(**changes):
    """The tiny preset with one client, greedy, and a margin that random tokens exceed."""
    preset = workload.read_preset("tiny")
    return workload.make_workload(
        dataclasses.replace(preset, temperature=0.0, margin=1e-6, **changes), "cpu"
    )


def test_our_side_lays_arrays_where_an_experiment_does_so_that_reading_compiles_once(monkeypatch):
    from spear_jax.benchmark import ours
    from spear_jax.rollout import sampler

    chosen = ours.sampling_config
    monkeypatch.setattr(
        ours, "sampling_config", lambda *a: dataclasses.replace(chosen(*a), max_rows=2)
    )
    system, before = ours.System(small()), sampler._prefill._cache_size()
    system.rollout()  # reads into a blank state, and then into one that was read into or decoded
    assert sampler._prefill._cache_size() == before + 1


@pytest.fixture(scope="module")
def both():
    """Both sides of the small workload in this process, without running a phase."""
    pytest.importorskip("torch", reason="the rival needs torch")
    pytest.importorskip("peft", reason="the rival needs peft")
    from spear_jax.benchmark import ours

    work = small()
    return work, ours.build(work).phases, rival.build(work).phases


@pytest.mark.live
def test_the_rival_s_local_step_has_our_loss(both):
    _, ours, theirs = both
    assert theirs["local_step"]()["loss"] == pytest.approx(ours["local_step"]()["loss"], abs=1e-4)


@pytest.mark.live
@pytest.mark.parametrize("phase", ["rollout", "revision"])
def test_the_rival_s_greedy_answers_are_ours(both, phase):
    work, ours, theirs = both
    answers = theirs[phase]()["answers"]
    assert answers == ours[phase]()["answers"]
    assert len(answers) == sum(map(len, work.prompts if phase == "rollout" else work.revisions))
    assert {len(answer) for answer in answers} == {work.preset.new_tokens}


@pytest.mark.live
def test_the_rival_chooses_as_we_do(both):
    _, ours, theirs = both
    assert theirs["evaluation"]()["choices"] == ours["evaluation"]()["choices"]


@pytest.mark.live
def test_random_weights_are_the_same_on_both_sides():
    pytest.importorskip("peft", reason="the rival needs peft")
    from spear_jax.benchmark import ours

    work = small(
        model="",
        shape=SHAPE | {"model_type": "qwen2", "vocab_size": 100, "max_position_embeddings": 200},
    )
    losses = [side.build(work).phases["local_step"]()["loss"] for side in (ours, rival)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--preset=tinny"], "unknown preset 'tinny'. Did you mean 'tiny'"),
        (["--phases=rollouts"], "unknown phase 'rollouts'. Did you mean 'rollout'"),
        (["--against=vllm"], "unknown rival"),
        (["--dtype=float16"], "Did you mean 'bfloat16'"),
        (["--repeats=0"], "at least 1"),
        (["--clients=1,x"], "--clients"),
        (["--clients=0"], "--clients"),
        (["--clients="], "--clients"),
        (["--clients=1", "--phases=round"], "leave out"),
        (["--out=speed.txt"], "ends in .json"),
        (["--model=no/where/here"], "no model folder"),
        (["--model=weights.gguf"], "folder or a Hub id"),
        (["--preset=tiny", "--config=configs/quickstart.py"], "one of the two"),
        (["--prest=tiny"], "unknown argument"),
        (["--config=configs/quickstart.py", "--config.train.step=1"], "Did you mean 'train.steps'"),
    ],
)
def test_a_bad_request_is_a_user_error_before_anything_runs(monkeypatch, flags, words):
    monkeypatch.setattr(processes, "ask", None)
    with pytest.raises(UserError, match=words):
        benchmark.main(flags)


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else object()
    )
    with pytest.raises(UserError, match=r"needs torch, .*spear-jax\[torch\]"):
        benchmark.main(["--against=hf"])


def test_too_little_memory_is_a_user_error_that_says_how_much(monkeypatch):
    free = {"platform": "cpu", "device": "cpu", "free_bytes": 2 * 10**9}
    monkeypatch.setattr(processes, "ask", lambda work, question: free)
    monkeypatch.setattr(rival, "require", lambda: None)  # the rival's packages need not be here
    for flags in ([], ["--against=hf"], ["--clients=1"]):
        with pytest.raises(
            UserError, match=r"'qwen2.5-1.5b' needs about \d+\.\d GB .* 2\.0 GB are free"
        ):
            benchmark.main(["--preset=qwen2.5-1.5b", *flags])
    # weights alone: 1.54e9 of 2 bytes, and with the rival twice as many
    work = workload.make_workload(workload.read_preset("qwen2.5-1.5b"), "gpu")
    alone, two = floors.memory_needed(work, False), floors.memory_needed(work, True)
    assert 3.1e9 < alone < 60e9 and two > alone + 3.1e9


def test_a_model_with_too_few_positions_is_a_user_error():
    preset = dataclasses.replace(workload.read_preset("tiny"), lengths=(400, 300, 600))
    with pytest.raises(UserError, match="512 positions"):
        workload.make_workload(preset, "cpu")


def test_the_high_water_mark_can_be_reset_on_linux():
    if not machine.CLEAR.exists():
        pytest.skip("no /proc/self/clear_refs here")
    machine.reset_peak()
    held = np.ones(40_000_000, np.uint8)
    high = machine.peak_bytes()
    del held
    assert machine.peak_bytes() > high - 1_000_000
    assert machine.reset_peak() < high - 30_000_000 and machine.peak_bytes() < high - 30_000_000


def answer(seconds, **more):
    return {"seconds": seconds, "resting_bytes": 10, "peak_bytes": int(100 * seconds), **more}


@pytest.mark.parametrize(
    "settle, seconds, calls",
    [(10.0, 2.0, 6), (0.0, 4.0, 1), (2.0, 4.0, 1), (1.5, 4.0, 1), (3.0, 5.0, 2)],
)
def test_a_phase_is_timed_once_it_has_settled(monkeypatch, settle, seconds, calls):
    takes, clock = [4.0, 5.0, 3.0, 1.0, 2.0, 9.0], [0.0]

    def phase():
        clock.append(clock[-1] + takes[len(clock) - 1])
        return {"calls": len(clock) - 1}

    monkeypatch.setattr(side, "time", types.SimpleNamespace(perf_counter=lambda: clock[-1]))
    # ten seconds: three runs settle, and those of 1, 2 and 9 s are timed
    assert side.run_settled(phase, settle) == ({"calls": calls}, seconds)


def test_the_first_call_stands_apart_from_the_repeats():
    told = report.summarise([answer(9, loss=3.0), answer(3), answer(1), answer(2)])
    assert told["seconds"] == {"median": 2, "min": 1, "all": [3, 1, 2]}
    assert (told["first_seconds"], told["first_peak_bytes"], told["peak_bytes"]) == (9, 900, 300)
    assert told["loss"] == 3.0 and not {"padding", "compile_seconds"} & set(told)
    compiled = lambda programs, seconds: {
        "compile/programs": float(programs),
        "compile/seconds": seconds,
    }
    told = report.summarise(
        [
            answer(9, **compiled(4, 6.5)),
            answer(2, **compiled(1, 0.5)),
            answer(2, **compiled(2, 0.1)),
        ]
    )
    assert (told["compile_programs"], told["compile_seconds"], told["compiled_later"]) == (
        4,
        6.5,
        3,
    )


def test_a_ratio_is_the_rival_s_seconds_over_ours():
    work = workload.make_workload(workload.read_preset("tiny"), "cpu")
    found = {"gemm": {"float32": 1e9}, "copy": 1e9}
    told = report.tell(
        "rollout", {"ours": [answer(9), answer(2)], "rival": [answer(9), answer(3)]}, work, found
    )
    assert told["ratio"] == told["ratio_of_min"] == 1.5 and told["ours"]["tokens_per_second"] == 16
    assert told["floor_seconds"] == floors.seconds(floors.needs(work)["rollout"], 1e9, 1e9)
    assert told["ours"]["floor_share"] == told["floor_seconds"] / 2


def run(*flags):
    """The command's result, its stdout and its stderr."""
    command = [sys.executable, "-m", "spear_jax.benchmark", *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done


@pytest.mark.live
def test_the_command_measures_both_sides_and_writes_its_files(tmp_path):
    pytest.importorskip("torch", reason="the rival needs torch")
    pytest.importorskip("peft", reason="the rival needs peft")
    result, done = run("--against=hf", "--repeats=2", f"--out={tmp_path}/speed.json")
    assert set(result["ratios"]) == {"rollout", "revision", "evaluation", "local_step", "round"}
    assert list(result["phases"]) == list(PHASES)
    for name, phase in result["phases"].items():
        assert phase["bytes"] > 0 and phase["floor_seconds"] > 0
        for who in ("ours", "rival"):
            told = phase[who]
            assert (
                len(told["seconds"]["all"]) == 2
                and 0 < told["seconds"]["min"] <= told["seconds"]["median"]
            )
            assert told["peak_bytes"] >= told["resting_bytes"] > 50e6 and told["first_seconds"] > 0
            assert 0 < told["floor_share"] < 1
        ours = phase["ours"]
        assert ours["compiled_later"] == 0 and 0 <= ours["compile_seconds"] < ours["first_seconds"]
        assert (ours["compile_programs"] > 0) == (
            name != "checkpoint"
        ) and "compile_seconds" not in phase["rival"]
        ratio = phase["rival"]["seconds"]["median"] / phase["ours"]["seconds"]["median"]
        assert phase["ratio"] == pytest.approx(ratio) and result["ratios"].get(
            name, ratio
        ) == pytest.approx(ratio)
    for name in (
        "local_step",
        "round",
    ):  # the second has two clients of two steps, each from the global adapter
        ours, theirs = result["phases"][name]["ours"], result["phases"][name]["rival"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4) and 0 <= ours["padding"] < 1
    assert result["phases"]["rollout"]["ours"]["tokens_per_second"] > 0
    assert (
        result["machine"]["cores"] == machine.cores() and result["machine"]["gemm"]["float32"] > 1e8
    )
    assert result["machine"]["copy"] > 1e8 and "torch" in result["versions"]
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    assert result["files"] == ["speed.json", "speed.md"]
    assert (tmp_path / "speed.md").read_text().count("\n") == 2 + len(PHASES)
    assert "local_step" in done.stdout and done.stderr.count("\n") == len(PHASES)


def test_the_command_measures_cohorts_in_rising_order_and_draws_them(tmp_path):
    result, done = run(
        "--clients=4,1", "--repeats=1", "--quiet", f"--out={tmp_path}/new/clients.json"
    )
    assert [cohort["clients"] for cohort in result["cohorts"]] == [1, 4] and "phases" not in result
    assert (result["done"], result["left"]) == ([1, 4], [])
    assert json.loads((tmp_path / "new" / "clients.json").read_text()) == result
    for cohort in result["cohorts"]:
        assert cohort["seconds_per_client"] == cohort["seconds"]["median"] / cohort["clients"]
        assert cohort["peak_bytes"] > 50e6
    assert result["files"] == ["clients.json", "clients.md", "clients.png", "clients.svg"]
    assert all((tmp_path / "new" / name).stat().st_size > 0 for name in result["files"])
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_a_line_a_part_has_its_time_and_an_estimate_of_what_is_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    told = progress.Progress(
        {"1 clients": 1.0, "4 clients": 4.0, "10 clients": 10.0}, 2, False, False
    )
    for part, took in (("1 clients", 6.0), ("4 clients", 9.0), ("10 clients", 20.0)):
        told.call(part)
        told.called()
        clock[0] += took
        told.ended(part)
    # 6 s for one client: 84 s for 14 more; 15 s for five: 30 s for ten more
    assert capsys.readouterr().err.splitlines() == [
        "1 clients: 6 s (1 of 3), about 84 s left",
        "4 clients: 9 s (2 of 3), about 30 s left",
        "10 clients: 20 s (3 of 3)",
    ]
    for bar, quiet in ((True, False), (False, True)):
        silent = progress.Progress({"rollout": 1.0}, 1, bar, quiet)
        silent.ended("rollout")
        silent.close()
        assert "(1 of 1)" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "end, code, words", [(signal.SIGKILL, -signal.SIGKILL, ""), (signal.SIGINT, 130, "stopped; ")]
)
def test_a_benchmark_that_is_stopped_leaves_the_phases_it_has_done(tmp_path, end, code, words):
    out = tmp_path / "speed.json"
    flags = ["--phases=aggregation,evaluation,local_step", "--repeats=1", f"--out={out}"]
    # a test run in a shell's background ignores interrupts, and so would what it starts
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-m", "spear_jax.benchmark", *flags]
    process = subprocess.Popen(
        [sys.executable, "-c", heed, *command], env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.time() + 240
    while not out.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(1)  # while a process starts, an interrupt is not heard; the next phase takes longer
    process.send_signal(end)
    stdout, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    kept = json.loads(out.read_text())
    # phases run in their own order
    assert kept["done"] == ["evaluation"] and kept["left"] == ["local_step", "aggregation"]
    assert (
        list(kept["phases"])
        == kept["done"]
        == [line.partition(":")[0] for line in told.splitlines()[:1]]
    )
    assert kept["phases"]["evaluation"]["ours"]["seconds"]["median"] > 0
    assert (tmp_path / "speed.md").read_text().count("\n") == 3
    assert "(1 of 3), about" in told and words in told and stdout == ""
    assert {file.name for file in tmp_path.iterdir()} == {"speed.json", "speed.md"}


def test_help_names_the_flags_of_a_short_benchmark(capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--help"])
    shown = capsys.readouterr().out
    examples = shown[shown.index("examples:") :]
    assert ended.value.code == 0 and "--phases=" in examples and "--repeats=" in examples


def test_a_mistake_ends_the_command_with_2_and_one_message(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.run(benchmark.main, ["--preset=tinny"])
    told = capsys.readouterr()
    assert (
        ended.value.code == 2
        and told.out == ""
        and told.err.startswith("error: unknown preset")
        and told.err.count("\n") == 1
    )
