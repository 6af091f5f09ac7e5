"""The training loop that knows no method: trainer, players, optimizers, averages, checkpoints and the command line."""
