"""Ditto: beside the global adapter every client trains one of its own, pulled towards it.

    v_k ← v_k − η (∇F_k(v_k) + λ (v_k − θ))

A client that trains in a round takes the round's steps a second time, from its stored v_k, on the same
rows. The pull enters before clipping and AdamW, as FedProx's does. Nothing of v_k is sent, and the bits
of θ do not depend on it. With λ = 0 clients are alone, on shared rollouts; a large λ gives θ back.

Source: Ditto (arXiv 2012.04221). Departure: the rows are those that the global adapter's rollouts gave.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from spear_jax.core.mesh import CLIENTS, to_host
from spear_jax.federated import cohort_training
from spear_jax.federated.federation import Federation, broadcast_to_clients
from spear_jax.federated.local_training import Broadcast, LocalConfig, optimiser
from spear_jax.federated.state import ClientStart, ClientState
from spear_jax.models.params import Adapter

Members = tuple[np.ndarray, np.ndarray, np.ndarray]


def init(adapter: Adapter, clients: int) -> dict[str, Any]:
    """Returns what is kept before round 1: {"personal": leaves float32[K, ...]}, all the adapter."""
    return {"personal": broadcast_to_clients(jax.tree.map(np.asarray, adapter), clients)}


def train(
    federation: Federation,
    local: LocalConfig,
    broadcast: Broadcast,
    rows: cohort_training.Rows,
    members: Members,
    personal: Adapter,
    own: ClientStart | None = None,
) -> tuple[Adapter, float]:
    """Trains a cohort's own adapters on the rows of its round.

    Args:
        local: the round's; members: as `cohort_training.train` takes them.
        personal: v_k of the cohort, leaves [C, ...], on the host.
    Returns: the new ones, likewise, those of clients that do not train unchanged; the mean loss.
    """
    local = dataclasses.replace(local, prox=federation.ditto or 0.0, drift=None)
    cohort, devices = len(rows.blocks), federation.mesh.shape[CLIENTS]
    usual = federation.clients_per_round if federation.asynchronous else cohort
    size = cohort_training.chunk_size(
        usual, rows.bytes_per_client(), local.clients_at_once, devices
    )
    whole = -(-cohort // size) * size
    padded = jax.tree.map(lambda x: np.resize(x, (whole, *x.shape[1:])), personal)
    like = jax.eval_shape(jax.vmap(optimiser(local).init), padded)
    moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    begun = ClientState(padded, moments)
    chunk = lambda at: jax.tree.map(lambda x: x[at : at + size], begun)
    trained = cohort_training.train(
        federation.algorithm,
        federation.decoder,
        local,
        federation.mesh,
        federation.aggregation,
        broadcast.replace(moments=None),
        rows,
        members,
        keep=True,
        carried=[chunk(at) for at in range(0, whole, size)],
        own=None if own is None or own.steps is None else ClientStart(None, steps=own.steps),
    )
    states = to_host([state.lora for state in trained.states or []])
    join = lambda *parts: np.concatenate(parts)[:cohort]
    loss = trained.means["loss"]
    return jax.tree.map(join, *states), float(loss.total.sum() / max(1.0, loss.count.sum()))


def put(kept: dict[str, Any], clients: list[int], trained: Adapter) -> dict[str, Any]:
    """Returns what is kept after a round. Args: trained: leaves [C, ...]."""
    personal = jax.tree.map(np.array, kept["personal"])  # a checkpoint may be writing the old
    jax.tree.map(lambda old, new: old.__setitem__(clients, new), personal, trained)
    return kept | {"personal": personal}
