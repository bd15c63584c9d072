"""Drift, performance and data-quality findings."""
