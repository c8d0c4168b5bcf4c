"""The sizes of a run that tests train whole. Files that train the same sizes share the compiled
programs.
"""

from spear_jax.experiment import presets

SMALL = {
    "rounds": 4,
    "federation.clients_per_round": 2,
    "rollout.examples": 8,
    "rollout.max_concurrent_sequences": 16,
    "train.steps": 2,
    "train.batch_size": 4,
    "eval.every": 2,
    "eval.limit": 40,
    "eval.rows": 40,
    "federation.aggregation": "fedadam",
    "federation.server_rate": 0.1,
    "lora.rank": 2,
    "lora.targets": ("q", "down"),  # each more is time to compile
}


def small(arg="", **changes):
    """The quickstart config at these sizes."""
    config = presets.quickstart(arg)
    config.update_from_flattened_dict(SMALL | changes)
    return config
