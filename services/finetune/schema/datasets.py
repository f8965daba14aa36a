"""Datasets, their versions and uploads."""
