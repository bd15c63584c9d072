"""Sources that ingestion reads by itself: topics of others, and files.

A source's batches take the same way as a producer's `Write`: under a name of their own (`_<source>/<topic>-<partition>`, with the offset
after the last message, or `_<source>/<file>` with the number of records), so that the lake, and nothing else, says where reading goes on.
Names that begin with an underscore are closed to producers.
"""
