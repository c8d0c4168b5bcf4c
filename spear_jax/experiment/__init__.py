"""An experiment from its config to its run folder: building, the loop, evaluation, checkpoints."""
