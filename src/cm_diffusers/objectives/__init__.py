"""One file per method: the loss of each, and nothing else."""
