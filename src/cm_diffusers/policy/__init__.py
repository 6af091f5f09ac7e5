"""Sampling seen as decisions: trajectories, their probabilities and advantages, for reward fine-tuning."""
