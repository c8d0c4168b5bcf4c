"""The studies of launch/studies.py: every run's config is one that can be."""

import argparse
import importlib

import pytest

from spear_jax import compare
from spear_jax.core.errors import UserError
from spear_jax.experiment.config import flatten, parse
from spear_jax.experiment.grid import share_out


@pytest.fixture
def studies(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.config.rootpath))
    return importlib.import_module("launch.studies")


def entries(arguments):
    """The rows of a study, as `compare` reads them, for its first seed."""
    parser = argparse.ArgumentParser()
    for flag in ("--methods", "--task", "--seeds", "--budget"):
        parser.add_argument(flag)
    parser.add_argument("--variant", action="append", default=[])
    args, overrides = parser.parse_known_args(arguments)
    budget = compare.read_budget(args.budget)
    return compare.read_entries(args, compare.read_seeds(args.seeds)[:1], budget, overrides)


def test_every_run_of_every_study_has_a_config_that_can_be(studies):
    for name, arguments in studies.STUDIES.items():
        rows = entries(arguments)
        for row in rows:
            parse(row.configs[min(row.configs)])
        told = [flatten(row.configs[min(row.configs)]) for row in rows]
        assert all(told.count(one) == 1 for one in told), f"{name} has the same run twice"


def test_a_study_of_switches_changes_one_field_a_row(studies):
    for name in ("loses", "loses_facts", "loses_reasoned", "faults"):
        plain, *others = [flatten(row.configs[0]) for row in entries(studies.STUDIES[name])]
        assert [sum(plain[x] != other[x] for x in plain) for other in others] == [1] * len(others)


def test_an_unknown_study_is_named(studies):
    with pytest.raises(UserError, match="unknown study 'method'. Did you mean 'methods'?"):
        studies.main(["method"])


def test_seeds_are_shared_out_where_jobs_would_stand_idle():
    left = {"a": {0: "a0", 1: "a1", 2: "a2"}, "b": {5: "b5"}}
    together = [("a", left["a"]), ("b", left["b"])]
    assert share_out(left, 1) == share_out(left, 3) == together
    assert share_out(left, 4) == [("a", {0: "a0", 2: "a2"}), ("a", {1: "a1"}), ("b", {5: "b5"})]
    assert share_out({}, 4) == []
