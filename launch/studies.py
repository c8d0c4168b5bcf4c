"""Runs a study of docs/results/evidence.md or server.md: one `compare` command with the study's own
arguments.

    python launch/studies.py methods --workdir=runs/methods --config.data.path=PATH --jobs=2
    python launch/studies.py --help

More arguments go to `compare`; a field that is given twice has the last value. A study goes on
where it was stopped.
"""

import shlex
from typing import Any

from spear_jax import compare
from spear_jax.core.errors import unknown
from spear_jax.experiment import command_line

NEWS = "agnews,smollm2-135m,cpu"
FACTS, REASONED = "facts,tiny,small", "reasoned,tiny,small"
EVERYONE = "spear,feedback_sft,grpo,rltf_sd,opsd,dpo"
LOSES = (
    "lose_0:spear:spear.lose_weight=0.0",
    "lose_0.03:spear:spear.lose_weight=0.03",
    "lose_0.3:spear:spear.lose_weight=0.3",
    "margin_0:spear:spear.margin=0.0",
    "margin_0.6:spear:spear.margin=0.6",
    "model_confidence:spear:spear.confidence=model",
)
# for answers of more than a letter
TOKENS = (
    "answer_always:spear:spear.answer_only=always",
    "answer_never:spear:spear.answer_only=never",
    "tail_0:spear:spear.tail=0",
    "tail_4:spear:spear.tail=4",
)
SEARCH = (
    "rate_0.0005:spear:train.learning_rate=5e-4,train.learning_rate_min=1e-4",
    "rate_0.001:spear:train.learning_rate=1e-3,train.learning_rate_min=2e-4",
    "rate_0.004:spear:train.learning_rate=4e-3,train.learning_rate_min=8e-4",
    "steps_8:spear:train.steps=8",
    "questions_64:spear:rollout.examples=64",
    "revisions_2:spear:rollout.num_revisions=2",
    "all_layers:spear:lora.last_layers=0",
    "rank_64:spear:lora.rank=64,lora.alpha=128.0",
    "answers_of_8:spear:rollout.max_new_tokens=8,rollout.max_new_tokens_revision=8",
)
FAULTS = (
    "no_average:spear:federation.aggregation=last",
    "skipped_count:spear:spear.skip_weight=rollouts",
    "batch_confidence:spear:spear.confidence_weighting=batch_mean",
    "micro:spear:train.normalize=micro",
)
PEOPLE = {
    "right": "",
    "error_10": "feedback.error_rate=0.1",
    "error_30": "feedback.error_rate=0.3",
    "silent_50": "feedback.reply_rate=0.5",
    "no_hint": "feedback.hint_rate=0.0",
    "hint_50": "feedback.hint_rate=0.5",
    "late": "feedback.delay=60.0,feedback.deadline=60.0",
}

# Studies of the server: ten clients of `facts`, all of them in every round
TEN = {
    "federation.num_clients": 10,
    "federation.clients_per_round": 10,
    "rollout.examples": 16,
    "rollout.num_revisions": 1,
    "train.steps": 3,
    "train.batch_size": 8,
    "eval.every": 8,
    "eval.first_rounds": 0,
}
REDUCERS = {
    "mean": "",
    "norm_clip": "federation.clip_bound=3.0",
    "median": "",
    "trimmed_mean": "aggregation.trim=0.3",
    "multi_krum": "federation.byzantine=3",
    "geometric_median": "",
    "centred_clip": "aggregation.radius=3.0",
    "fltrust": "",
}
ATTACKS = {
    "approve_wrong": "",
    "mislead": "",
    "sign_flip": "attack.strength=3.0",
}
RULES = {
    **dict.fromkeys(("mean", "ffa", "fedsa", "rolora", "flora", "fedex", "flexlora", "fair"), ""),
    "hetlora": "lora.ranks=4,8,16",
}
COMPRESSED = (
    "int8:spear:compression.kind=int8",
    "int4:spear:compression.kind=int4",
    "qsgd_127:spear:compression.kind=qsgd",
    "qsgd_1:spear:compression.kind=qsgd,compression.levels=1",
    *(
        f"{kind}_{share}:spear:compression.kind={kind},compression.share={share},"
        "compression.error_feedback=True"
        for kind in ("topk", "randk")
        for share in (0.1, 0.01)
    ),
    "flexlora:spear:federation.lora_rule=flexlora",
    "rank_4:spear:federation.lora_rule=flexlora,compression.kind=rank",
)
# a version of fedbuff has two clients' updates, of fedasync one, of a synchronous round five
CLOCKS = (
    "fedbuff:spear:participation.mode=fedbuff,participation.buffer=2,eval.every=10",
    "fedasync:spear:participation.mode=fedasync,eval.every=20",
)
# 342 clients of ten questions, 34 a round; an adapter of few numbers
MANY = {
    "federation.num_clients": 342,
    "federation.clients_per_round": 34,
    "federation.partition": "iid",
    "federation.sampling": "poisson",
    "federation.lora_rule": "ffa",
    "lora.rank": 4,
    "lora.targets": "('q','v')",
    "rollout.examples": 8,
    "train.steps": 2,
}


def study(
    task: str,
    seeds: str,
    budget: str,
    variants: tuple[str, ...] = (),
    fields: dict[str, Any] | None = None,
) -> list[str]:
    """Returns the arguments of `compare` for SPEAR and its variants.

    Args: fields: of the config, for all rows.
    """
    return [
        "--methods=spear",
        f"--task={task}",
        f"--seeds={seeds}",
        f"--budget={budget}",
        *(f"--variant={variant}" for variant in variants),
        *(f"--config.{name}={value}" for name, value in (fields or {}).items()),
    ]


def variant(label: str, *fields: str) -> str:
    """Returns a variant of SPEAR; fields that are empty are left out."""
    return f"{label}:spear:{','.join(filter(None, fields))}"


def attacks() -> tuple[str, ...]:
    """Returns a variant for each reducer, attack and share of attackers; the plain row is the mean by
    wins, all others count every client once.
    """
    rows = [("wins", "federation.weighting=method")]
    rows += [
        (name, f"federation.reducer={name},federation.weighting=uniform,{fields}".rstrip(","))
        for name, fields in REDUCERS.items()
    ]
    attacked = [
        variant(
            f"{name}-{kind}-{share}", own, f"attack.kind={kind}", f"attack.fraction={share}", how
        )
        for share in (0.3, 0.1)
        for kind, how in ATTACKS.items()
        for name, own in rows
    ]
    return (*(variant(name, own) for name, own in rows[1:]), *attacked)


def rules() -> tuple[str, ...]:
    """Returns a variant for each LoRA rule and split; the plain row is the mean on even clients."""
    every = [
        variant(
            f"{name}-{alpha}", f"federation.lora_rule={name}", fields,
            f"federation.dirichlet_alpha={alpha}",
        )
        for alpha in (10.0, 0.1)
        for name, fields in RULES.items()
    ]  # fmt: skip
    return tuple(every[1:])


def people() -> tuple[str, ...]:
    """Returns a variant for each kind of simulated people; they say right or wrong of all answers."""
    asked = "rollout.feedback=simulated,feedback.asks=verdict"
    return tuple(f"{label}:spear:{asked},{fields}".rstrip(",") for label, fields in PEOPLE.items())


def side_by_side(seeds: str, tokens: int, rates: tuple[float, ...] = ()) -> list[str]:
    """Returns the arguments of a comparison of all methods on equal generated tokens.

    `sft` generates none, and takes as many rounds as the preset has. With rates, a row more for each
    method and rate.
    """
    variants = ["sft:sft:rounds=8"]
    for method in (*EVERYONE.split(","), "sft"):
        own = "rounds=8," if method == "sft" else ""
        variants += [
            f"{method}_{rate:g}:{method}:{own}train.learning_rate={rate:g},"
            f"train.learning_rate_min={rate / 5:g}"
            for rate in rates
        ]
    return [
        *(f"--methods={EVERYONE}", f"--task={NEWS}", f"--seeds={seeds}", "--config.rounds=100"),
        f"--budget=tokens:{tokens}",
        *(f"--variant={variant}" for variant in variants),
    ]


FIVE = "0,1,2,3,4"
STUDIES = {
    "search": study(NEWS, "100", "rounds:8", SEARCH),
    "seeds": study(NEWS, "0,1,2,3,4,5,6,7,8,9", "rounds:8"),
    "rates": side_by_side("100", 650, (5e-4, 1e-3)),
    "methods": side_by_side("0,1,2", 1300),
    "loses": study(NEWS, "0,1,2", "rounds:8", LOSES),
    "loses_facts": study(FACTS, "0,1,2,3,4", "tokens:8000", LOSES),
    "loses_reasoned": study(REASONED, "0,1,2,3,4", "tokens:80000", (*LOSES, *TOKENS)),
    "faults": study(NEWS, "0,1,2", "rounds:8", FAULTS),
    "people": study(NEWS, "0,1,2", "rounds:8", people()),
    "attacks": study(FACTS, FIVE, "rounds:8", attacks(), TEN),
    "lora_rules": study(
        FACTS,
        FIVE,
        "rounds:8",
        rules(),
        TEN | {"federation.exactness_meter": True, "federation.dirichlet_alpha": 10.0},
    ),
    "compression": study(FACTS, FIVE, "rounds:8", COMPRESSED, TEN),
    "asynchronous": study(
        FACTS,
        FIVE,
        "tokens:4000",
        CLOCKS,
        TEN
        | {
            "federation.clients_per_round": 5,
            "rounds": 200,
            "eval.every": 4,
            "participation.clock": True,
            "participation.spread": 1.0,
        },
    ),
    "privacy": study(
        FACTS,
        FIVE,
        "rounds:8",
        tuple(f"noise_{z}:spear:privacy.noise_multiplier={z}" for z in (0.3, 0.5, 1.0, 2.0)),
        TEN | MANY | {"federation.weighting": "uniform"},
    ),
}


def main(argv: list[str]) -> dict[str, Any]:
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__)
        for name, arguments in STUDIES.items():
            print(f"{name}:\n    {shlex.join(arguments)}")
        return {"studies": list(STUDIES)}
    name, *more = argv
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    return compare.main([*STUDIES[name], *more])


if __name__ == "__main__":
    command_line.run(main)
