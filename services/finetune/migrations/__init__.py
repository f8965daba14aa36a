"""The database's versions, applied at start. Expand first, contract a release later: N and N-1 run side by side (F33)."""
