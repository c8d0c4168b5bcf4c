"""A run's adapter as a PEFT folder, or merged into a full Hugging Face model folder."""

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from spear_jax.core.errors import UserError
from spear_jax.core.files import writing
from spear_jax.core.surroundings import say
from spear_jax.experiment.builder import Experiment
from spear_jax.federated.aggregation import low_rank
from spear_jax.federated.aggregation.lora_rules.base import host_pair
from spear_jax.federated.state import ServerState
from spear_jax.models.io.huggingface import save_model
from spear_jax.models.io.peft import save_adapter
from spear_jax.models.lora import merge_lora
from spear_jax.models.params import Adapter


def export_adapter(
    experiment: Experiment,
    state: ServerState,
    folder: str | pathlib.Path,
    client: int | None = None,
    rank: int | None = None,
) -> pathlib.Path:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        client: whose adapter, of a run in which every client has its own.
        rank: of the adapter that is nearest to the model, where the base has changed.
    Raises: UserError where the folder is not empty, and where an adapter alone is not the model;
        DiskError where it cannot be written.
    """
    out = check_empty(folder)
    adapter, model = chosen_adapter(experiment, state, client), experiment.model
    lora = experiment.federation.decoder.lora
    change = state.aggregation_state.get("base")
    check_rank(experiment, int(state.round), change is not None, rank)
    if change is not None and rank is not None:
        adapter, error = whole_adapter(change, adapter, lora.scale, rank)
        lora = dataclasses.replace(lora, rank=rank, alpha=lora.scale * rank)
        say(
            f"the adapter of rank {rank} differs from the model's change by {error:.2%}", sys.stderr
        )
    # PEFT loads the base from this name; the embedded model has a folder only
    named = experiment.settings.model
    base = str(model.source) if named == "tiny" else named
    with writing(out):
        save_adapter(out, adapter, lora, model.config, base)
    return out


def export_model(
    experiment: Experiment,
    state: ServerState,
    folder: str | pathlib.Path,
    client: int | None = None,
    rank: int | None = None,
) -> pathlib.Path:
    """Writes the whole model, the base's change and the adapter merged; arguments as
    `export_adapter`.

    Raises: UserError for a quantised base, whose weights are no longer those that were given.
    """
    if experiment.settings.quantize != "none":
        raise UserError(
            f"quantize is {experiment.settings.quantize}, and a quantised base cannot take the "
            "adapter; open the run with config.quantize = 'none', as the export command does."
        )
    if rank is not None:
        raise UserError(f"--rank={rank} does nothing beside --merge, which is exact; leave it out.")
    out = check_empty(folder)
    adapter, model = chosen_adapter(experiment, state, client), experiment.model
    federation = experiment.federation.on_base(state.aggregation_state)
    merged = merge_lora(federation.base, adapter, federation.decoder.lora)
    tree = jax.tree.map(np.asarray, merged)
    with writing(out):
        save_model(out, tree, model.raw_config, model.tokenizer, model.generation_config)
    return out


def check_empty(folder: str | pathlib.Path) -> pathlib.Path:
    """Returns the folder as a path; raises UserError where something is there already."""
    out = pathlib.Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={folder} exists and is not an empty folder; give a new one.")
    return out


def chosen_adapter(experiment: Experiment, state: ServerState, client: int | None) -> Any:
    """Returns the global adapter, or one client's where every client has its own."""
    adapters, rule = experiment.adapters(state), experiment.federation.aggregation.rule
    theirs = experiment.federation.ditto is not None
    if not experiment.federation.local_only and not rule.personal and not theirs:
        if client is not None:
            raise UserError(
                f"--client={client}, but the run has one global adapter; leave --client out."
            )
        return state.lora
    if client is None or not 0 <= client < len(adapters):
        why = "a local-only run has an adapter for each client"
        if theirs:
            why = "personal.ditto gave every client an adapter of its own"
        if rule.personal:
            why = f"federation.lora_rule={rule.name} leaves every client a part of its own"
        raise UserError(f"{why}; give --client=0 to {len(adapters) - 1}, not {client}.")
    return adapters[client]


def check_rank(experiment: Experiment, round: int, changed: bool, rank: int | None) -> None:
    """Raises UserError where an adapter alone is not the model, and where a rank does nothing."""
    if changed and rank is None:
        name = experiment.federation.aggregation.rule.name
        raise UserError(
            f"round {round} has changed the base weights (federation.lora_rule={name}); an adapter "
            "alone is not the model. Add --merge, or --rank=64 for the best adapter of that rank."
        )
    if rank is not None and not (changed and rank >= 1):
        raise UserError(
            f"--rank={rank}: a rank of at least 1 is for runs that changed the base; the adapter of "
            "any other run is exact as it is. Leave --rank out."
        )


def whole_adapter(
    change: dict[str, np.ndarray], adapter: Adapter, scale: float, rank: int
) -> tuple[Adapter, float]:
    """Returns the adapter of that rank that is nearest to base change and adapter together.

    It is exact where the rank is no less than that of ΔW / s + a b. Its alpha is s · rank.

    Args: change: {projection: ΔW float32[L', in, out]}; scale: s.
    Returns: the adapter; its relative error over all layers and projections (Frobenius).
    """
    pairs, lost, whole = {}, 0.0, 0.0
    for name, pair in adapter.by_name().items():
        a, b = (np.asarray(x, np.float64) for x in (pair.a, pair.b))
        wanted = np.asarray(change[name], np.float64) / scale + a @ b
        a, b, dropped = low_rank.truncate(wanted, np.eye(wanted.shape[-1]), rank)
        pairs[name] = host_pair(np.float32(a), np.float32(b))
        lost, whole = lost + np.sum(dropped**2), whole + np.sum(wanted**2)
    return Adapter(**pairs), float(np.sqrt(lost / whole)) if whole else 0.0
