"""Worker processes: what they tell, what happens when one dies, and which cores each has."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from spear_jax.core.errors import UserError
from spear_jax.experiment.processes import Peer, ask, ask_all, run


def tell_cores(name, items):
    for key in items:
        yield key, ",".join(map(str, sorted(os.sched_getaffinity(0))))


def die_at_two(name, items):
    for key in items:
        if key == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield key, ""


def double(number):
    return 2 * number


def exit_at_once(code):
    os._exit(code)


def counter(start):
    """Answers with a running sum."""
    total = [start]

    def answer(number):
        if number < 0:
            raise UserError(f"{number} is negative")
        if number == 13:
            os._exit(13)
        total[0] += number
        return total[0]

    return answer


def test_each_process_has_its_own_share_of_the_cores_and_this_one_keeps_its_own():
    before = os.sched_getaffinity(0)
    handler = signal.getsignal(signal.SIGINT)
    told = list(
        run(tell_cores, [("a", {0: None, 1: None}), ("b", {0: None}), ("none", {})], jobs=2)
    )
    assert sorted(told)[0][:2] == ("a", 0) and [name for name, _, _ in sorted(told)] == [
        "a",
        "a",
        "b",
    ]
    cores = sorted(before)
    shares = {",".join(map(str, cores[slot % len(cores) :: 2])) for slot in range(2)}
    assert {text for _, _, text in told} <= shares
    assert os.sched_getaffinity(0) == before and signal.getsignal(signal.SIGINT) is handler


def test_a_dying_process_fails_its_item_and_the_others_go_on():
    told = list(run(die_at_two, [("a", {1: None, 2: None, 3: None}), ("b", {1: None})], jobs=1))
    assert [(name, key) for name, key, _ in told] == [("a", 1), ("a", 2), ("a", 3), ("b", 1)]
    assert [error for _, _, error in told] == ["", "its process ended with code -9", "", ""]


def test_a_question_is_answered_by_another_process_or_raises():
    assert ask(double, 21) == 42
    assert ask_all(double, [3, 1]) == [6, 2] and ask_all(double, []) == []
    with pytest.raises(RuntimeError, match="code 3"):
        ask(exit_at_once, 3)


def test_a_peer_keeps_what_it_made_and_tells_a_user_s_mistake():
    with Peer(counter, 100) as peer:
        assert [peer.ask(1), peer.ask(2)] == [101, 103]
        with pytest.raises(UserError, match="-1 is negative"):
            peer.ask(-1)
        assert peer.ask(0) == 103
    peer._process.join()
    assert peer._process.exitcode == 0
    with Peer(counter, 0) as peer:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="code 13"):
                peer.ask(13)


PARENT = """import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
import pathlib, sys, time
from spear_jax.experiment import processes
def work(name, items):
    pathlib.Path(sys.argv[1]).write_text(str(__import__("os").getpid()))
    time.sleep(600)
    yield 0, ""
if __name__ == "__main__":
    list(processes.run(work, [("a", {0: None})], 1))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_ends_with_its_parent_however_that_ends(tmp_path, end):
    script, told = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(PARENT)
    root = pathlib.Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, str(script), str(told)],
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 30
    while not (told.exists() and told.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    child = int(told.read_text())
    parent.send_signal(end)
    parent.wait(timeout=20)
    while pathlib.Path(f"/proc/{child}").exists() and time.time() < deadline:
        state = pathlib.Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":  # ended; nobody has collected it in this container
            return
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{child}").exists()
