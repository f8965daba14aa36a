"""Stubs of package argosy.admin.v1, generated from protos/public."""
