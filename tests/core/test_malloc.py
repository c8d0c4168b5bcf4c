"""Freed memory goes back to the system, and does so after a program was compiled."""

import platform

import jax
import pytest

from spear_jax.benchmark import machine
from spear_jax.core import compilation, malloc
from spear_jax.core.compilation import release_after_compiling


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_memory_that_the_allocator_keeps_is_given_back():
    held = [
        bytes(4096) for _ in range(50_000)
    ]  # 200 MB in pieces that are too small for pages of their own
    full = machine._status("VmRSS")
    last = held.pop()  # keeps the heap's end in use
    held.clear()
    kept = machine._status("VmRSS")
    malloc.release_free_memory()
    given = machine._status("VmRSS")
    assert full - given > 150e6 and kept - given > 50e6
    del last


def test_long_compiling_is_followed_by_giving_back_once(monkeypatch):
    asked = []
    monkeypatch.setattr(compilation, "release_free_memory", lambda: asked.append(1))
    release_after_compiling()
    release_after_compiling()
    jax.monitoring.record_event_duration_secs(compilation._EVENT, 0.01)
    jax.monitoring.record_event_duration_secs("/jax/other", 10.0)
    assert asked == []
    jax.monitoring.record_event_duration_secs(compilation._EVENT, 1.0)
    assert asked == [1]
