"""Versions of definitions: history, pins, differences, who may change and read them, and the audit."""
