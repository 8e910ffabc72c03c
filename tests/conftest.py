"""Fixtures and settings of all tests."""

import os

from hypothesis import HealthCheck, settings

# Modules of the tests whose functions a worker may run.
os.environ["POOLBENCH_TASK_MODULES"] = (
    "tests.test_process,test_process,test_profile,test_gpu,test_capabilities,traced,test_hacks"
)

# The runs that a test starts are none of pytest-xdist's workers, which store no benchmark.
os.environ.pop("PYTEST_XDIST_WORKER", None)

# On a machine that others share, how long an example takes is no fact of the code.
settings.register_profile(
    "shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared-machine")
