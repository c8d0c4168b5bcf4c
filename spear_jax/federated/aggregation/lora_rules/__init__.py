"""LoRA rules by name; one file a paper."""

from spear_jax.federated.aggregation.lora_rules.base import LoraRule
from spear_jax.federated.aggregation.lora_rules.fair import Fair
from spear_jax.federated.aggregation.lora_rules.fedex import FedEx, FedExTruncated
from spear_jax.federated.aggregation.lora_rules.fedper import FedPer
from spear_jax.federated.aggregation.lora_rules.fedsa import FedSA
from spear_jax.federated.aggregation.lora_rules.ffa import FFA
from spear_jax.federated.aggregation.lora_rules.flexlora import FlexLoRA
from spear_jax.federated.aggregation.lora_rules.flora import FLoRA
from spear_jax.federated.aggregation.lora_rules.hetlora import HetLoRA
from spear_jax.federated.aggregation.lora_rules.mean import Mean
from spear_jax.federated.aggregation.lora_rules.rolora import RoLoRA

RULES: tuple[type[LoraRule], ...] = (
    Mean, FFA, FedSA, RoLoRA, FLoRA, FedEx, FedExTruncated, FlexLoRA, HetLoRA, Fair,
    FedPer,
)  # fmt: skip
LORA_RULES: dict[str, type[LoraRule]] = {rule.name: rule for rule in RULES}
