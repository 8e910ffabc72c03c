"""The process on the other processor: a script of the standard library alone, run by poolbench.machine.core_distance.

It holds to one processor. For each byte that it reads from standard input it writes all of the shared memory
anew and answers with the same byte; it ends when the input is closed.
"""

import mmap
import os
import sys


def main(memory: int, nbytes: int, cpu: int) -> None:
    """Answer on this processor; `memory` is the file descriptor of what is shared."""
    os.sched_setaffinity(0, {cpu})
    shared, source = memoryview(mmap.mmap(memory, nbytes)), bytes(nbytes)
    while order := os.read(0, 1):
        shared[:] = source
        os.write(1, order)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
