"""Stubs of package argosy.v1, generated from protos/public."""
