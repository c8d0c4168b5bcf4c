"""Records what a refactoring must not change: every program that JAX compiles, and the bits of
trained adapters.

    python tests/refactoring_gate.py record BEFORE.json     # in the tree as it was
    python tests/refactoring_gate.py record AFTER.json      # in the tree as it is
    python tests/refactoring_gate.py compare BEFORE.json AFTER.json

Each case trains the embedded model for two rounds through the command line, so that the script
needs no name of the code that moves. A program is its StableHLO text without locations, module and
function names, and the names of arguments and results. A case's digest is the sha256 that its last
checkpoint carries: of every bit of adapter, moments, algorithm state, round and key.

`compare` prints a line a case and exits with 1 where a digest differs. A program may differ where
the change is meant to change programs; a digest may not. CONTRIBUTING.md says when to run it.
"""

import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
METHODS = "spear feedback_sft grpo opsd rltf_sd sft dpo spin tpaw iris space spif tspin".split()
SMALL = {
    "rounds": 2,
    "federation.num_clients": 3,
    "federation.clients_per_round": 2,
    "rollout.examples": 8,
    "rollout.max_concurrent_sequences": 32,
    "train.steps": 2,
    "train.batch_size": 16,
    "eval.limit": 16,
    "eval.rows": 8,
    "lora.rank": 4,
    "record_traces": False,
}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "quickstart": ("configs/quickstart.py", {"rounds": 2}),
    **{method: (f"configs/{method}.py:facts,tiny,small", SMALL) for method in METHODS},
    "reasoned": (
        "configs/quickstart.py:reasoned",
        SMALL | {"train.batch_size": 4, "lora.dropout": 0.1},
    ),
    "reference": ("configs/spear.py:facts,tiny,small,reference", SMALL),
    "local": ("configs/spear.py:facts,tiny,small", SMALL | {"federation.aggregation": "local"}),
    "fedadam": ("configs/spear.py:facts,tiny,small", SMALL | {"federation.aggregation": "fedadam"}),
    "four_devices": ("configs/spear.py:facts,tiny,small", SMALL | {"devices.model": 2}),
    "grpo_updates": ("configs/grpo.py:facts,tiny,small", SMALL | {"grpo.updates": 2}),
    "opsd_ema": ("configs/opsd.py:facts,tiny,small", SMALL | {"opsd.teacher": "ema"}),
}
DEVICES = {"four_devices": 4}


def main(argv: list[str]) -> int:
    if len(argv) == 2 and argv[0] == "record":
        pathlib.Path(argv[1]).write_text(json.dumps(record(), indent=1) + "\n")
        return 0
    if len(argv) == 3 and argv[0] == "compare":
        return compare(*(json.loads(pathlib.Path(file).read_text()) for file in argv[1:]))
    print(__doc__, file=sys.stderr)
    return 2


def record() -> dict[str, dict[str, object]]:
    """{case: {"digest", "programs": {sha256: count}}} of this tree, two cases at a time."""
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("PROCESSES", "2"))) as pool:
        return dict(zip(CASES, pool.map(run_case, CASES), strict=True))


def run_case(name: str) -> dict[str, object]:
    """Trains one case; raises RuntimeError with the command's last words where it fails."""
    config, changes = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        workdir, dumped = pathlib.Path(folder, "run"), pathlib.Path(folder, "ir")
        command = [
            sys.executable,
            "-m",
            "spear_jax.train",
            f"--config={config}",
            f"--workdir={workdir}",
            "--quiet",
        ]
        command += [f"--config.{field}={value}" for field, value in changes.items()]
        flags = f"--xla_force_host_platform_device_count={DEVICES.get(name, 1)} --xla_backend_optimization_level=0"
        env = os.environ | {
            "JAX_DUMP_IR_TO": str(dumped),
            "JAX_COMPILATION_CACHE_DIR": "",
            "XLA_FLAGS": f"{flags} --xla_llvm_disable_expensive_passes=true",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        programs = collections.Counter(
            program_digest(file.read_text()) for file in dumped.glob("*.mlir")
        )
        print(f"{name}: {sum(programs.values())} programs", file=sys.stderr)
        return {"digest": checkpoint_digest(workdir), "programs": dict(sorted(programs.items()))}


def program_digest(text: str) -> str:
    """sha256 of a program's text without what only names it."""
    text = re.sub(r"^#loc.*\n", "", text, flags=re.M)
    text = re.sub(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", text)
    text = re.sub(r"module @\S+", "module", text)
    text = re.sub(
        r'(?:jax\.result_info|jax\.arg_info|jax\.buffer_donor_info) = "(?:[^"\\]|\\.)*"', "", text
    )
    names: dict[str, str] = {}
    text = re.sub(
        r'@(?:"[^"]*"|[\w.$-]+)', lambda found: names.setdefault(found[0], f"@f{len(names)}"), text
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checkpoint_digest(workdir: pathlib.Path) -> str:
    """The digest that the newest checkpoint carries."""
    newest = max(workdir.glob("checkpoints/[0-9]*"), key=lambda folder: int(folder.name))
    return json.loads(next((newest / "meta").rglob("metadata")).read_text())["digest"]


def compare(before: dict, after: dict) -> int:
    """A line a case; 1 where a digest differs or a case is missing."""
    wrong = 0
    for name in before:
        if name not in after:
            print(f"{name:14} missing")
            wrong = 1
            continue
        old, new = (
            collections.Counter(before[name]["programs"]),
            collections.Counter(after[name]["programs"]),
        )
        same = before[name]["digest"] == after[name]["digest"]
        wrong |= not same
        programs = (
            f"{(old & new).total()} equal, {(old - new).total()} gone, {(new - old).total()} new"
        )
        print(f"{name:14} digest {'equal' if same else 'DIFFERS'}   programs: {programs}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
