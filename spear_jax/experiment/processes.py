"""Worker processes that share the cores: each starts fresh, tells what it has done as it goes, and
ends with its parent.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from typing import Any

from spear_jax.core.errors import UserError

Items = dict[Any, Any]


class Peer:
    """A process of its own with all the cores, which makes something once and then answers one
    question after the other.

    A context manager: leaving it ends the process.

    Args: make: make(*args) is called in that process at the first question, and returns what
        answers a question (never None).
    """

    def __init__(self, make: Callable[..., Callable[[Any], Any]], *args: Any):
        self._process, self._channel = _start(_serve, (make, args), 0, 1, duplex=True)

    def ask(self, question: Any) -> Any:
        """The answer; raises the UserError that was raised there, RuntimeError where the process
        ends without answer.
        """
        try:
            self._channel.send(question)
            answer = self._channel.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(
                f"a process ended with code {self._process.exitcode}; the cause is above"
            ) from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:  # it may clear up behind itself; after an error nobody waits for that
            with contextlib.suppress(ConnectionError):
                self._channel.send(None)
            self._process.join(timeout=10)
        self._process.terminate()


def ask(work: Callable[[Any], Any], question: Any) -> Any:
    """work(question) in a process of its own, which has all the cores; raises as `ask_all`."""
    return ask_all(work, [question])[0]


def ask_all(work: Callable[[Any], Any], questions: list[Any]) -> list[Any]:
    """work(question) of each, all at the same time, each in a process of its own with its share of
    the cores; raises RuntimeError where one ends without answer.
    """
    started = [
        _start(_answer, (work, question), slot, len(questions))
        for slot, question in enumerate(questions)
    ]
    try:
        return [_answered(*one) for one in started]
    finally:
        for process, _ in started:
            process.terminate()


def _answered(process: multiprocessing.Process, receiver: connection.Connection) -> Any:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a process ended with code {process.exitcode}; the cause is above"
        ) from None


def run(
    work: Callable[[str, Items], Iterable[tuple[Any, str]]],
    tasks: list[tuple[str, Items]],
    jobs: int,
) -> Iterator[tuple[str, Any, str]]:
    """Runs the tasks, each in a process of its own, `jobs` at a time, and yields (task, item,
    error) as items end.

    A process that dies fails the item it was at; the task's other items get a new one. Leaving the
    loop ends the processes.

    Args:
        work: takes a task's name and items; yields each item's key, in order, with "" or what went
            wrong.
        tasks: names and items; a task without items is left out.
        jobs: processes at a time; each has its own share of the cores.
    """
    waiting = collections.deque((name, dict(items)) for name, items in tasks if items)
    running: dict[connection.Connection, tuple[multiprocessing.Process, int, str, Items]] = {}
    free = list(range(jobs))[::-1]
    try:
        while waiting or running:
            while waiting and free:
                slot, (name, items) = free.pop(), waiting.popleft()
                process, receiver = _start(_tell, (work, name, items), slot, jobs)
                running[receiver] = (process, slot, name, items)
            for receiver in connection.wait(list(running)):
                process, slot, name, items = running[receiver]
                try:
                    key, error = receiver.recv()
                except EOFError:  # it has ended: done, or killed in the middle of an item
                    process.join()
                    del running[receiver]
                    free.append(slot)
                    if not items:
                        continue
                    key, error = (
                        next(iter(items)),
                        f"its process ended with code {process.exitcode}",
                    )
                    waiting.extendleft([(name, items)] if len(items) > 1 else [])
                del items[key]
                yield name, key, error
    finally:
        for process, *_ in running.values():
            process.terminate()


def _start(
    target: Callable, args: tuple, slot: int, jobs: int, duplex: bool = False
) -> tuple[multiprocessing.Process, connection.Connection]:
    """Starts target(sender, *args); what it sends comes out of the connection, which ends with the
    process.

    Args: duplex: whether the connection also takes what the process is to receive.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex)
    process = context.Process(target=target, args=(sender, *args), daemon=True)
    with _inherited(slot, jobs):
        process.start()
    sender.close()
    return process, receiver


@contextlib.contextmanager
def _inherited(slot: int, jobs: int) -> Iterator[None]:
    """What a process that starts in this block inherits: its share of the cores, deafness to
    Ctrl-C, which is its parent's, and large pages for large arrays (docs/performance/history.md).

    Inherited, all hold before the process imports anything, so that its thread pools have the
    share's size.
    """
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if cores:
            os.sched_setaffinity(0, cores[slot % len(cores) :: jobs])
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        signal.signal(signal.SIGINT, handler)


def _answer(sender: connection.Connection, work: Callable[[Any], Any], question: Any) -> None:
    _end_with_parent()
    sender.send(work(question))


def _serve(channel: connection.Connection, make: Callable[..., Callable], args: tuple) -> None:
    _end_with_parent()
    answer = None
    while (question := channel.recv()) is not None:
        try:
            answer = answer or make(*args)
            channel.send(answer(question))
        except UserError as error:
            channel.send(error)


def _tell(sender: connection.Connection, work: Callable, name: str, items: Items) -> None:
    _end_with_parent()
    for told in work(name, items):
        sender.send(told)


def _end_with_parent() -> None:
    """Ends this process as soon as its parent has ended, however that came about: no two may write
    to one folder.
    """

    def watch() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
