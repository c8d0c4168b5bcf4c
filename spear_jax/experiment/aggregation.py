"""From settings to the server's side: aggregation, attacks, compression, and the simulated clock."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax

from spear_jax.algorithms.base import Algorithm
from spear_jax.core.errors import UserError, shown, unknown
from spear_jax.experiment.config import Settings
from spear_jax.federated.aggregation import refusals
from spear_jax.federated.aggregation.attacks import ON_MODELS, Attack, attackers
from spear_jax.federated.aggregation.attacks import check as check_attack
from spear_jax.federated.aggregation.compression import COMPRESSORS
from spear_jax.federated.aggregation.compression.rank import RankUplink
from spear_jax.federated.aggregation.compression.uplink import Uplink
from spear_jax.federated.aggregation.exactness import Metered
from spear_jax.federated.aggregation.lora_rules import LORA_RULES
from spear_jax.federated.aggregation.lora_rules.base import LoraRule, factor_bytes
from spear_jax.federated.aggregation.pipeline import Aggregation, find_reducer, with_numbers
from spear_jax.federated.aggregation.reducers import ClientTransform, Mean, Reducer
from spear_jax.federated.aggregation.robust.fltrust import FLTrust
from spear_jax.federated.aggregation.robust.norm_clip import NormClip
from spear_jax.federated.aggregation.secure_sum import SecureSum
from spear_jax.federated.aggregation.server_optimizer import from_optax, server_optimizer
from spear_jax.federated.aggregation.weighting import Weighting
from spear_jax.federated.drift import DRIFTS
from spear_jax.federated.participation import Asynchronous, Participation
from spear_jax.federated.privacy import accounting
from spear_jax.federated.privacy.central import AdaptiveClip, CentralPrivacy
from spear_jax.federated.privacy.client_side import LocalPrivacy
from spear_jax.models.decoder import Decoder
from spear_jax.models.lora import init_lora

LEAST_NOISE = 0.3  # z of the server; below, the accountant's tables grow without a use


def build_aggregation(
    settings: Settings,
    decoder: Decoder,
    reducer: Reducer | None = None,
    rule: LoraRule | None = None,
    optimizer: optax.GradientTransformation | None = None,
    transforms: tuple[ClientTransform, ...] = (),
    examples: Sequence[int] = (),
) -> Aggregation:
    """Builds the aggregation that `federation`, `aggregation`, `privacy` and `attack` name.

    Args:
        reducer, rule, optimizer, transforms: those passed as objects, in place of those named.
        examples: how many each client has.
    Raises: UserError for an unknown reducer or rule, and for a bound or ranks that do not fit.
    """
    fed, attack = settings.federation, settings.attack
    numbers = {
        name: x for name, x in vars(settings.aggregation).items() if x or name != "iterations"
    }
    numbers |= {"byzantine": fed.byzantine, "bound": fed.clip_bound, "seed": settings.seed}
    reducer = find_reducer(
        "last" if fed.aggregation == "last" else reducer or fed.reducer, **numbers
    )
    if isinstance(reducer, NormClip) and not reducer.bound:
        raise UserError(
            "federation.reducer is 'norm_clip', but federation.clip_bound is 0; set it to the largest "
            "norm that an update may have, for example --config.federation.clip_bound=1.0."
        )
    if fed.weighting == "capped" and not fed.weight_cap:
        raise UserError(
            "federation.weighting is 'capped', but federation.weight_cap is 0; set the largest weight "
            "that a client may have, for example --config.federation.weight_cap=10.0."
        )
    drift = DRIFTS.get(fed.drift)
    rate = 1.0 if fed.aggregation in ("last", "local") else fed.server_rate
    aggregation = Aggregation(
        reducer=reducer,
        optimizer=from_optax(optimizer)
        if optimizer is not None
        else server_optimizer(fed.aggregation, fed.server_rate, fed.beta1, fed.beta2, fed.tau),
        transforms=transforms,
        rule=rule or find_rule(fed.lora_rule, numbers),
        rate=rate,
        weighting=Weighting(
            "uniform" if drift and drift.uniform else fed.weighting, fed.weight_cap
        ),
        attack=build_attack(settings) if attack.kind in ON_MODELS else None,
        privacy=build_privacy(settings, examples),
        local_privacy=build_local_privacy(settings),
        uplink=build_uplink(settings),
        secure_sum=build_secure_sum(settings),
        scale=decoder.lora.scale,
        ranks=client_ranks(settings),
        root=fed.num_clients if isinstance(reducer, FLTrust) else None,
        drift=drift,
        waits=settings.participation.mode != "sync",
    )
    if fed.exactness_meter and not aggregation.collects and isinstance(reducer, Mean):
        return dataclasses.replace(aggregation, reducer=Metered(reducer))
    return aggregation


def find_rule(name: str, numbers: dict[str, Any]) -> LoraRule:
    """Returns the LoRA rule of that name; raises UserError for an unknown one."""
    if name not in LORA_RULES:
        raise unknown("LoRA rule (federation.lora_rule)", name, LORA_RULES)
    if name == "fedex_truncated":
        numbers = numbers | {"rank": numbers["residual_rank"]}
    return with_numbers(LORA_RULES[name], numbers)


def build_attack(settings: Settings) -> Attack:
    """Builds the attack on the model; raises UserError where it is not defined."""
    fed, attack = settings.federation, settings.attack
    bad = attackers(settings.seed, fed.num_clients, attack.fraction)
    check_attack(attack.kind, fed.clients_per_round, len(bad))
    return Attack(attack.kind, tuple(bad), attack.strength, settings.seed)


def build_privacy(settings: Settings, examples: Sequence[int]) -> CentralPrivacy | None:
    """Builds the server's noise; None: there is none. Args: examples: how many each client has.

    Raises: UserError where dp-accounting is not installed, and for too little noise.
    """
    noise, fed = settings.privacy, settings.federation
    if not noise.noise_multiplier:
        return None
    accounting.library()
    if noise.noise_multiplier < LEAST_NOISE:
        raise UserError(
            f"privacy.noise_multiplier is {noise.noise_multiplier:g}; less than {LEAST_NOISE:g} of the "
            "clip norm protects hardly anybody. Raise it, or set it to 0 for no noise."
        )
    adaptive = None
    if noise.adaptive:
        adaptive = AdaptiveClip(noise.quantile, noise.clip_rate, sigma_b(settings))
    weights: tuple[float, ...] = ()
    if fed.weighting == "capped":
        weights = tuple(min(count / fed.weight_cap, 1.0) for count in examples)
    limit = noise.cohort_limit if fed.sampling == "poisson" else 0
    account = accounting.Account(
        noise.noise_multiplier, fed.num_clients, fed.clients_per_round, fed.sampling, limit,
        delta_of(settings),
    )  # fmt: skip
    return CentralPrivacy(account, noise.clip, adaptive, weights, settings.seed)


def build_local_privacy(settings: Settings) -> LocalPrivacy | None:
    """Builds the clients' own noise; None: there is none. Raises: as `build_privacy`."""
    noise = settings.privacy
    if not noise.local_noise:
        return None
    accounting.library()
    return LocalPrivacy(noise.local_noise, noise.clip, delta_of(settings), settings.seed)


def sigma_b(settings: Settings) -> float:
    """Returns the noise of an adaptive clip norm's count: privacy.sigma_b, or a twentieth of the
    cohort.
    """
    return settings.privacy.sigma_b or settings.federation.clients_per_round / 20


def delta_of(settings: Settings) -> float:
    """Returns δ: privacy.delta, or below one in the number of clients."""
    return settings.privacy.delta or settings.federation.num_clients**-1.1


def build_uplink(settings: Settings) -> Uplink | RankUplink | None:
    """Builds what `compression` names; None: updates travel as they are."""
    compression = settings.compression
    if compression.kind == "none":
        return None
    if compression.kind == RankUplink.name:
        return RankUplink(compression.rank)
    compressor = with_numbers(COMPRESSORS[compression.kind], vars(compression))
    together = settings.federation.secure_sum
    return Uplink(compressor, compression.error_feedback, together, settings.seed)


def build_secure_sum(settings: Settings) -> SecureSum | None:
    """Builds the secure sum; None: the server sees single updates.

    Raises: UserError where a cohort's sum may not fit.
    """
    given, fed = settings.aggregation, settings.federation
    if not fed.secure_sum:
        return None
    secure = SecureSum(given.secure_bound, given.secure_bits, settings.seed)
    largest = fed.clients_per_round
    if fed.sampling == "poisson":
        largest = settings.privacy.cohort_limit or fed.num_clients
    if largest > secure.most_clients:
        raise UserError(
            f"federation.secure_sum holds numbers up to {given.secure_bound:g} of "
            f"{secure.most_clients} clients, but a round may have {largest}; lower "
            "aggregation.secure_bits or aggregation.secure_bound, or take fewer clients a round."
        )
    return secure


def build_participation(settings: Settings) -> Participation | None:
    """Builds the simulated clock; None where nothing asks for one.

    Raises: UserError where more clients would be asked than there are.
    """
    clock, fed = settings.participation, settings.federation
    asked = clock.clock or clock.dropout or clock.deadline or clock.over_selection > 1
    if not asked and clock.mode == "sync":
        return None
    made = with_numbers(Participation, vars(clock) | {"seed": settings.seed})
    asked = made.asked(fed.clients_per_round)
    if asked > fed.num_clients:
        raise UserError(
            f"participation.over_selection is {clock.over_selection:g}, which asks {asked} clients a "
            f"round, but there are {fed.num_clients}; lower it, or federation.clients_per_round."
        )
    return made


def build_asynchronous(settings: Settings) -> Asynchronous | None:
    """Builds rounds without cohorts; None where there are cohorts."""
    given = settings.participation
    if given.mode == "sync":
        return None
    return Asynchronous(given.mode, given.buffer, given.max_staleness, given.mix, given.staleness)


def client_ranks(settings: Settings) -> tuple[int, ...]:
    """Returns lora.ranks as numbers; raises UserError for others than 1 to lora.rank."""
    lora = settings.lora
    words = [word.strip() for word in lora.ranks.split(",")] if lora.ranks else []
    if not all(word.isdecimal() and 1 <= int(word) <= lora.rank for word in words):
        raise UserError(
            f"lora.ranks is {shown(lora.ranks)}; it must be ranks from 1 to lora.rank={lora.rank}, "
            'parted by commas. Write --config.lora.ranks="4,8,16".'
        )
    return tuple(map(int, words))


def check_aggregation(
    settings: Settings, aggregation: Aggregation, algorithm: Algorithm, decoder: Decoder
) -> None:
    """Raises UserError where reducer, LoRA rule, server optimiser and method do not go together."""
    fed, rule, references = settings.federation, aggregation.rule, False
    clock, buffers, cohort = (
        settings.participation,
        build_asynchronous(settings),
        fed.clients_per_round,
    )
    if buffers is not None and not buffers.mixes:
        cohort = buffers.size(cohort)
    check_state(settings, aggregation, decoder)
    if rule.personal or len(set(aggregation.ranks)) > 1:
        adapter = init_lora(jax.random.key(0), decoder.lora, decoder.config)
        references = bool(algorithm.references(algorithm.init_state(adapter, 1, 1), adapter))
    refusals.check(
        refusals.Choices(
            rule=rule,
            reducer=aggregation.reducer,
            reducer_name=fed.reducer,
            server=fed.aggregation,
            server_rate=aggregation.rate,
            cohort=cohort,
            ranks=aggregation.ranks,
            quantize=settings.quantize,
            method=algorithm.name,
            older_adapters=algorithm.keeps_older_adapters,
            ema_teacher=getattr(algorithm.settings, "teacher", "") == "ema",
            references=references,
            compression=settings.compression.kind,
            attack=settings.attack.kind,
            clock=build_participation(settings) is not None,
            error_feedback=settings.compression.error_feedback,
            drift=fed.drift,
            partial=clock.partial,
            mode=clock.mode,
            over_selection=clock.over_selection,
            deadline=clock.deadline,
            dropout=clock.dropout,
            sampling=fed.sampling,
            phases=algorithm.phases,
            ditto=settings.personal.ditto,
            finetune=settings.personal.finetune > 0,
            old_logprobs=algorithm.scoring.old_logprobs,
            central_noise=settings.privacy.noise_multiplier,
            local_noise=settings.privacy.local_noise,
            sigma_b=sigma_b(settings) if settings.privacy.adaptive else 0.0,
            weighting=fed.weighting,
            secure_sum=fed.secure_sum,
            measures_cohort=algorithm.measures_cohort,
        )
    )


def told_before(settings: Settings) -> list[str]:
    """Returns what a user should know of an aggregation that is not refused."""
    fed, told = settings.federation, []
    if settings.privacy.noise_multiplier and settings.record_traces:
        told.append("privacy's epsilon covers the adapters; the traces of this run are not private")
    if fed.secure_sum and fed.reducer == "norm_clip":
        told.append(
            "under federation.secure_sum clients clip themselves; an attacker's update is not clipped"
        )
    return told


def check_state(settings: Settings, aggregation: Aggregation, decoder: Decoder) -> None:
    """Raises UserError where what is kept of single clients takes more than aggregation.state_gb."""
    make = functools.partial(init_lora, lora=decoder.lora, model=decoder.config)
    adapter, clients = jax.eval_shape(make, jax.random.key(0)), settings.federation.num_clients
    remembers = aggregation.uplink is not None and aggregation.uplink.error_feedback
    controls = settings.federation.drift == "scaffold"
    mode, rule = settings.participation.mode, aggregation.rule
    whole = factor_bytes(adapter, decoder.lora.rank, "ab")
    limit, at_work = settings.aggregation.state_gb, settings.federation.clients_per_round
    for cause, applies, each, count in (
        (
            f"federation.lora_rule={rule.name}",
            rule.personal,
            rule.own_bytes(adapter, decoder.lora.rank),
            clients,
        ),
        ("compression.error_feedback", remembers, whole, clients),
        ("federation.drift=scaffold", controls, whole, clients),
        ("personal.ditto", settings.personal.ditto, whole, clients),
        (f"participation.mode={mode}", mode != "sync", whole, at_work),
    ):
        held = count * each
        if applies and held > limit * 1e9:
            raise UserError(
                f"{cause} keeps {held // (4 * count):,} numbers for each of {count:,} clients "
                f"({held / 1e9:,.1f} GB), over aggregation.state_gb={limit:g}. Take fewer clients, a "
                "lower lora.rank or fewer lora.targets, or raise aggregation.state_gb."
            )
