"""Feature definitions, online values and training sets."""
