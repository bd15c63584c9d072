"""Fixtures of the kit's tests."""
