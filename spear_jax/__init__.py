"""spear_jax: federated self-play fine-tuning of language models from feedback, in JAX."""

import os

__version__ = "0.11.0"

# transformers is used for tokenizers only, and would remark on every start that PyTorch is absent.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
