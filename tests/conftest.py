"""What holds for all tests."""

from hypothesis import settings

# On a machine that others share, how long an example takes is no fact of the code.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
