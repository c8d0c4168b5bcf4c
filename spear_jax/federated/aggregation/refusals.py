"""Aggregations that make no sense together, refused before anything compiles."""

import dataclasses
import math

from spear_jax.core.errors import UserError
from spear_jax.federated.aggregation.attacks import ON_MODELS
from spear_jax.federated.aggregation.lora_rules.base import LoraRule
from spear_jax.federated.aggregation.reducers import Reducer
from spear_jax.federated.aggregation.robust.coordinate_wise import TrimmedMean

TAKE = "take mean, ffa, rolora or fair"


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a run aggregates with.

    Attributes:
        rule: the LoRA rule; reducer: the reducer, and its name.
        server: `federation.aggregation`; server_rate: η.
        cohort: clients a round, n.
        ranks: of the clients; () where all have the adapter's.
        quantize: of the base.
        method: its name.
        older_adapters: whether the method compares with adapters of earlier rounds.
        ema_teacher: whether it averages adapters of several rounds.
        references: whether its loss compares with the adapter that a round starts from.
        compression: its kind; error_feedback: whether clients remember what it lost.
        attack: its kind; clock: whether participation is simulated.
        drift: how the drift of clients is corrected; partial: whether lost clients send what they have.
        mode: of participation; over_selection, deadline, dropout: of the clock; sampling: of clients.
        phases: of a round of the method; old_logprobs: whether it compares with the policy that
            answered.
        ditto: whether clients have an adapter of their own, too; finetune: whether they train one at
            the end.
        central_noise: z of the server; local_noise: z of the clients; 0: none.
        sigma_b: noise of the count of an adaptive clip norm; 0: the norm stays.
        weighting: of clients.
        secure_sum: whether the server sees the sum of updates alone.
        measures_cohort: of the method; see `Algorithm`.
    """

    rule: LoraRule
    reducer: Reducer
    reducer_name: str = "mean"
    server: str = "fedavg"
    server_rate: float = 1.0
    cohort: int = 10
    ranks: tuple[int, ...] = ()
    quantize: str = "none"
    method: str = "spear"
    older_adapters: bool = False
    ema_teacher: bool = False
    references: bool = False
    compression: str = "none"
    error_feedback: bool = False
    attack: str = "none"
    clock: bool = False
    drift: str = "none"
    partial: bool = False
    mode: str = "sync"
    over_selection: float = 1.0
    deadline: float = 0.0
    dropout: float = 0.0
    sampling: str = "uniform"
    phases: int = 1
    old_logprobs: bool = False
    ditto: bool = False
    finetune: bool = False
    central_noise: float = 0.0
    local_noise: float = 0.0
    sigma_b: float = 0.0
    weighting: str = "method"
    measures_cohort: str = ""
    secure_sum: bool = False


def reasons(given: Choices) -> dict[str, str]:
    """Returns {name: message} of all reasons to refuse; {} where there is none."""
    rule, name = given.rule, f"federation.lora_rule {given.rule.name!r}"
    return {
        reason: message
        for reason, applies, message in (
            *_of_secure_sum(given, name),
            *_of_privacy(given, name),
            *_of_reducers(given, name),
            (
                "mixed_ranks",
                len(set(given.ranks)) > 1 and not rule.mixed_ranks,
                f"lora.ranks are {_listed(given.ranks)}, but {name} needs one; take hetlora, "
                "flexlora or flora.",
            ),
            *_of_the_server(given, name),
            *_of_the_base(given, name),
            *_of_drift(given, name),
            *_of_persons(given, name),
            *_without_cohorts(given, name),
            (
                "feedback_without_compression",
                given.error_feedback and given.compression == "none",
                "compression.error_feedback needs a compression.kind; take int8, int4, qsgd, topk or "
                "randk, or set error_feedback=False.",
            ),
            *_of_products(given, name),
            (
                "gauge_memory",
                rule.turns_basis and given.ema_teacher,
                f"{given.method}.teacher=ema averages adapters of several rounds, but {name} turns "
                "their basis; take teacher=dynamic.",
            ),
            (
                "own_reference",
                given.references and (rule.personal or len(set(given.ranks)) > 1),
                f"method {given.method!r} compares with the round's adapter, which is one for all "
                f"clients, but under {name} each starts from its own; take mean, ffa or rolora "
                "with one rank, or a method without a reference.",
            ),
        )
        if applies
    }


def _of_secure_sum(given: Choices, name: str) -> list[tuple[str, bool, str]]:
    ruled, robust = not given.rule.linear, given.reducer_name not in ("mean", "norm_clip")
    reads = name if ruled else f"federation.reducer {given.reducer_name!r}"
    return [
        (
            "secure_needs_sum",
            given.secure_sum and (ruled or robust),
            f"{reads} reads every client's update, but federation.secure_sum shows the server their "
            "sum alone; take reducer mean or norm_clip and lora_rule mean, ffa, fedsa or rolora, or "
            "set secure_sum=False.",
        ),
        (
            "secure_blockwise",
            given.secure_sum and given.compression not in ("none", "randk"),
            f"compression.kind is {given.compression!r}, whose codes differ by client, so that they "
            "cannot be summed; with federation.secure_sum take none or randk.",
        ),
    ]


def _of_products(given: Choices, name: str) -> list[tuple[str, bool, str]]:
    sends = given.compression == "rank"
    return [
        (
            "truncation_rule",
            sends and not given.rule.adds_products,
            f"compression.kind=rank sends products, which {name} cannot average factor by factor; set "
            "--config.federation.lora_rule=flexlora, or flora.",
        ),
        (
            "truncation_reducer",
            sends and given.reducer_name != "mean",
            f"compression.kind=rank sends factors that each client turns its own way, but "
            f"federation.reducer {given.reducer_name!r} measures their numbers; set "
            "--config.federation.reducer=mean, or take another compression.kind.",
        ),
        (
            "truncation_memory",
            sends and given.error_feedback,
            "compression.kind=rank loses a part of a product, whose memory would be whole weights; set "
            "--config.compression.error_feedback=False, or take topk, randk, int8, int4 or qsgd.",
        ),
    ]


def _of_privacy(given: Choices, name: str) -> list[tuple[str, bool, str]]:
    central, noise = given.central_noise > 0, "privacy.noise_multiplier"
    private = central or given.local_noise > 0
    hidden = private or given.secure_sum
    even = ("uniform", "capped") if central else ("uniform",)
    return [
        (
            "dp_both",
            central and given.local_noise > 0,
            f"{noise} is {given.central_noise:g} and privacy.local_noise {given.local_noise:g}: the "
            "server's clip would cut off most of the clients' noise; set one of them to 0.",
        ),
        (
            "dp_weights",
            private and given.weighting not in even,
            "privacy needs every client to weigh the same, but federation.weighting is "
            f"{given.weighting!r}, which tells of its data; set "
            f"--config.federation.weighting={' or '.join(even)}.",
        ),
        (
            "dp_rule",
            central and not given.rule.linear,
            f"{name} multiplies clients' updates, so that no bound holds for what one client changes; "
            f"under {noise} take ffa, mean, fedsa or rolora, or set privacy.local_noise in its place.",
        ),
        (
            "dp_robust",
            central and given.reducer_name not in ("mean", "norm_clip"),
            f"federation.reducer is {given.reducer_name!r}, to which the noise is not calibrated; under "
            f"{noise} take mean or norm_clip.",
        ),
        (
            "dp_sampling",
            central and given.sampling not in ("poisson", "uniform"),
            f"federation.sampling is {given.sampling!r}, for which no accountant is here; set "
            "--config.federation.sampling=poisson, or uniform, whose epsilon is larger.",
        ),
        (
            "dp_over_selection",
            central and given.over_selection > 1,
            f"participation.over_selection is {given.over_selection:g}: who is late would depend on who "
            "else takes part, which doubles what one client changes; set it to 1, and use "
            "participation.deadline.",
        ),
        (
            "dp_method",
            central and bool(given.measures_cohort),
            f"method {given.method!r} trains each client by a number that is measured over all of the "
            f"cohort, to which no noise is added; under {noise} set --config.{given.measures_cohort}, or "
            "take another method.",
        ),
        (
            "dp_adaptive",
            central and given.sigma_b > 0 and given.central_noise >= 2 * given.sigma_b,
            f"{noise} {given.central_noise:g} is not below twice privacy.sigma_b {given.sigma_b:g}, so "
            "that the count of clients within the norm would take all of the noise; raise sigma_b (a "
            "twentieth of the cohort is usual), or the cohort.",
        ),
        (
            "dp_drift",
            hidden and given.drift != "none",
            f"federation.drift is {given.drift!r}, which sends or changes more than the one update that "
            "privacy and federation.secure_sum are made for; set drift to none.",
        ),
        (
            "dp_async",
            hidden and given.mode != "sync",
            f"participation.mode is {given.mode!r}, but privacy and federation.secure_sum are made for "
            "cohorts; set mode to sync.",
        ),
        (
            "poisson_clock",
            given.sampling == "poisson" and given.over_selection > 1 and not central,
            "federation.sampling is 'poisson', whose cohorts have any size, and "
            f"participation.over_selection {given.over_selection:g}, which asks for a multiple of one; "
            "set over_selection to 1, or sampling to uniform.",
        ),
        (
            "poisson_local",
            given.sampling == "poisson" and given.server == "local",
            "federation.sampling is 'poisson', which may draw nobody, and federation.aggregation "
            "'local', where each client trains for itself; set sampling to uniform.",
        ),
    ]


def _of_reducers(given: Choices, name: str) -> list[tuple[str, bool, str]]:
    reducer, own = given.reducer, f"federation.reducer is {given.reducer_name!r}"
    fewest = max(reducer.fewest, 1)
    trims = isinstance(reducer, TrimmedMean) and (
        2 * math.floor(reducer.trim * given.cohort) >= given.cohort
    )
    return [
        (
            "robust_coordinates",
            not given.rule.linear and not reducer.yields_shares,
            f"{own}, which yields coordinates, but {name} needs each client's share; take krum, "
            "multi_krum or geometric_median, or lora_rule=mean.",
        ),
        (
            "robust_count",
            given.cohort < fewest or trims,
            f"{own}, which needs {fewest} clients a round, but there are {given.cohort}; raise "
            "federation.clients_per_round, or lower federation.byzantine."
            if not trims
            else f"{own}, and aggregation.trim={getattr(reducer, 'trim', 0)} drops all of "
            f"{given.cohort} clients; lower it.",
        ),
    ]


def _of_the_server(given: Choices, name: str) -> list[tuple[str, bool, str]]:
    rule, alone = given.rule, given.server in ("last", "local")
    other = given.server != "fedavg" and not rule.linear
    plain = type(rule).name == "mean" and given.reducer_name in ("mean", "last")
    # where nothing is ever sent
    unseen = given.compression != "none" or given.attack in ON_MODELS or given.clock
    unseen = unseen or given.drift != "none" or given.ditto or given.finetune
    private = given.central_noise > 0 or given.local_noise > 0 or given.secure_sum
    return [
        (
            "server_optimiser",
            other or (given.server_rate != 1 and not rule.rates),
            f"federation.aggregation is {given.server!r}, but {name} makes the next adapter itself, "
            "so that moments mean nothing; take fedavg."
            if other
            else f"federation.server_rate is {given.server_rate}, but {name} sets the model to the "
            "clients' mean; set server_rate=1.",
        ),
        (
            "server_rule_alone",
            alone
            and (
                not plain or private or given.mode != "sync" or (given.server == "local" and unseen)
            ),
            f"federation.aggregation={given.server!r}: 'last' repeats a fault, and 'local' never "
            "averages; neither goes with a lora_rule, a robust reducer, privacy, compression, "
            "participation, drift, personal or an attack on the model. Take fedavg.",
        ),
    ]


def _of_the_base(given: Choices, name: str) -> list[tuple[str, bool, str]]:
    changes = given.rule.changes_base
    return [
        (
            "base_quantised",
            changes and given.quantize != "none",
            f"{name} changes the base weights, which quantize={given.quantize!r} holds in few bits; "
            f"set quantize=none, or {TAKE}.",
        ),
        (
            "base_references",
            changes and (given.older_adapters or given.ema_teacher),
            f"method {given.method!r} compares with adapters of earlier rounds, but {name} changes "
            f"the base under them; {TAKE}.",
        ),
    ]


def _of_drift(given: Choices, name: str) -> list[tuple[str, bool, str]]:
    own = f"federation.drift is {given.drift!r}"
    several = f"method {given.method!r} trains in {given.phases} phases a round"
    return [
        (
            "scaffold_rule",
            given.drift in ("scaffold", "mime_lite")
            and type(given.rule).name not in ("mean", "ffa"),
            f"{own}, which keeps gradients of both factors in one basis, but {name} does not; take mean "
            "or ffa.",
        ),
        (
            "nova_rule",
            given.drift == "fednova" and (not given.rule.linear or given.rule.personal),
            f"{own}, which lengthens updates, but {name} multiplies factors or leaves some with clients; "
            "take mean, ffa or rolora.",
        ),
        (
            "drift_phases",
            given.phases > 1 and (given.drift != "none" or given.partial),
            f"{own}, and {several}; set --config.grpo.updates to train.steps, which makes them one, or "
            "drift=none."
            if given.drift != "none"
            else f"participation.partial is True, but {several}; set --config.grpo.updates to "
            "train.steps, which makes them one, or partial=False.",
        ),
    ]


def _of_persons(given: Choices, name: str) -> list[tuple[str, bool, str]]:
    rule, mixed = given.rule, len(set(given.ranks)) > 1
    kind = f"federation.lora_rule is {type(rule).name!r}" + (" with mixed ranks" if mixed else "")
    return [
        (
            "ditto_rule",
            given.ditto and (mixed or not rule.linear or rule.personal),
            f"personal.ditto pulls a client's own adapter towards the global one number by number, but "
            f"{kind}, where the two do not match; take mean, ffa or rolora with one rank.",
        ),
        (
            "ditto_method",
            given.ditto and (given.phases > 1 or given.old_logprobs),
            f"personal.ditto trains on answers of the global adapter, but method {given.method!r} "
            "compares with the policy that answered; take another method, or personal.ditto=False.",
        ),
        (
            "finetune_base",
            given.finetune and (rule.changes_base or mixed),
            f"personal.finetune starts from the adapter alone, but {kind}; take mean, ffa, fedsa or "
            "rolora with one rank.",
        ),
    ]


def _without_cohorts(given: Choices, name: str) -> list[tuple[str, bool, str]]:
    waits, own = given.mode != "sync", f"participation.mode is {given.mode!r}"
    mixes, kind = given.mode == "fedasync", given.reducer_name
    asked = {
        f"over_selection {given.over_selection:g}": given.over_selection > 1,
        f"deadline {given.deadline:g}": given.deadline > 0,
        "partial True": given.partial,
    }
    named = next((name for name, there in asked.items() if there), "")
    return [
        (
            "async_rule",
            waits and type(given.rule).name not in ("mean", "ffa", "fedsa", "fedper"),
            f"{own}, but {name} needs all clients to start from one adapter; take mean, ffa, fedsa or "
            "fedper.",
        ),
        (
            "async_over_selection",
            waits and bool(named),
            f"{own}, which has no cohorts, and participation.{named} is about a cohort; take its "
            "default, or mode=sync.",
        ),
        (
            "async_drift",
            waits and given.drift != "none",
            f"{own}, but federation.drift {given.drift!r} needs clients that start together; take "
            "drift=none, or mode=sync.",
        ),
        (
            "async_server",
            mixes and (given.server != "fedavg" or given.server_rate != 1),
            f"{own}, which mixes adapters by participation.mix and takes no server optimiser; set "
            "federation.aggregation=fedavg and server_rate=1.",
        ),
        (
            "async_robust",
            waits and (kind == "fltrust" or (mixes and kind not in ("mean", "norm_clip"))),
            f"{own}, which takes one update at a time, so that federation.reducer {kind!r} has nothing "
            "to compare; take fedbuff, or mean or norm_clip."
            if mixes
            else f"{own}, but federation.reducer {kind!r} trains the server's own client in every "
            "round; take another, or mode=sync.",
        ),
        (
            "async_sampling",
            waits and given.sampling != "uniform" and not given.central_noise,
            f"{own}, which draws evenly from the clients that are idle, but federation.sampling is "
            f"{given.sampling!r}; set sampling to uniform.",
        ),
        (
            "async_dropout",
            waits and given.dropout == 1,
            f"{own}, and participation.dropout is 1, so that nobody ever arrives; lower it.",
        ),
    ]


def check(given: Choices) -> None:
    """Raises UserError for the first reason to refuse."""
    for message in reasons(given).values():
        raise UserError(message)


def _listed(ranks: tuple[int, ...]) -> str:
    *first, last = [str(rank) for rank in sorted(set(ranks))] or ["all the same"]
    return f"{', '.join(first)} and {last}" if first else last
