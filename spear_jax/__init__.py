"""spear_jax: federated self-play fine-tuning of language models from feedback, in JAX."""

__version__ = "0.1.0"
