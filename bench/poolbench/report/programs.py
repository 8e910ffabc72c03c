"""What compilers made of the candidates, and the settings of their frameworks: equal, changed, or unlike."""

from __future__ import annotations

from dataclasses import dataclass

from poolbench.core.case import case_label
from poolbench.core.program import Program
from poolbench.core.records import Measurement
from poolbench.core.text import format_nbytes
from poolbench.store.journal import StoredRun

NAMES_SHOWN = 6
COUNTS = ("kernels", "flops", "bytes_accessed", "temporary_nbytes")


def same_program(one: Measurement, other: Measurement) -> bool:
    """Tell whether XLA made one program of both: equal hashes of one compiler with one number of threads."""
    if one.program is None or other.program is None or one.case.mode != "xla":
        return False
    return one.program.hash == other.program.hash and one.program.key == other.program.key


def unlike(one: Measurement, other: Measurement) -> str:
    """Return 'unlike: threads 2 | 1' for settings that both have and that differ; '' if none does."""
    found = [
        f"{name} {value} | {other.settings[name]}"
        for name, value in one.settings.items()
        if other.settings.get(name, value) != value
    ]
    return f"unlike: {', '.join(found)}" if found else ""


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The programs of two runs.

    Attributes:
        common: how many candidates and cases both runs have a program of.
        changed: a line each.
        keys: compilers that differ, 'tensorflow 2.20.0, threads=2 | tensorflow 2.21.0, threads=2'.
        worse: whether one compiler made another program of a candidate.
    """

    common: int
    changed: tuple[str, ...]
    keys: tuple[str, ...]
    worse: bool

    @property
    def summary(self) -> str:
        """How many are equal, in one or two sentences; '' without a program in both runs."""
        if not self.common:
            return ""
        text = f"Programs: {self.common - len(self.changed)} of {self.common} are equal."
        if self.keys:
            text += (
                f" The compilers differ ({'; '.join(self.keys)}): a changed program means "
                "'measure again', not 'worse'."
            )
        return text

    @property
    def note(self) -> str:
        """The summary with the first changed programs."""
        more = len(self.changed) - NAMES_SHOWN
        shown = [*self.changed[:NAMES_SHOWN], *([f"{more} more"] if more > 0 else [])]
        return self.summary + (f" Changed: {'; '.join(shown)}." if shown else "")


def compare_programs(base: StoredRun, run: StoredRun) -> Programs:
    """Return which programs changed from one run to another."""
    before, after = (
        {
            (m.case, m.node, m.candidate): m.program
            for m in one.measurements
            if m.program is not None
        }
        for one in (base, run)
    )
    shared = [(place, before[place], new) for place, new in after.items() if place in before]
    changed = [
        f"{case.op} {name} ({case_label(case)}) {_counts(old, new)}".rstrip()
        for (case, _, name), old, new in shared
        if old.hash != new.hash
    ]
    keys = dict.fromkeys(f"{old.key} | {new.key}" for _, old, new in shared if old.key != new.key)
    worse = any(old.hash != new.hash and old.key == new.key for _, old, new in shared)
    return Programs(common=len(shared), changed=tuple(changed), keys=tuple(keys), worse=worse)


def _counts(old: Program, new: Program) -> str:
    """Return the counts that differ: 'kernels 2 -> 3, bytes_accessed 34 MiB -> 43 MiB'."""
    words = []
    for name in COUNTS:
        one, other = getattr(old, name), getattr(new, name)
        if one != other and one is not None and other is not None:
            texts = [format_nbytes(v) if "bytes" in name else str(v) for v in (one, other)]
            words.append(f"{name} {' -> '.join(texts)}")
    return ", ".join(words)
