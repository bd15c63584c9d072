"""Tests of the whole: contracts, integration, end to end, chaos, performance."""
