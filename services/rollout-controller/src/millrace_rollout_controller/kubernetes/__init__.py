"""ModelDeployments as Kubernetes objects, and model servers as workloads of a cluster."""
