"""Models, versions, aliases and evaluations."""
