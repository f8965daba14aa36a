"""Stubs for Argosy's own services; never published."""
