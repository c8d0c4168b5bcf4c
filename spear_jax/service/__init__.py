"""Feedback from people over HTTP: what is stored, the API, and the page. Nothing here imports JAX."""
