"""A package, since a library ships one of this name too, and a folder without this file would lose to it."""
