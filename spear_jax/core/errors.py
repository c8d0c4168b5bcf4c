"""The one error type that a user's mistake raises, and the helper that names the nearest valid
name.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in config, data, weights, adapters or checkpoints.

    The message gives the value, the rule and the remedy. Entry points print it alone and exit with
    2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'NAME'?" for the closest of the `known` names, "" where none is
    close.
    """
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for `name`, which is not one of the `known` names of this `kind`."""
    known = sorted(known)
    guess = nearest(name, known)
    listed = f" Known: {', '.join(known)}." if len(known) <= 16 or not guess else ""
    return UserError(f"unknown {kind} {name!r}.{guess}{listed}")
