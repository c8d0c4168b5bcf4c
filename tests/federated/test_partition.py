"""Partition: every scheme gives each example to at most one client and leaves no client empty."""

import json

import numpy as np
import pytest

from spear_jax.core.errors import UserError
from spear_jax.federated.partition import (
    SCHEMES,
    load_split,
    partition,
    plot_split,
    save_split,
    split_table,
)

LABELS = np.random.default_rng(0).integers(0, 4, size=1000)


DISJOINT = [scheme for scheme in SCHEMES if scheme != "resample"]


@pytest.mark.parametrize("scheme", DISJOINT)
def test_split_gives_every_example_to_exactly_one_client(scheme):
    parts = partition(LABELS, 20, scheme, seed=3)
    assert len(parts) == 20
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    assert all(part.dtype == np.int64 and len(part) for part in parts)


def test_resampled_clients_share_examples_and_small_alpha_gives_each_its_own_labels():
    parts = partition(LABELS, 3000, "resample", seed=0, alpha=0.05, max_examples_per_client=40)
    assert len(parts) == 3000 and all(len(set(part.tolist())) == len(part) == 40 for part in parts)
    assert (
        len(set(np.concatenate(parts).tolist())) == 1000
    )  # more clients than examples, and every example is held
    largest = np.mean([np.bincount(LABELS[part], minlength=4).max() / 40 for part in parts])
    assert largest > 0.85  # 0.25 if labels were spread evenly
    first, again = (
        partition(LABELS, 5, "resample", seed=4, max_examples_per_client=9) for _ in range(2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for size in (0, 1001):
        with pytest.raises(UserError, match="from 1 to all"):
            partition(LABELS, 5, "resample", seed=0, max_examples_per_client=size)


@pytest.mark.parametrize("scheme", DISJOINT)
def test_same_seed_gives_the_same_split_and_another_seed_another(scheme):
    first, again, other = (partition(LABELS, 8, scheme, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("scheme", DISJOINT)
def test_cap_keeps_the_first_examples_of_each_client(scheme):
    free = partition(LABELS, 8, scheme, seed=1)
    capped = partition(LABELS, 8, scheme, seed=1, max_examples_per_client=30)
    for whole, part in zip(free, capped, strict=True):
        assert np.array_equal(part, whole[:30])


def test_capped_client_keeps_its_mix_of_labels():
    # Examples are shuffled before the cut; in label order a cut would keep the first label only.
    (part,) = partition(np.repeat([0, 1], 500), 1, "dirichlet", seed=0, max_examples_per_client=100)
    assert 25 < np.sum(part >= 500) < 75  # 50 expected; 5 standard deviations are 24


def test_iid_sizes_differ_by_one_at_most():
    sizes = [len(part) for part in partition(LABELS, 7, "iid", seed=0)]
    assert max(sizes) - min(sizes) == 1 and sum(sizes) == 1000  # 1000 = 7 * 142 + 6


@pytest.mark.parametrize("scheme", ["dirichlet", "quantity"])
def test_every_client_has_the_smallest_size_asked_for(scheme):
    for seed in range(5):
        parts = partition(LABELS, 10, scheme, seed, alpha=1.0, min_size=10)
        assert min(map(len, parts)) >= 10


def test_smallest_size_shrinks_until_a_split_is_found():
    # 50 clients cannot have 25 examples each out of 1000, yet a split is found, and no client is
    # empty.
    parts = partition(LABELS, 50, "dirichlet", seed=0, alpha=1.0, min_size=25)
    assert 1 <= min(map(len, parts)) < 25


def test_small_alpha_concentrates_labels_and_large_alpha_spreads_them():
    def largest_share(alpha):
        table = split_table(partition(LABELS, 5, "dirichlet", 0, alpha=alpha), LABELS, "ABCD")
        return np.mean([max(row[name] for name in "ABCD") / row["examples"] for row in table])

    # Equal shares of four labels would be 0.25.
    assert largest_share(1e4) < 0.35 < 0.5 < largest_share(0.1)


@pytest.mark.parametrize("each", [1, 2, 3])
def test_by_label_gives_each_client_that_many_labels(each):
    parts = partition(LABELS, 6, "by_label", seed=0, labels_per_client=each)
    assert [len(np.unique(LABELS[part])) for part in parts] == [each] * 6
    assert set(LABELS[np.concatenate(parts)]) == {0, 1, 2, 3}


def test_quantity_varies_sizes_and_keeps_label_mix():
    parts = partition(LABELS, 4, "quantity", seed=0, alpha=0.5, min_size=100)
    sizes = np.array([len(part) for part in parts])
    assert sizes.max() > 1.3 * sizes.min()
    for part in parts:
        shares = np.bincount(LABELS[part], minlength=4) / len(part)
        # Shares of a quarter have a standard deviation of at most sqrt(3/16/100) = 0.043.
        assert np.abs(shares - 0.25).max() < 0.2


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"num_clients": 1001}, "num_clients 1001 exceeds the 1000 training examples"),
        ({"num_clients": 0}, "num_clients 0 must be at least 1"),
        ({"alpha": 0.0}, "alpha 0.0 must be positive"),
        ({"alpha": float("nan")}, "alpha nan must be positive"),
        ({"min_size": 0}, "min_size 0 must be at least 1"),
        ({"max_examples_per_client": -1}, "max_examples_per_client -1 is negative"),
        (
            {"scheme": "dirichelet"},
            "unknown partition scheme 'dirichelet'. Did you mean 'dirichlet'",
        ),
        ({"scheme": "by_label", "labels_per_client": 5}, "labels_per_client 5 must be 1 to 4"),
        ({"scheme": "by_label", "num_clients": 2}, "leave some of the 4 labels without a client"),
        ({"num_clients": 900, "alpha": 0.01}, "Use fewer clients, more data or a larger alpha"),
        ({"scheme": "by_label", "labels": np.array([0] * 9 + [1])}, "label 1 has 1 examples for"),
    ],
)
def test_impossible_request_is_named(change, problem):
    arguments = {"labels": LABELS, "num_clients": 10, "scheme": "dirichlet", "seed": 0} | change
    with pytest.raises(UserError, match=problem):
        partition(**arguments)


def test_table_counts_each_label_of_each_client():
    parts = [np.array([0, 1, 4]), np.array([2])]
    table = split_table(parts, np.array([0, 0, 2, 1, 2]), ["A", "B", "C"])
    assert table == [
        {"client": 0, "examples": 3, "A": 2, "B": 0, "C": 1},
        {"client": 1, "examples": 1, "A": 0, "B": 0, "C": 1},
    ]


def test_saved_split_is_read_back(tmp_path):
    parts = partition(LABELS, 5, "dirichlet", seed=0)
    save_split(parts, tmp_path / "split.json")
    back = load_split(tmp_path / "split.json", 1000)
    assert all(np.array_equal(a, b) for a, b in zip(parts, back, strict=True))


@pytest.mark.parametrize(
    "content, problem",
    [
        (None, "cannot be read"),
        ("hello", "cannot be read"),
        (json.dumps([1, 2]), "cannot be read"),
        (json.dumps({"clients": []}), "cannot be read"),
        (json.dumps({"clients": [[0], [7]]}), "names example 7, but the dataset has 5"),
        (json.dumps({"clients": [[0], [-1]]}), "names example -1"),
        (json.dumps({"clients": [[0, 1], [1]]}), "gives an example to two clients"),
    ],
)
def test_split_file_that_does_not_fit_is_named(tmp_path, content, problem):
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=problem):
        load_split(path, 5)


def test_plot_has_axis_labels_and_one_bar_per_client_and_label(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path))
    )
    plot_split(partition(LABELS, 5, "iid", seed=0), LABELS, "ABCD", tmp_path / "split.png")
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("client", "examples")
    assert len(axes.patches) == 20
    assert sum(bar.get_height() for bar in axes.patches) == 1000
    assert (tmp_path / "split.png").stat().st_size > 1000


def test_a_plot_of_many_clients_has_one_shape_a_label_and_a_bounded_width(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    parts = partition(LABELS, 500, "resample", seed=0, max_examples_per_client=8)
    plot_split(parts, LABELS, "ABCD", tmp_path / "split.png")
    (axes,) = drawn[0].axes
    tops = [shape.get_data() for shape in axes.patches]
    assert len(tops) == 4 and drawn[0].get_size_inches()[0] == 25
    assert np.array_equal(tops[-1].values, np.full(500, 8)) and np.array_equal(
        tops[1].baseline, tops[0].values
    )
