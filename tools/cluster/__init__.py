"""A Kubernetes cluster from packages alone, for tests and for a first look: `python -m tools.cluster up`.

Tier 1 is a control plane with fake nodes, as plain processes on loopback. Tier 2 adds one real node in namespaces of its own: a container
runtime, a kubelet, pods with a network, and fake GPUs.
"""
