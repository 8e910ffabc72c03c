"""The fields of an environment that can affect timings, which pooled or compared runs must share."""

from __future__ import annotations

import re
from collections.abc import Sequence

from poolbench.core.errors import UsageError
from poolbench.core.records import Environment
from poolbench.stats.runs import check_same_machine
from poolbench.store.journal import StoredRun

MACHINE = frozenset(
    "processor architecture features cores threads usable_threads cpu_quota last_level_cache_nbytes system release"
    " virtual idle_states_disabled".split()
)
# Packages that compute or provide kernels; pytest, pandas and the profiler's viewer do neither.
VERSIONS = re.compile(
    r"python|numpy|ml_dtypes|(tensorflow|tf|keras|jax|torch|triton|nvidia|cuda|cudnn|onednn|openvino)([-_].*|\w*)"
)
SETTINGS = re.compile(r"(?!TF_CPP_MIN_LOG_LEVEL$|TF_CLI_CONFIG_FILE$).*")


def timing_facts(environment: Environment) -> dict[str, str | bool | int | float | None]:
    """Return the fields on which a timing can depend, by name."""
    return {
        **{name: value for name, value in environment.machine.items() if name in MACHINE},
        **environment.devices,
        **{name: v for name, v in environment.versions.items() if VERSIONS.fullmatch(name)},
        **{name: v for name, v in environment.settings.items() if SETTINGS.fullmatch(name)},
    }


def code_of(environment: Environment) -> str:
    """Return the digest of the package, or the commit where a journal has none."""
    source = environment.source
    return str(source.get("code") or source.get("commit", "unknown"))


def check_poolable(runs: Sequence[StoredRun]) -> None:
    """Raise UsageError unless the runs are of one machine and one code.

    The digest of the package decides on the code; a journal without one is told by its commit.
    """
    names = [run.header.run for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(
            f"{twice[0]} is named twice: a run does not confirm itself; name each once"
        )
    heads = [run.header.environment for run in runs]
    try:
        check_same_machine([{**timing_facts(head), "code": code_of(head)} for head in heads])
    except ValueError as error:
        raise UsageError(f"{error}; name runs of one machine and one code") from None
