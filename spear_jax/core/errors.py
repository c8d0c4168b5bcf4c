"""The error of a user's mistake, and the name that the user may have meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake in config, data, weights, adapters or checkpoints.

    The message gives the value, the rule and the remedy. Entry points print it alone and exit with
    2.
    """


def shown(value: object, longest: int = 80) -> str:
    """Returns a value's repr for a message, cut after `longest` characters.

    >>> shown("a" * 1000, longest=8)
    "'aaaaaaa... (1000 characters)"
    """
    if isinstance(value, str) and len(value) > longest:
        return f"{value[:longest]!r}"[:longest] + f"... ({len(value)} characters)"
    try:
        text = repr(value)
    except Exception:  # nested too deeply, more digits than Python writes, a repr that fails
        text = f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= longest else f"{text[:longest]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'NAME'?" for the closest known name, "" where none is close."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for `name`, which is not one of the `known` names of this `kind`.

    It names the nearest, and all where they are few:

        >>> raise unknown("task", "gsm8", ["gsm8k", "facts"])
        Traceback (most recent call last):
        spear_jax.core.errors.UserError: unknown task 'gsm8'. Did you mean 'gsm8k'? Known: facts, gsm8k.
    """
    known = sorted(known)
    guess = nearest(name[:200], known)
    listed = f" Known: {', '.join(known)}." if len(known) <= 16 or not guess else ""
    return UserError(f"unknown {kind} {shown(name)}.{guess}{listed}")
