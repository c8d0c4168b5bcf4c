"""Which client holds which examples: IID, Dirichlet over labels, by label, or by quantity."""

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from spear_jax.core.errors import UserError, unknown

SCHEMES = ("dirichlet", "iid", "by_label", "quantity", "resample")

# Draws before a split counts as impossible. Each failed draw lowers the smallest size asked for by
# x0.7 (down to 1), so what still fails after this many leaves some client with nothing at all.
MAX_DRAWS = 500
# Clients that `plot_split` draws one by one.
MAX_BARS = 100


def partition(
    labels: np.ndarray,
    num_clients: int,
    scheme: str,
    seed: int,
    *,
    alpha: float = 1.0,
    min_size: int = 10,
    max_examples_per_client: int = 0,
    labels_per_client: int = 1,
) -> list[np.ndarray]:
    """Shares examples out to clients; no client stays empty, and but for "resample" every example
    goes to one client at most.

    Args:
        labels: int[examples], the gold option of each example.
        num_clients: how many clients.
        scheme: "dirichlet" (each label's examples in Dirichlet(alpha) shares), "iid" (equal sizes,
            at random), "by_label" (each client sees `labels_per_client` labels, equal shares of
            each), "quantity" (random examples, sizes in Dirichlet(alpha) shares), or "resample"
            (each client draws `max_examples_per_client` of all examples, its labels in
            Dirichlet(alpha) shares: for populations larger than the data).
        seed: of `numpy.random.default_rng`; the same seed gives the same split.
        alpha: Dirichlet concentration; small is uneven.
        min_size: dirichlet and quantity are redrawn until every client has this many examples; the
            limit shrinks x0.7 per failed draw, down to 1.
        max_examples_per_client: keeps the first so many of a client's shuffled examples; 0 keeps
            all.
        labels_per_client: labels per client under "by_label".

    Returns:
        One int64 array of example indices per client, in random order.

    Raises:
        UserError: for arguments that no split can satisfy.

    Source: SPEAR (arXiv 2605.07977), data partition. Departures:
      1. The shrinking limit stops at 1 example, and an impossible split is an error, not an empty
         client.
    """
    labels = np.asarray(labels)
    _check(labels, num_clients, scheme, alpha, min_size, max_examples_per_client)
    rng = np.random.default_rng(seed)
    if scheme == "resample":
        return [_resample(labels, max_examples_per_client, alpha, rng) for _ in range(num_clients)]
    if scheme == "iid":
        parts = np.array_split(rng.permutation(len(labels)), num_clients)
    elif scheme == "by_label":
        parts = _by_label(labels, num_clients, labels_per_client, rng)
    else:
        # Under "quantity" all examples count as one label, so that only the sizes differ.
        groups = labels if scheme == "dirichlet" else np.zeros_like(labels)
        parts = _redraw(
            lambda: _dirichlet(groups, num_clients, alpha, rng), min_size, num_clients, alpha
        )
    parts = [rng.permutation(part).astype(np.int64) for part in parts]
    return [part[: max_examples_per_client or None] for part in parts]


def _check(
    labels: np.ndarray,
    num_clients: int,
    scheme: str,
    alpha: float,
    min_size: int,
    max_examples_per_client: int,
) -> None:
    """Raises UserError for arguments outside their range."""
    if scheme not in SCHEMES:
        raise unknown("partition scheme", scheme, SCHEMES)
    if num_clients < 1:
        raise UserError(f"num_clients {num_clients} must be at least 1.")
    if scheme == "resample" and not 0 < max_examples_per_client <= len(labels):
        raise UserError(
            f"partition scheme 'resample' with max_examples_per_client "
            f"{max_examples_per_client}: give how many of the "
            f"{labels.size} examples each client draws, from 1 to all."
        )
    if scheme != "resample" and (labels.ndim != 1 or num_clients > len(labels)):
        raise UserError(
            f"num_clients {num_clients} exceeds the {labels.size} training examples; every "
            f"client needs at "
            "least one. Use fewer clients, more data, or scheme 'resample', in which clients "
            "share examples."
        )
    if not (np.isfinite(alpha) and alpha > 0):
        raise UserError(
            f"partition alpha {alpha} must be positive and finite; 1.0 is the paper's, 0.1 is "
            f"uneven."
        )
    if min_size < 1:
        raise UserError(f"partition min_size {min_size} must be at least 1.")
    if max_examples_per_client < 0:
        raise UserError(
            f"max_examples_per_client {max_examples_per_client} is negative; give 0 for no limit."
        )


def _dirichlet(
    groups: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """One draw: for each group g, p_g ~ Dirichlet(alpha, ..., alpha) over clients; its shuffled
    examples are cut at floor(n_g * cumsum(p_g)).
    """
    pieces: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for client, piece in enumerate(np.split(members, cuts)):
            pieces[client].append(piece)
    return [np.concatenate(piece) for piece in pieces]


def _resample(labels: np.ndarray, size: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """`size` different examples, each label as likely as its Dirichlet(alpha) share."""
    kinds, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # the small number keeps every example possible where a share is too small for a float
    shares = rng.dirichlet(np.full(len(kinds), alpha)) + 1e-9
    chance = (shares / counts)[place]
    return rng.choice(len(labels), size=size, replace=False, p=chance / chance.sum()).astype(
        np.int64
    )


def _redraw(
    draw: Callable[[], list[np.ndarray]], min_size: int, num_clients: int, alpha: float
) -> list[np.ndarray]:
    """Draws until every client has `min_size` examples, x0.7 per failure."""
    limit = float(min_size)
    for _ in range(MAX_DRAWS):
        parts = draw()
        if min(map(len, parts)) >= limit:
            return parts
        limit = max(1.0, 0.7 * limit)
    raise UserError(
        f"no Dirichlet split with alpha {alpha} gave each of the {num_clients} clients an "
        f"example in "
        f"{MAX_DRAWS} draws. Use fewer clients, more data or a larger alpha."
    )


def _by_label(
    labels: np.ndarray, num_clients: int, labels_per_client: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deals labels round robin, `labels_per_client` to each client; shares each label's examples
    equally.
    """
    kinds = rng.permutation(np.unique(labels))
    if not 1 <= labels_per_client <= len(kinds):
        raise UserError(
            f"labels_per_client {labels_per_client} must be 1 to {len(kinds)}, the labels in the "
            f"data."
        )
    if num_clients * labels_per_client < len(kinds):
        raise UserError(
            f"{num_clients} clients with {labels_per_client} labels each leave some of the "
            f"{len(kinds)} "
            "labels without a client. Use more clients or a larger labels_per_client."
        )
    holders: list[list[int]] = [[] for _ in kinds]
    for place in range(num_clients * labels_per_client):
        holders[place % len(kinds)].append(place // labels_per_client)
    pieces: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for kind, clients in zip(kinds, holders, strict=True):
        members = rng.permutation(np.flatnonzero(labels == kind))
        if len(members) < len(clients):
            raise UserError(
                f"label {kind} has {len(members)} examples for {len(clients)} clients; each of "
                f"them needs "
                "at least one. Use fewer clients or more data."
            )
        for client, piece in zip(clients, np.array_split(members, len(clients)), strict=True):
            pieces[client].append(piece)
    return [np.concatenate(piece) for piece in pieces]


def split_table(
    parts: list[np.ndarray], labels: np.ndarray, label_names: Sequence[str]
) -> list[dict]:
    """One row per client: its number, how many examples it has, and how many of each label.

    Args:
        parts: the indices of each client.
        labels: int[examples], gold options.
        label_names: the name of each label value, from 0.
    """
    labels = np.asarray(labels)
    table = []
    for client, part in enumerate(parts):
        counts = np.bincount(labels[part], minlength=len(label_names))
        named = dict(zip(label_names, counts.tolist(), strict=True))
        table.append({"client": client, "examples": len(part), **named})
    return table


def save_split(parts: list[np.ndarray], path: str | pathlib.Path) -> None:
    """Writes a split as JSON: {"clients": [[example indices of client 0], ...]}."""
    text = json.dumps({"clients": [part.tolist() for part in parts]})
    pathlib.Path(path).write_text(text + "\n", encoding="utf-8")


def load_split(path: str | pathlib.Path, num_examples: int) -> list[np.ndarray]:
    """Reads a split that `save_split` wrote, for a dataset of `num_examples` examples.

    Raises:
        UserError: for a missing or foreign file, an index outside the dataset, or an example held
            twice.
    """
    try:
        clients = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["clients"]
        parts = [np.asarray(client, dtype=np.int64) for client in clients]
        held = np.concatenate(parts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"split file '{path}' cannot be read ({type(error).__name__}); expected JSON "
            '{"clients": [[indices], ...]}. Write it with save_split.'
        ) from error
    outside = held[(held < 0) | (held >= num_examples)]
    if outside.size:
        raise UserError(
            f"split file '{path}' names example {outside[0]}, but the dataset has "
            f"{num_examples}. Use the "
            "data that the split was made for."
        )
    if len(np.unique(held)) != held.size:
        raise UserError(
            f"split file '{path}' gives an example to two clients; each may go to one. Make it "
            f"anew."
        )
    return parts


def plot_split(
    parts: list[np.ndarray],
    labels: np.ndarray,
    label_names: Sequence[str],
    path: str | pathlib.Path,
) -> None:
    """Draws each client's examples as a bar stacked by label; saves it as PNG, PDF or SVG by the
    ending.
    """
    from matplotlib.figure import Figure  # here, not above: only plots need it

    table = split_table(parts, labels, label_names)
    figure = Figure(figsize=(min(25.0, max(5.0, 0.2 * len(parts))), 3.5), layout="constrained")
    axes = figure.subplots()
    clients = np.arange(len(parts))
    bottom = np.zeros(len(parts))
    for name in label_names:
        height = np.array([row[name] for row in table], dtype=float)
        if len(parts) <= MAX_BARS:
            axes.bar(clients, height, bottom=bottom, width=0.9, label=name)
        else:  # one shape a label: bars by the thousand take a minute to draw
            axes.stairs(
                bottom + height,
                np.arange(len(parts) + 1) - 0.5,
                baseline=bottom,
                fill=True,
                label=name,
            )
        bottom = bottom + height  # a new array: stairs keep theirs
    axes.set_xlabel("client")
    axes.set_ylabel("examples")
    axes.legend(title="gold answer", frameon=False)
    figure.savefig(path)
