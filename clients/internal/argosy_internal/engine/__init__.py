"""The engine service: argosy.internal.engine.v1."""
