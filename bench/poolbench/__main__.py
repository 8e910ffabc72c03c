"""`python -m poolbench DOOR`: what the sessions call that no pytest run is behind."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable


def main(words: list[str]) -> int:
    """Run one of the doors in the table; the exit code."""
    if not words or words[0] not in DOORS:
        print(f"usage: python -m poolbench {{{','.join(DOORS)}}} ...", file=sys.stderr)
        return 2
    return DOORS[words[0]](words[1:])


def print_devices(words: list[str]) -> int:
    """Print the devices' names, one a line."""
    del words
    from poolbench.core.plan import WorkerSpec
    from poolbench.worker.session import list_devices, start_tensorflow

    start_tensorflow(WorkerSpec())
    print("\n".join(list_devices()))
    return 0


def _open(module: str) -> Callable[[list[str]], int]:
    """A command of this module, imported when it is called."""

    def run(words: list[str]) -> int:
        door: Callable[[list[str]], int] = importlib.import_module(module).main
        return door(words)

    return run


def record_traces(words: list[str]) -> int:
    """Record traces of the selected candidates."""
    from poolbench.engine.tracing import main

    return main(words)


def choose_for_model(words: list[str]) -> int:
    """Say which implementation a saved model's pooling should have."""
    from poolbench.models.advise import main

    return main(words)


DOORS = {
    "devices": print_devices,
    "trace": record_traces,
    "which": choose_for_model,
    "selftest": _open("poolbench.engine.selftest"),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
