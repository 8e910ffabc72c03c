"""Read the text of an optimised HLO module: what the program is and what it costs.

Nothing here needs a framework: XLA's text is the same from TensorFlow and from JAX.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

# Attributes that say where an instruction comes from, not what it does.
ORIGIN = {"metadata", "frontend_attributes", "sharding", "parameter_replication", "origin"}
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\],]|[^"(){}\[\],]+')
INSTRUCTION = re.compile(r"\s+(ROOT )?(%[\w.-]+) = (.+?) ([a-z][\w-]*)(\(.*)")
NAME = re.compile(r"%[\w.-]+")
ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\]")
CALLED = frozenset(
    """branch_computations body called_computations calls condition false_computation scatter select
    to_apply true_computation""".split()
)

FREE = frozenset("parameter constant bitcast get-tuple-element after-all".split())
NESTED = frozenset("call while conditional async-start".split())
ELEMENTWISE = frozenset(
    """abs add and ceil clamp compare convert count-leading-zeros divide floor is-finite maximum
    minimum multiply negate not or popcnt reduce-precision remainder round-nearest-afz
    round-nearest-even select shift-left shift-right-arithmetic shift-right-logical sign subtract
    xor""".split()
)


class Cost(NamedTuple):
    """Operations, bytes and kernels of a program or of a part of it."""

    flops: int
    bytes_accessed: int
    kernels: int


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    arguments: str
    attributes: dict[str, str]
    root: bool

    @property
    def operands(self) -> list[str]:
        return NAME.findall(self.arguments)

    @property
    def called(self) -> list[str]:
        return [n for k, v in self.attributes.items() if k in CALLED for n in NAME.findall(v)]


_Computation = dict[str, _Instruction]


def normalise_hlo(text: str) -> str:
    """Return the text of an optimised HLO module without what does not change the program.

    Instructions are numbered within their computation, and a computation is named by the digest of
    its own text, so neither names nor the order of computations matter.
    """
    digests: dict[str, str] = {}
    bodies: dict[str, str] = {}
    digest = ""
    for computation, instructions in _parse(text).items():
        numbers = {name: f"%{i}" for i, name in enumerate(instructions)}
        lines = []
        for name, each in instructions.items():
            line = f"{numbers[name]} = {each.shape} {each.opcode}{_rename(each.arguments, numbers)}"
            for key, value in sorted(each.attributes.items()):
                line += f", {key}={_rename(value, digests if key in CALLED else numbers)}"
            lines.append("ROOT " * each.root + line)
        body = "\n".join(lines)
        digest = digests[computation] = "%" + hashlib.sha256(body.encode()).hexdigest()[:16]
        bodies[digest] = f"{digest} {{\n{body}\n}}\n"
    # Which input a result may overwrite stands in the module's first line only.
    aliases = [f for f in _split(text.split("\n", 1)[0]) if f.startswith("input_output_alias")]
    return "".join([*sorted(bodies.values()), *aliases, f"ENTRY {digest}\n"])


def count_cost(text: str) -> Cost:
    """Return the cost of an optimised HLO module by the rules of XLA's HloCostAnalysis.

    The body of a loop and every branch of a conditional count once, custom calls and Fourier
    transforms cost no operations, and the count of a convolution includes its padding.
    """
    computations = _parse(text)
    costs: dict[str, Cost] = {}
    cost = Cost(0, 0, 0)
    for computation, instructions in computations.items():
        parts = [_cost(each, instructions, computations, costs) for each in instructions.values()]
        cost = costs[computation] = _total(parts)
    return cost


def _total(parts: Iterable[Cost]) -> Cost:
    return Cost(*map(sum, zip(Cost(0, 0, 0), *parts, strict=True)))


def _cost(
    each: _Instruction,
    computation: _Computation,
    computations: dict[str, _Computation],
    costs: dict[str, Cost],
) -> Cost:
    inner = _total(costs[name] for name in each.called)
    if each.opcode in FREE or each.opcode.endswith("-done"):
        return Cost(0, 0, 0)
    if each.opcode == "tuple":  # a table of pointers
        return Cost(0, 8 * len(each.operands), 0)
    if each.opcode in NESTED:
        return inner
    flops = _flops(each, [_dimensions(computation[n].shape) for n in each.operands], inner.flops)
    body, users, root = computation, [each], each
    inputs = each.operands
    if each.opcode == "fusion":
        body = computations[each.called[0]]
        users = list(body.values())
        root = next(part for part in users if part.root)
        inputs = [name for name, part in body.items() if part.opcode == "parameter"]
    read = sum(_read(name, body[name].shape, users) for name in inputs)
    # An update in place writes its second operand only.
    written = body[root.operands[1]] if root.opcode == "dynamic-update-slice" else each
    return Cost(flops, read + _nbytes(written.shape), 1)


def _read(name: str, shape: str, users: Iterable[_Instruction]) -> int:
    """Return the bytes of an array that its users read.

    A slice reads what it takes, a broadcast reads all for itself, the others share one reading.
    """
    nbytes, shared = 0, 0
    for user in users:
        first = bool(user.operands) and user.operands[0] == name
        if first and user.opcode in ("slice", "dynamic-slice"):
            nbytes += _nbytes(user.shape)
        elif first and user.opcode in ("broadcast", "reshape"):
            nbytes += _nbytes(shape)
        elif name in user.operands and not (first and user.opcode == "dynamic-update-slice"):
            shared = _nbytes(shape)
    return nbytes + shared


def _flops(each: _Instruction, inputs: list[list[int]], inner: int) -> int:
    out = math.prod(_dimensions(each.shape))
    sizes = [math.prod(dimensions) for dimensions in inputs] or [0]
    window = re.search(r"size=([\dx]+)", each.attributes.get("window", ""))
    window_size = math.prod(map(int, window[1].split("x"))) if window else 1
    if each.opcode in ELEMENTWISE:
        return out
    if each.opcode == "dot":
        contracted = re.findall(r"\d+", each.attributes.get("lhs_contracting_dims", ""))
        return 2 * out * math.prod(inputs[0][int(i)] for i in contracted)
    if each.opcode == "convolution":
        features = each.attributes["dim_labels"].split("_")[1].index("o")
        return 2 * out * sizes[1] // inputs[1][features]
    if each.opcode == "sort":
        return sizes[0] * max(sizes[0] - 1, 0).bit_length()
    times = {
        "fusion": 1,
        "map": out,
        "reduce": sizes[0] - out,
        "reduce-window": out * (window_size - 1),
        "scatter": sizes[-1],
    }
    return inner * times.get(each.opcode, 0)


def _parse(text: str) -> dict[str, _Computation]:
    """Return the computations by name, each after those that it calls: the entry comes last."""
    computations: dict[str, _Computation] = {}
    current: _Computation = {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if match := INSTRUCTION.fullmatch(line):
            root, name, shape, opcode, rest = match.groups()
            arguments, *fields = _split(rest)
            attributes = dict(field.partition("=")[::2] for field in fields)
            kept = {key: value for key, value in attributes.items() if key not in ORIGIN}
            if "backend_config" in kept:
                with contextlib.suppress(json.JSONDecodeError):  # of a custom call: any text
                    config = json.loads(kept["backend_config"])
                    kept["backend_config"] = json.dumps(config, sort_keys=True)
            current[name] = _Instruction(shape, opcode, arguments, kept, bool(root))
        elif line.endswith("{") and (head := NAME.search(line)):
            current = computations[head[0]] = {}
    return computations


def _split(text: str) -> list[str]:
    """Return the fields between the commas that stand outside brackets and strings."""
    fields, depth = [""], 0
    for piece in TOKEN.findall(text):
        depth += (piece in "([{") - (piece in ")]}")
        if piece == "," and not depth:
            fields.append("")
        else:
            fields[-1] += piece
    return [field.strip() for field in fields]


def _rename(text: str, names: dict[str, str]) -> str:
    return NAME.sub(lambda found: names.get(found[0], found[0]), text)


def _dimensions(shape: str) -> list[int]:
    """Return the dimensions of the first array of a shape."""
    array = ARRAY.search(shape)
    return [int(size) for size in re.findall(r"\d+", array[2])] if array else [0]


def _nbytes(shape: str) -> int:
    """Return the bytes of all arrays of a shape."""
    total = 0
    for dtype, dimensions in ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        size = math.prod(int(size) for size in re.findall(r"\d+", dimensions))
        total += size * max(1, int(bits[0]) // 8 if bits else 1)
    return total
