"""Every mistake of docs/troubleshooting.md ends in one message, on the host, before a model is
traced.
"""

import pathlib
import re

import pytest
from print_errors import cases

from spear_jax.core.errors import UserError


def test_every_mistake_of_the_page_is_one_message(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was traced")

    monkeypatch.setattr("spear_jax.models.decoder._run", refuse)
    monkeypatch.setattr("spear_jax.experiment.run_folder.GRACE", 0.0)
    seen = {}
    for name, make in cases(tmp_path):
        with pytest.raises(UserError) as caught:
            make()
        seen[name] = str(caught.value)
    assert len(seen) == 37
    page = (pathlib.Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    table = re.findall(r"^\| ([^|]+) \|(?: [^|]+ \|){3}$", page, re.M)
    assert set(table) - {"mistake", "---"} == set(seen)
    for name, message in seen.items():
        assert "\n" not in message and "Traceback" not in message, name
        assert len(message) > 30, name
