"""Finished and running experiments as tables, figures and a report page; no JAX."""
