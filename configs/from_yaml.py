"""A YAML file of the code published with SPEAR (arXiv 2605.07977), unchanged, as a config.

    python -m spear_jax.train --config=configs/from_yaml.py:arc_challenge_qwen1.5b_spear.yaml
    --workdir=runs/arc python -m spear_jax.train
    --config=configs/from_yaml.py:arc_challenge_qwen1.5b_spear.yaml,reference \\
        --workdir=runs/arc-reference

Every key is mapped, without effect here, or refused with the reason: docs/from-published-code.md
has the table. The published faults are fixed; ",reference" repeats them.
"""

import ml_collections

from spear_jax.published.yaml_config import config_of


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "PATH.yaml" or "PATH.yaml,reference"."""
    path, comma, variant = arg.rpartition(",")
    return (
        config_of(path, variant)
        if comma and not variant.endswith((".yaml", ".yml"))
        else config_of(arg)
    )
