"""A real Kubernetes on one machine, for tests: real control plane, one real node, real pods, and nodes that are only objects.

`python -m cluster up|down|status|images` (with `tools` on PYTHONPATH) is what `make cluster` and `make cluster-down` call;
`controlplane` alone (etcd, API server, controller manager, scheduler) is a pytest fixture. Nothing here is installed with Millrace.
"""
