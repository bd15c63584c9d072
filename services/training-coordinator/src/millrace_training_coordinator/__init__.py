"""Pipelines, runs and reproducibility."""
