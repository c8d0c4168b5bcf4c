"""Robust reducers: a few clients, whatever they send, do not decide the result; one file a paper."""

from spear_jax.federated.aggregation.reducers import Reducer
from spear_jax.federated.aggregation.robust.bulyan import Bulyan
from spear_jax.federated.aggregation.robust.centred_clip import CentredClip
from spear_jax.federated.aggregation.robust.coordinate_wise import CoordinateMedian, TrimmedMean
from spear_jax.federated.aggregation.robust.fltrust import FLTrust
from spear_jax.federated.aggregation.robust.geometric_median import GeometricMedian
from spear_jax.federated.aggregation.robust.krum import Krum, MultiKrum
from spear_jax.federated.aggregation.robust.norm_clip import NormClip

ROBUST: dict[str, type[Reducer]] = {
    "norm_clip": NormClip,
    "median": CoordinateMedian,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "bulyan": Bulyan,
    "geometric_median": GeometricMedian,
    "centred_clip": CentredClip,
    "fltrust": FLTrust,
}
