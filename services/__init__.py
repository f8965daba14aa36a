"""Argosy's services: a gateway, inference replicas and, between them, only gRPC."""
