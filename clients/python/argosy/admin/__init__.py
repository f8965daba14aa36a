"""Administration: argosy.admin.v1."""
