"""Candidate: a named implementation of an op."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from poolbench.core.case import Case

# Frameworks, and the modes in which each calls a function; a NumPy function is called as it is in all of them.
BACKENDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tensorflow": ("eager", "graph", "xla"),
        "jax": ("xla",),
        "torch": ("eager", "compile"),
        "numpy": ("eager", "graph", "xla"),
    }
)
KERAS = ("tensorflow", "jax", "torch")  # those below Keras
FORMS = ("function", "layer")
# The reusable layers, and the module of each.
OWN_LAYERS: Mapping[str, str] = MappingProxyType(
    {
        "DepthMaxPool2D": "poolbench.layers",
        "AdaptivePooling2D": "poolbench.adaptive_pooling",
        "MaskedGlobalPooling1D": "poolbench.masked_pooling",
        "GeMPooling2D": "poolbench.gem_pooling",
    }
)
Builder = Callable[[Case], Callable[..., Any]]
Snippet = Callable[[Case], str]


@dataclass(frozen=True, kw_only=True)
class KnownFailure:
    """A documented failure: the cases, the text of the error, and the reason.

    Attributes:
        when: the cases in which it is expected.
        matches: regular expression that the error's text must match.
        reason: one sentence for the reader.
        issue: the upstream issue, 'tensorflow#636', if there is one.
    """

    when: Callable[[Case], bool]
    matches: str
    reason: str
    issue: str = ""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A call of an implementation with arguments that no case of its op has, for the support matrix.

    Attributes:
        check: the check that tries it: 'silent' or 'overlap'.
        words: the arguments as text.
        make: returns the function of x.
        right: returns the correct answer for x, in NumPy.
    """

    check: str
    words: str
    make: Callable[[], Callable[[Any], Any]]
    right: Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A named implementation of an op.

    Attributes:
        op: the op that it implements.
        name: 'reduce_max'; unique within the op.
        form: 'function' or 'layer' (the cost of a Keras layer's call is then part of it).
        backends: the frameworks that run it: ('tensorflow',), ('numpy',), or KERAS for one that calls Keras alone.
        about: a description in one line.
        build: called in the worker with the case; returns a function of the op's inputs.
        failures: its documented failures.
        file: the file that registers it; workers import it by this path.
        builtin: whether it ships with the package; a user's candidate joins every case of its op.
        variants: calls with further arguments, for the support matrix.
        snippet: code to paste for a case, at most ten lines that define `pool`; None: show `build`.
    """

    op: str
    name: str
    form: str
    backends: tuple[str, ...] = ("tensorflow",)
    about: str
    build: Builder
    failures: tuple[KnownFailure, ...] = ()
    file: str
    builtin: bool = False
    variants: tuple[Variant, ...] = ()
    snippet: Snippet | None = None

    @property
    def code(self) -> str:
        """The source text of the builder from its `def` on; '' where it is not at hand."""
        try:
            source = inspect.getsource(self.build)
        except (OSError, TypeError):
            return ""
        start = re.search(r"^def ", source, flags=re.MULTILINE)
        return source[start.start() :] if start else source

    def runs(self, backend: str, mode: str) -> bool:
        """Tell whether it can be called in a worker of this backend in this mode."""
        return backend in self.backends and mode in BACKENDS[backend]


def contender_name(candidate: str, backend: str) -> str:
    """Return the name in a race: 'mean' on TensorFlow, 'mean@jax' on JAX."""
    return f"{candidate}@{backend}" if backend in ("jax", "torch") else candidate


def split_contender(name: str) -> tuple[str, str]:
    """Return candidate and backend of a name in a race; the backend is '' where it has no label."""
    candidate, _, backend = name.partition("@")
    return candidate, backend
