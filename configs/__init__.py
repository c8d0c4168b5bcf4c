"""Experiment configs: one file per algorithm, and the embedded defaults."""
