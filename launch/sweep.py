"""Runs `python -m spear_jax.sweep` from a clone of the repository."""

from spear_jax.experiment import command_line
from spear_jax.sweep import main

if __name__ == "__main__":
    command_line.run(main)
