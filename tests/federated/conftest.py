"""The vectors of the server side: plain numpy in float64."""

import json
import pathlib

import pytest

FILE = pathlib.Path(__file__).parents[1] / "federation_vectors.json"


@pytest.fixture(scope="session")
def vector():
    """name -> (inputs, expected, tolerance) of a vector; "nan" and "inf" are numbers."""
    found = {one["name"]: one for one in json.loads(FILE.read_text())}
    return lambda name: (
        found[name]["inputs"],
        found[name]["expected"],
        found[name]["tolerance"] or 1e-12,
    )
