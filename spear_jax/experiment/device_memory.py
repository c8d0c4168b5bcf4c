"""How much of local training goes through a device together, by its memory."""

import dataclasses
import functools

import jax

from spear_jax.algorithms.base import Algorithm
from spear_jax.core.mesh import broadcast_from_main, bytes_on_a_device
from spear_jax.experiment.config import Settings
from spear_jax.federated.local_training import LocalConfig
from spear_jax.models import cost_model
from spear_jax.models.config import ModelConfig
from spear_jax.models.decoder import REMAT, Decoder
from spear_jax.models.io.huggingface import LoadedModel
from spear_jax.models.io.tensor_map import DTYPES
from spear_jax.models.lora import init_lora
from spear_jax.rollout.tokenized_data import TokenizedData


def choose_remat(
    settings: Settings,
    decoder: Decoder,
    algorithm: Algorithm,
    data: TokenizedData,
    model: LoadedModel,
    devices: int,
) -> Decoder:
    """Returns the decoder of local training: where train.remat is "auto", with the least that needs
    to be computed again on this device while its clients train together (`clients_together`).

    Args: devices: that clients are spread over.
    """
    if settings.train.remat != "auto":
        return decoder
    each = lambda remat: bytes_per_client(
        settings, dataclasses.replace(decoder, remat=remat), algorithm, data
    )
    fed, whole = settings.federation, cost_model.whole_device_bytes()
    own = clients_together(settings, decoder.config, algorithm, data, devices)
    together = fed.clients_at_once or cost_model.fitting(own, 0, None)
    left = None if whole is None else whole - bytes_on_a_device(model.base)
    chosen = REMAT.index(cost_model.fitting_remat(each, together, left))
    return dataclasses.replace(decoder, remat=REMAT[broadcast_from_main(chosen)])


def local_config(settings: Settings, together: int, each: int) -> LocalConfig:
    """Returns the settings of local training.

    Args: together: of `clients_together`; each: bytes of one client.
    """
    train, fed = settings.train, settings.federation
    free = broadcast_from_main(cost_model.device_bytes() or 0) or None
    at_once = fed.clients_at_once or cost_model.fitting(together, each, free)
    if fed.aggregation == "local":
        at_once = 1  # a local-only client trains alone
    cost_model.check_memory(at_once, each, free)
    return LocalConfig(
        clients_at_once=at_once,
        normalize=train.normalize,
        max_grad_norm=train.max_grad_norm,
        weight_decay=train.weight_decay,
        anchor_weight=train.anchor_weight,
        anchor_gradient=train.anchor_gradient,
        prox=fed.prox,
        ema_decay=train.ema_decay,
        head_chunk=train.head_chunk,
    )


def max_tokens_per_block(settings: Settings, model: ModelConfig) -> int:
    """Returns the tokens of a block, at most: what is set, or what fills the device."""
    return settings.train.max_tokens_per_block or cost_model.filling_tokens(model)


def block_tokens(
    settings: Settings, model: ModelConfig, algorithm: Algorithm, data: TokenizedData
) -> int:
    """Estimates the tokens of the largest block that may come."""
    common, together = algorithm.common, algorithm.layout.rows_per_group
    p, t = data.prompt_length, data.completion_length
    rows = 4 * common.accumulation * common.batch_size * together  # wins and loses, or a group's
    tokens = min(max_tokens_per_block(settings, model), rows * (p + t))
    return max(tokens, p + max(2, together) * t)


def clients_together(
    settings: Settings, model: ModelConfig, algorithm: Algorithm, data: TokenizedData, devices: int
) -> int:
    """Returns how many of a round's clients train together on a device, as far as memory allows:
    all, or those whose blocks fill it.

    Args: devices: that clients are spread over.
    """
    tokens = block_tokens(settings, model, algorithm, data)
    filling = max(1, cost_model.filling_tokens(model) // tokens)
    return min(filling, -(-settings.federation.clients_per_round // devices))


def bytes_per_client(
    settings: Settings, decoder: Decoder, algorithm: Algorithm, data: TokenizedData
) -> int:
    """Estimates the bytes of one client's local training, beside the base, for the largest block
    that may come.
    """
    make = functools.partial(init_lora, lora=decoder.lora, model=decoder.config)
    lora = jax.eval_shape(make, jax.random.key(0))
    adapter = sum(leaf.size * 4 for leaf in jax.tree.leaves(lora))
    tokens = block_tokens(settings, decoder.config, algorithm, data)
    length = data.prompt_length + data.completion_length
    return cost_model.bytes_per_client(
        decoder.config,
        cost_model.BlockSizes(tokens, tokens, tokens * length, tokens),
        settings.train.head_chunk,
        adapter,
        decoder.remat,
        itemsize=DTYPES[settings.dtype].itemsize,
        dropout=decoder.lora.dropout > 0,
        parts=settings.devices.model,
    )
