"""Measuring: metrics, tables, plots and grids of samples."""
