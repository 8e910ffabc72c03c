"""Partner process of poolbench.machine.core_distance on the other processor; standard library only.

It stays on one processor. For each byte read from standard input it rewrites the shared memory and
answers with the same byte. It ends when its input is closed.
"""

import mmap
import os
import sys


def main(memory: int, nbytes: int, cpu: int) -> None:
    """Answer requests on this processor; `memory` is the file descriptor of the shared memory."""
    os.sched_setaffinity(0, {cpu})
    shared, source = memoryview(mmap.mmap(memory, nbytes)), bytes(nbytes)
    while order := os.read(0, 1):
        shared[:] = source
        os.write(1, order)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
