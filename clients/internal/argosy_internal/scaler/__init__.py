"""KEDA's external scaler: package externalscaler."""
