"""Names a round's metrics and adds up the budget used."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BudgetUsed:
    """What a run has used so far: generated tokens, FLOPs (`algorithm_state.flops`), and seconds of
    rounds.
    """

    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    @classmethod
    def read(cls, line: dict) -> "BudgetUsed":
        """From a line of metrics.jsonl; nothing before round 1."""
        return cls(*(line.get(f"budget/{field.name}", 0.0) for field in dataclasses.fields(cls)))


_COMMON = ("loss", "grad_norm", "skipped_steps", "win_nll", "unlikelihood", "unlikelihood_active")


def _metric(method: str, name: str) -> str:
    """The contract's name of a training metric; what only one method knows goes under its own
    name.
    """
    return f"train/{name}" if name in _COMMON else f"{method}/{name}"
