"""A YAML file of the code published with SPEAR (arXiv 2605.07977), unchanged.

    python -m spear_jax.train --config=configs/from_yaml.py:arc_challenge_qwen1.5b_spear.yaml --workdir=runs/arc
    python -m spear_jax.train --config=configs/from_yaml.py:arc_challenge_qwen1.5b_spear.yaml,reference \\
        --workdir=runs/arc-reference

Every key is mapped, without effect here, or refused with the reason. The published faults are
fixed; the variant reference repeats them. Reaches and costs what the file's own settings do: not
measured.

The same without this file: --config=from_yaml:PATH.yaml. spear_jax/experiment/published/keys.py has
every key.
"""

import ml_collections

from spear_jax.experiment.published import yaml_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "PATH.yaml" or "PATH.yaml,reference"."""
    return yaml_config.from_argument(arg)
