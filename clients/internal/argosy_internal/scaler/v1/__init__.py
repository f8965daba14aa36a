"""Stubs of package externalscaler, generated from protos/internal."""
