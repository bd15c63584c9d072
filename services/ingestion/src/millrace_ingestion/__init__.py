"""Accepts, checks and lands records."""
