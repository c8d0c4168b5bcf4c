"""How far people agree who answered the same requests."""

import collections
import warnings

import krippendorff
import numpy as np

VALUES = ("wrong", "right")


def agreement(votes: list[tuple[int, str, str | None]]) -> dict[str, float | int | None]:
    """Returns Krippendorff's alpha for nominal verdicts, and counts.

    Alpha is 1 for full agreement, 0 for that of chance, and None where it is not defined: no
    request with two verdicts, or one verdict alone in use.

    Args: votes: (request, person, verdict) of each answer; answers without a verdict do not count.
    Returns: {"alpha", "answers", "people", "requests": with two verdicts or more, "unanimous": of
        these}.
    """
    counted = [(request, who, verdict) for request, who, verdict in votes if verdict is not None]
    people = {name: row for row, name in enumerate(sorted({who for _, who, _ in counted}))}
    of: dict[int, list[str]] = collections.defaultdict(list)
    for request, _, verdict in counted:
        of[request].append(verdict)
    shared = {request: column for column, request in enumerate(r for r in of if len(of[r]) > 1)}
    table = np.full((len(people), len(shared)), np.nan)  # [person, request]
    for request, who, verdict in counted:
        if request in shared:
            table[people[who], shared[request]] = VALUES.index(verdict)
    return {
        "alpha": _alpha(table),
        "answers": len(counted),
        "people": len(people),
        "requests": len(shared),
        "unanimous": sum(len(set(of[request])) == 1 for request in shared),
    }


def _alpha(table: np.ndarray) -> float | None:
    if len(np.unique(table[~np.isnan(table)])) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        alpha = float(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal"))
    return alpha if np.isfinite(alpha) else None
