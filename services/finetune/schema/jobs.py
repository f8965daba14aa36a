"""Jobs, attempts, events, checkpoints and rates."""
