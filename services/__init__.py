"""Argosy's services: a gateway, inference replicas and, between them, only gRPC."""

import os

# Children are spawned, never forked to go on, so gRPC's fork handlers have nothing to do; where one ran between a fork and its exec (uvloop
# forks), it aborted the child. Read once, when gRPC starts, so it stands before any import of it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # core's own lines on stderr are not JSON; what it has to say reaches us as statuses
