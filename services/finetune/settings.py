"""The variables of the fine-tune service. Each is `ARGOSY_` and the field's name in capitals; durations carry their unit."""
