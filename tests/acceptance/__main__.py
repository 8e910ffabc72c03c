"""Run `python tests/acceptance checks`, `tools`, `backends`, `programs` or `sides`; nox calls most of them."""

import os
import sys
from pathlib import Path

TESTS = str(Path(__file__).resolve().parents[1])
sys.path[0] = TESTS
# Worker processes import these modules too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
# Modules whose functions a worker may run.
os.environ["POOLBENCH_TASK_MODULES"] = "acceptance.loops,acceptance.tools"


def main(arguments: list[str]) -> int:
    """Run one of the commands; return its exit code."""
    from acceptance import backends, checks, programs, sides, tool_comparison

    commands = {
        "checks": checks.main,
        "tools": tool_comparison.main,
        "backends": backends.main,
        "programs": programs.main,
        "sides": sides.main,
    }
    if not arguments or arguments[0] not in commands:
        print(f"usage: python tests/acceptance {{{','.join(commands)}}} ...", file=sys.stderr)
        return 2
    return commands[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
