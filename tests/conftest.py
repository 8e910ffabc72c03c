"""Fixtures and settings of all tests."""

import os

from hypothesis import settings

# Modules of the tests whose functions a worker may run.
os.environ["POOLBENCH_TASK_MODULES"] = (
    "tests.test_process,test_process,test_profile,test_gpu,test_capabilities,traced,test_hacks"
)

# On a machine that others share, how long an example takes is no fact of the code.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
