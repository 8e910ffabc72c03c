"""Program: the record of what a framework made of a candidate. Plain data."""

from __future__ import annotations

from typing import Annotated

import msgspec

# Every JSON reader represents integers below this exactly.
MAX_COUNT = 1 << 53
Count = Annotated[int, msgspec.Meta(ge=0, lt=MAX_COUNT)]


class Program(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a framework made of a candidate. Equal hashes are evidence that two functions are one program.

    The counts explain a time and do not predict it.

    Attributes:
        hash: 16 hexadecimal digits of the SHA-256 of its normalised text.
        key: 'tensorflow 2.21.0, threads=2'; hashes compare only where the keys are equal.
        kernels: fusions and other instructions of XLA that run as a kernel of their own, or the operations of a
            graph after grappler and oneDNN, or those that an eager call launched.
        flops: floating-point and integer operations per call, transcendental functions not counted; XLA only.
        bytes_accessed: bytes that its kernels read and write per call; XLA only.
        peak_buffer_nbytes: bytes of results and temporaries in XLA's buffer assignment.
        temporary_nbytes: of these, temporaries.
        operations: names, in order, where XLA did not compile it.
    """

    hash: str
    key: str
    kernels: Count
    flops: Count | None = None
    bytes_accessed: Count | None = None
    peak_buffer_nbytes: Count | None = None
    temporary_nbytes: Count | None = None
    operations: tuple[str, ...] = ()
