"""Differential privacy of whole clients: noise, clipping, and the account of what a run reveals."""
