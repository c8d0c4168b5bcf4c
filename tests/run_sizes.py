"""The sizes of a run that tests train whole."""

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
}
