"""Online/offline consistency: served vectors, sampled by key, beside what the lake says about the same instants.

The method is Chronon's (its docs, "Online Offline Consistency"): a deterministic sample of keys is logged with its answers, computed again
by the code of training sets once late records are in, and compared per feature.
"""
