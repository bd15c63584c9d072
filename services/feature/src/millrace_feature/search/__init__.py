"""Search among embeddings: an index in memory that follows the online store, and exact search in it."""
