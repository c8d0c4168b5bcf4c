"""`benchmark --compile-for`: counts by hand, and the embedded model's programs on accelerators that
are not there.

The second part needs the compilers of `pip install -e .[test,aot]`, and is skipped without them.
Memory and kernels are compared with fixtures/compile_for.json where JAX's version is in it.
"""

import importlib.metadata
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from processes import environment

from spear_jax.benchmark import __main__ as benchmark
from spear_jax.benchmark.aot import measure, targets
from spear_jax.benchmark.aot.flops import count_flops, count_heads
from spear_jax.benchmark.aot.hlo import Buffer, Count, Module
from spear_jax.core.errors import UserError
from spear_jax.models.config import parse_config

TABLE = pathlib.Path(__file__).parents[1] / "fixtures" / "compile_for.json"
STRUCTURE = ("train", "prefill", "decode", "merge", "evaluation", "aggregation")

# A loop over data, and in it one of five turns: each turn slices a row, adds to it, and writes it
# back in place. Then a copy, and a sum over two devices.
TEXT = """HloModule jit_f, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%fused_row (param_0: f32[8,4], param_1: s32[], param_2: f32[1,4]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,4]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,4}
  %param_2 = f32[1,4]{1,0} parameter(2)
  %sum = f32[1,4]{1,0} add(%row, %param_2)
  ROOT %written = f32[8,4]{1,0} dynamic-update-slice(%param_0, %sum, %param_1, %zero)
}

%inner (turn: (f32[8,4], s32[], f32[1,4])) -> (f32[8,4], s32[], f32[1,4]) {
  %turn = (f32[8,4]{1,0}, s32[], f32[1,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%turn), index=0
  %i = s32[] get-tuple-element(%turn), index=1
  %y = f32[1,4]{1,0} get-tuple-element(%turn), index=2
  %in_place = f32[8,4]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%fused_row
  ROOT %next = (f32[8,4]{1,0}, s32[], f32[1,4]{1,0}) tuple(%in_place, %i, %y)
}

%outer (turn.1: (f32[8,4], s32[], f32[1,4])) -> (f32[8,4], s32[], f32[1,4]) {
  %turn.1 = (f32[8,4]{1,0}, s32[], f32[1,4]{1,0}) parameter(0)
  ROOT %five = (f32[8,4]{1,0}, s32[], f32[1,4]{1,0}) while(%turn.1), condition=%c, body=%inner, FIVE
}

ENTRY %main (a: f32[8,4], b: f32[1,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[1,4]{1,0} parameter(1)
  %start = s32[] constant(0)
  %all = (f32[8,4]{1,0}, s32[], f32[1,4]{1,0}) tuple(%a, %start, %b)
  %loop = (f32[8,4]{1,0}, s32[], f32[1,4]{1,0}) while(%all), condition=%c, body=%outer
  %out = f32[8,4]{1,0} get-tuple-element(%loop), index=0
  %moved = f32[8,4]{0,1:T(8,128)S(1)} copy(%out)
  ROOT %reduced = f32[8,4]{1,0} all-reduce(%moved), replica_groups={{0,1}}, to_apply=%add
}
""".replace("FIVE", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_kernels_bytes_and_collectives_of_a_module_by_hand():
    module = Module(TEXT)
    # a copy and a sum; five fusions each pass of the outer loop
    assert module.kernels == Count(once=2, loop=5)
    # the copy reads 128 bytes into vector memory, the sum reads them there and writes 128; each
    # fusion reads a row of 16 bytes in place, the row y and the number, and writes a row
    assert module.bytes == Count(once=128 + 128, loop=5 * (16 + 16 + 4 + 16))
    once = {"once": 1, "loop": 0.0}
    assert module.collectives() == {
        "all-reduce": {"calls": once, "bytes": {"once": 128, "loop": 0}}
    }
    assert Buffer("f32", (8, 4), on_chip=True) in [buffer for buffer, _ in module.buffers()]


# A model of two layers, width 4 and mlp width 6, for which an array of 3 clients' gate weights is
# made, one whole gate is gathered, and logits of 5 positions stand in two halves.
BAD = """HloModule jit_f

ENTRY %main (gate: f32[4,6], part: f32[2,4,3]) -> f32[2,4,6] {
  %gate = f32[4,6]{1,0} parameter(0)
  %part = f32[2,4,3]{2,1,0} parameter(1)
  %clients = f32[3,4,6]{2,1,0} broadcast(%gate), dimensions={1,2}
  %one = f32[1,4,6]{2,1,0} copy(%gate)
  %logits = f32[5,8]{1,0} broadcast(%gate), dimensions={}
  ROOT %whole = f32[2,4,6]{2,1,0} all-gather(%part), dimensions={2}
}
"""


def test_a_loop_that_tells_its_length_by_its_condition_is_known():
    condition = """
%c (turn.2: (f32[8,4], s32[], f32[1,4])) -> pred[] {
  %turn.2 = (f32[8,4]{1,0}, s32[], f32[1,4]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%turn.2), index=1
  %most = s32[] constant(3)
  ROOT %less = pred[] compare(%at, %most), direction=LT
}

ENTRY"""
    # the outer loop then runs three times; the inner one says five of itself
    assert Module(TEXT.replace("\nENTRY", condition)).kernels == Count(once=2 + 3 * 5)


def test_a_batched_base_and_whole_logits_are_seen():
    model = parse_config(
        {
            "model_type": "llama", "vocab_size": 16, "hidden_size": 4, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6,
        }
    )  # fmt: skip
    module = Module(BAD)
    whole = {"gathered": ["f32[2,4,6]"]}
    assert measure.weights(module, model, "float32", 3) == {"batched": ["f32[3,4,6]"], **whole}
    # of one client nothing is batched, whatever stands together
    assert measure.weights(module, model, "float32", 1) == {"batched": [], **whole}
    assert measure.weights(Module(TEXT), model, "float32", 3) == {"batched": [], "gathered": []}
    assert measure.largest_logits(module, 16, 2) == Buffer("f32", (5, 8))
    assert measure.largest_logits(module, 16, 1) is None


def test_a_module_that_jax_compiled_is_read_as_it_is():
    rows, width, steps = 32, 64, 7

    def f(x, w):
        return jax.lax.fori_loop(0, steps, lambda i, x: jnp.tanh(x @ w), x)

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, width), (width, width)))
    compiled = jax.jit(f).lower(*shapes).compile()
    module = Module(compiled.as_text())
    # a kernel at least for each product, none in a loop of unknown length
    assert module.kernels.once >= steps and module.kernels.loop == 0
    least = steps * 4 * (width * width + 2 * rows * width)
    assert least <= module.bytes.once <= 6 * least
    assert any(buffer.dims == (rows, width) for buffer, _ in module.buffers())


def test_operations_of_loops_and_branches_by_hand():
    vocabulary = 11

    def f(x, w, head, turns):
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)  # 3 products
        x = jax.lax.while_loop(  # 2 a pass, 1 of them with the head
            lambda c: c[1] < turns, lambda c: (((c[0] @ w) @ head) @ head.T, c[1] + 1), (x, 0)
        )[0]
        return jax.lax.cond(turns > 2, lambda x: x @ w, lambda x: x, x)  # 1

    shapes = ((5, 4), (4, 4), (4, vocabulary), ())
    args = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes[:3])
    jaxpr = jax.jit(f).trace(*args, jax.ShapeDtypeStruct((), jnp.int32)).jaxpr.jaxpr
    product, with_head = 2 * 5 * 4 * 4, 2 * 5 * 4 * vocabulary
    assert count_flops(jaxpr) == Count(once=4 * product, loop=product + 2 * with_head)
    assert count_heads(jaxpr, vocabulary) == Count(once=0, loop=1)


def test_seconds_of_a_phase_by_hand():
    target = targets.Target("gpu", "", (), 1, flops=100.0, bandwidth=10.0, launch=0.5)
    found = measure.seconds({"flops": 90.0, "bytes": 30.0, "kernels": 4.0}, target)
    # 90 of 45 % of 100; 30 / 10; 4 x 0.5
    assert found == {"compute": 2.0, "memory": 3.0, "launch": 2.0, "least": 3.0, "most": 5.0}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--compile-for=h100"], "h100-1"),
        (["--compile-for=h100-1", "--preset=tiny"], "--preset beside --compile-for"),
        (["--compile-for=h100-1", "--phases=rollout"], "--phases beside --compile-for"),
        (["--programs=train"], "--programs is for --compile-for"),
        (["--compile-for=h100-1", "--out=table.txt"], "ends in .json"),
        (["--compile-for=h100-1", "--config.lora.rnk=3"], "lora.rank"),
    ],
)
def test_impossible_flags_are_refused_before_anything_compiles(flags, told):
    with pytest.raises(UserError, match=told):
        benchmark.main(flags)


@pytest.mark.parametrize("name", ["h100-1", "tpu-v5e-1"])
def test_without_a_compiler_the_remedy_is_told(name):
    if not targets.missing(targets.TARGETS[name]):
        pytest.skip("the compiler is installed")
    with pytest.raises(UserError, match=r'pip install "spear-jax\[aot\]"'):
        benchmark.main([f"--compile-for={name}", "--config=spear:facts,tiny"])


def compiled(tmp_path_factory, name: str, *flags: str) -> dict:
    """The result of the command; skips where the target's compiler is not installed."""
    if lacking := targets.missing(targets.TARGETS[name]):
        pytest.skip(f"{lacking!r} cannot be imported; pip install -e .[test,aot]")
    out = tmp_path_factory.mktemp(name) / "result.json"
    # the flags of this suite's own compilation are for CPUs
    variables = environment() | {"XLA_FLAGS": ""}
    command = [sys.executable, "-m", "spear_jax.benchmark", f"--compile-for={name}", *flags]
    done = subprocess.run(
        [*command, f"--out={out}"], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result == json.loads(done.stdout.splitlines()[-1])
    return result


def check_structure(result: dict) -> None:
    """What holds of every program, on every target and for every model."""
    programs = result["programs"]
    assert programs and not result["left"]
    for name, facts in programs.items():
        assert facts["batched"] == [] and facts["gathered"] == [], name
        assert facts["memory_share"] < 1, name
        if facts["scored_bytes"]:  # never all scored positions at once
            assert facts["logits_bytes"] <= facts["scored_bytes"] / 2, name
        # The state is written where it lies: keys, values and completions. Where the base is split,
        # the first prefill splits the new state likewise, and so makes another one.
        split = result["mesh"]["model"] > 1
        if "decode" in name or ("prefill" in name and not split):
            held = facts["memory"]
            assert held["aliased"] >= 0.99 * held["outputs"] > 0, name
        if "decode" in name:
            assert facts["tokens_a_pass"] >= 1 and facts["kernels"]["loop"] > 0


def check_numbers(result: dict) -> None:
    """Memory within 10 % of the table, and no more kernels a token."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    version = importlib.metadata.version("jax")
    if version not in table:
        pytest.skip(f"no numbers of JAX {version} in {TABLE.name}")
    known = table[version][result["target"]]
    assert known.keys() == result["programs"].keys()
    for name, facts in result["programs"].items():
        assert facts["memory"]["needs"] == pytest.approx(known[name]["needs"], rel=0.1), name
        if "decode" in name:
            kernels = facts["kernels"]["loop"] / facts["tokens_a_pass"]
            assert kernels <= known[name]["kernels"], name


@pytest.fixture(scope="module")
def on_h100(tmp_path_factory):
    # With a vocabulary so small, all positions would have logits at once. These are two chunks, and
    # no projection has their size.
    flags = ("--config=spear:facts,tiny", "--config.train.head_chunk=96")
    return compiled(tmp_path_factory, "h100-1", *flags)


@pytest.fixture(scope="module")
def on_v5e(tmp_path_factory):
    flags = ("--config=spear:facts,tiny", "--programs=prefill,decode,merge")
    return compiled(tmp_path_factory, "tpu-v5e-1", *flags)


def test_programs_of_a_round_compile_for_an_h100(on_h100):
    assert set(STRUCTURE) <= on_h100["programs"].keys()
    check_structure(on_h100)


def test_prefill_decode_and_merge_compile_for_a_tpu(on_v5e):
    assert list(on_v5e["programs"]) == ["merge", "prefill", "decode"]
    check_structure(on_v5e)


def test_memory_and_kernels_on_an_h100_are_the_tables(on_h100):
    check_numbers(on_h100)


def test_memory_and_operations_on_a_tpu_are_the_tables(on_v5e):
    check_numbers(on_v5e)


def test_a_round_is_the_sum_of_its_programs(on_h100):
    rows = {row["phase"]: row for row in on_h100["round"]}
    programs, (rollout, *revisions) = on_h100["programs"], on_h100["generations"]
    assert (rollout["stage"], rollout["prompts"]) == ("rollout", 896)
    decode = programs["decode"]
    steps = -(-896 // rollout["slots"]) * 2  # three new tokens, the first of them by prefill
    assert rollout["steps"] == steps
    passes = steps / decode["tokens_a_pass"]
    assert rows["rollout decode"]["kernels"] == pytest.approx(
        decode["kernels"]["once"] + passes * decode["kernels"]["loop"]
    )
    assert {"revision prefill", "revision decode", "merge", "train", "aggregation"} <= rows.keys()
    assert len(revisions) == 2 and all(one["prompts"] == 336 for one in revisions)


QWEN = "arc_challenge,qwen2.5-1.5b"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("h100-1", [f"--config=spear:{QWEN}"]),
        ("h100-1", [f"--config=grpo:{QWEN}", "--programs=train,prefill,decode"]),
        ("h100-1", [f"--config=iris:{QWEN}", "--programs=train,score"]),
        ("h100-8", [f"--config=spear:{QWEN}", "--config.devices.model=2",
                    "--config.federation.clients_per_round=8"]),
        ("tpu-v5e-1", [f"--config=spear:{QWEN}", "--programs=merge,prefill,decode"]),
        ("tpu-v5e-1", [f"--config=spear:{QWEN}", "--programs=train", "--config.lora.dropout=0.0"]),
        ("tpu-v5e-8", [f"--config=spear:{QWEN}", "--programs=merge,prefill,decode",
                       "--config.devices.model=2"]),
    ],
)  # fmt: skip
def test_a_real_model_compiles_and_fits(tmp_path_factory, name, flags):
    check_structure(compiled(tmp_path_factory, name, *flags))
