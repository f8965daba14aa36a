"""Stubs of package argosy.internal.engine.v1, generated from protos/internal."""
