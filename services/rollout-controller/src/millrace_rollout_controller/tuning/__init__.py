"""`millrace tune`: finds the batching of a version's servers that answers most within a bound on latency, on this machine.

`search` walks over configurations, `bench` measures them with private servers, `rounds` compares the result with the manifest as it is,
`edit` writes it into the manifest. It runs by itself, beside the controller; nothing of it is part of the service.
"""
