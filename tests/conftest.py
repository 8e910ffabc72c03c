"""Fixtures and settings of all tests."""

import os

from hypothesis import HealthCheck, settings

# Modules of the tests whose functions a worker may run.
os.environ["POOLBENCH_TASK_MODULES"] = "tests.test_process,test_process,test_gpu,traced,test_hacks"

# The runs that a test starts are none of pytest-xdist's workers, which store no benchmark.
os.environ.pop("PYTEST_XDIST_WORKER", None)
# A developer's own runs change no test.
os.environ.pop("POOLBENCH_RESULTS", None)

# On a machine that others share, how long an example takes is no fact of the code.
settings.register_profile(
    "shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared-machine")

# The files that take longest, slow tests included: the longest first.
LONGEST = """
    test_which_models test_faults test_scale test_fuzz_files test_page test_cluster test_tensorflow_faults
    test_sides test_masked_pooling test_adaptive_pooling test_which_values test_op_failures test_gem_pooling
    test_layers test_readme test_plugin test_profile test_scheduler test_matrix_probes test_user_op
    test_tensorboard test_gpu test_upstream test_network test_backends test_stats test_program_compiled
    test_selftest test_recipes test_process test_hacks test_docs_generated test_report
""".split()


def pytest_collection_modifyitems(items):
    """Start the longest files first: one that starts last has one core to itself, and the other idles."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
