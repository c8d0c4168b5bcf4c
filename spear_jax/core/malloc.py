"""Freed memory that the C allocator keeps."""

import ctypes


def release_free_memory() -> None:
    """Gives freed memory back to the system, where the C library is glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
