"""The mathematics: noising processes, scalings, solvers, times, guidance and distances, as pure functions."""
