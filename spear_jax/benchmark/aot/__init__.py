"""Compiles a run's programs for accelerators that are not there, and tells what the compiler says.

`targets` describes the accelerators. `ghosts` plays the host's side of a round with arrays that
have no memory, and records each program that it would start. `programs` builds the experiment that
is played, and `drawn` has the answers that nobody gives. `hlo` and `flops` read the programs.
`measure` and `report` bring the numbers together.
"""
