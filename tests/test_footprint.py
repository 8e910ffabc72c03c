import os
import subprocess
import threading
import time

import numpy as np
from poolbench.worker import isolation


def test_describe_unchanged_state_is_empty():
    assert isolation.left_behind(isolation.read(), grace_seconds=0) == ""


def test_a_thread_that_stays_is_counted_and_one_that_leaves_is_not():
    before = isolation.read()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert isolation.left_behind(before, grace_seconds=0) == "it left 1 threads that stay"
    stop.set()
    thread.join()
    short = threading.Thread(target=time.sleep, args=(0.01,))
    short.start()
    assert isolation.left_behind(before) == ""


def test_a_process_that_stays_is_counted():
    before = isolation.read()
    with subprocess.Popen(["sleep", "60"]) as process:
        assert isolation.left_behind(before, grace_seconds=0) == "it left 1 processes that stay"
        process.kill()


def test_changed_settings_are_named(monkeypatch):
    before = isolation.read()
    monkeypatch.setenv("TF_POOLBENCH_TEST", "1")
    with np.errstate(divide="raise"):
        said = isolation.left_behind(before, grace_seconds=0)
    assert "it changed numpy.geterr" in said
    assert "it changed environment variables" in said


def test_describe_changed_working_directory_names_both(monkeypatch):
    monkeypatch.chdir("/")
    before = isolation.read()
    os.chdir("/tmp")
    assert "it changed working directory from '/' to '/tmp'" in isolation.left_behind(
        before, grace_seconds=0
    )


def test_a_framework_that_was_not_there_before_changes_nothing():
    assert isolation.changes({"a": 1}, {"a": 1, "keras.config.floatx": "float32"}) == []
