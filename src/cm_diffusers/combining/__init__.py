"""Linear combinations of the weights that a training run kept, and the search for the best one."""
