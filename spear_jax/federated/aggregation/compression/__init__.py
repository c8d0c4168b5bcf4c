"""Compressors of clients' updates, by name."""

from spear_jax.federated.aggregation.compression.base import Compressor
from spear_jax.federated.aggregation.compression.blocks import Int4, Int8
from spear_jax.federated.aggregation.compression.qsgd import Qsgd
from spear_jax.federated.aggregation.compression.rank import RankUplink
from spear_jax.federated.aggregation.compression.sparse import RandomK, TopK

COMPRESSORS: dict[str, type[Compressor]] = {
    kind.name: kind for kind in (Int8, Int4, Qsgd, TopK, RandomK)
}
KINDS = (*COMPRESSORS, RankUplink.name)  # of `compression.kind`
