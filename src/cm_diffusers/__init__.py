"""Consistency models on diffusers: few-step students, their training, and what sampling them needs."""

__version__ = "0.1.0"
