"""`python -m bench devices`: what TensorFlow sees on this machine."""

from __future__ import annotations

import sys


def main(words: list[str]) -> int:
    """Run one of the doors in the table; the exit code."""
    if not words or words[0] not in DOORS:
        print(f"usage: python -m bench {{{','.join(DOORS)}}} ...", file=sys.stderr)  # noqa: T201
        return 2
    return DOORS[words[0]](words[1:])


def print_devices(words: list[str]) -> int:
    """Print the devices' names, one a line."""
    del words
    from bench.replica import Setting
    from bench.workload import list_devices, start_tensorflow

    start_tensorflow(Setting())
    print("\n".join(list_devices()))  # noqa: T201
    return 0


DOORS = {"devices": print_devices}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
