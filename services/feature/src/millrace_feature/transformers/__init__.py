"""Fitted transformers: learned once on a training set, kept by content, applied by one function to reads and to training sets.

`artifact.py` is what is kept, `fitting.py` learns it, `applying.py` applies it, `attach.py` puts it into a compiled feature service; the
other modules are the kinds. Nothing here knows gRPC or Feast, and applying needs numpy alone.
"""
