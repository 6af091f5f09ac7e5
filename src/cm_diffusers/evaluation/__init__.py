"""Measuring: metrics, tables, plots and grids of samples."""

from cm_diffusers.extras import require_training


require_training()
