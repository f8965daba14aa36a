"""Property tests here have no deadline: the machine they run on is shared, and time is not what they test."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
