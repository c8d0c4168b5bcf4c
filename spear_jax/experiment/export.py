"""A run's adapter as a PEFT folder, or merged into a full Hugging Face model folder."""

import pathlib
from typing import Any

import jax
import numpy as np

from spear_jax.core.errors import UserError
from spear_jax.core.files import writing
from spear_jax.experiment.builder import Experiment
from spear_jax.federated.local_only import of_client
from spear_jax.federated.state import ServerState
from spear_jax.models.io.huggingface import save_model
from spear_jax.models.io.peft import save_adapter
from spear_jax.models.lora import merge_lora


def export_adapter(
    experiment: Experiment,
    state: ServerState,
    folder: str | pathlib.Path,
    client: int | None = None,
) -> pathlib.Path:
    """Writes adapter_config.json and adapter_model.safetensors. Args: client: whose adapter, of a
    local-only run. Raises: UserError where the folder is not empty, DiskError where it cannot be
    written.
    """
    out = check_empty(folder)
    adapter, model = chosen_adapter(experiment, state, client), experiment.model
    # PEFT loads the base from this name; the embedded model has a folder only
    named = experiment.settings.model
    base = str(model.source) if named == "tiny" else named
    with writing(out):
        save_adapter(out, adapter, experiment.federation.decoder.lora, model.config, base)
    return out


def export_model(
    experiment: Experiment,
    state: ServerState,
    folder: str | pathlib.Path,
    client: int | None = None,
) -> pathlib.Path:
    """Writes the whole model, the adapter merged; arguments as `export_adapter`.

    Raises: UserError for a quantised base, whose weights are no longer those that were given.
    """
    if experiment.settings.quantize != "none":
        raise UserError(
            f"quantize is {experiment.settings.quantize}, and a quantised base cannot take the "
            "adapter; open the run with config.quantize = 'none', as the export command does."
        )
    out = check_empty(folder)
    adapter, model = chosen_adapter(experiment, state, client), experiment.model
    merged = merge_lora(model.base, adapter, experiment.federation.decoder.lora)
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
    """Returns the global adapter, or one client's of a local-only run."""
    if not experiment.federation.local_only:
        if client is not None:
            raise UserError(
                f"--client={client}, but the run has one global adapter; leave --client out."
            )
        return state.lora
    count = len(experiment.federation.clients)
    if client is None or not 0 <= client < count:
        raise UserError(
            f"a local-only run has an adapter for each client; give --client=0 to {count - 1}, "
            f"not {client}."
        )
    return of_client(state, client).lora
