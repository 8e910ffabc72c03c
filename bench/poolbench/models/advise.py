"""`python -m poolbench which model.keras`: which implementation should this model's pooling have, on this machine?

Reads the model in safe mode, finds its pooling layers, races the step with the layers that could be
pasted in their place, and says what to do in one sentence and a snippet. A model that Keras refuses to load because
of a Lambda or an unknown layer is told from its config.json, without running any of its code.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

import poolbench.ops  # noqa: F401 (registers the ops)
from poolbench.core.axes import format_value
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.registry import REGISTRY
from poolbench.engine.process import Worker
from poolbench.engine.race import Plan
from poolbench.models.study import (
    ALONE,
    AS_BUILT,
    Described,
    Entry,
    Stepped,
    describe,
    race_network,
)
from poolbench.models.zoo import DEPTH, GLOBAL, Mend, Pool, Source, layer_entries
from poolbench.stats.estimate import Estimate, estimate

MAX_CONFIG_NBYTES = 64 << 20
DEFAULT_BATCH = 32
# A step that takes longer leaves too few of them in two minutes: multiplications and additions a second
# of a modest core, and the seconds that a step may take.
MACS_A_SECOND = 1e10
STEP_SECONDS = 1.0
TRAINING_COST = 3.0  # forward, and twice as much backward
SMALL_SHARE = 0.02
SMALLEST_GAIN = 1.02
# What takes the place of a layer that does not load.
ADVISED = {DEPTH: "layer-depth_max_pool", GLOBAL: "layer-global_avg_pool"}
STANDING = {DEPTH: "DepthMaxPool2D", GLOBAL: "GlobalAveragePooling2D"}
TITLES = {DEPTH: "depthwise max pooling", GLOBAL: "global average pooling"}
# What can be pasted into a model, saved, and loaded in safe mode: candidate to its name for the reader.
PASTABLE = {
    DEPTH: {
        "layer-depth_max_pool": "DepthMaxPool2D",
        "keras-stock": "Reshape, MaxPooling2D, Reshape",
    },
    GLOBAL: {
        "layer-global_avg_pool": "GlobalAveragePooling2D",
        "avg_pool2d": "AveragePooling2D over the whole image",
    },
}


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A layer that Keras will not load, and what it can be told to be.

    Attributes:
        layer, kind: its name and class.
        why: why it does not load, in words.
        mend: what to replace it by; None where that cannot be told.
    """

    layer: str
    kind: str
    why: str
    mend: Mend | None


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a config tells of a layer: shapes without N; None where it tells nothing.

    Attributes:
        given: (H, W, C) that goes in.
        rank: of what comes out, N counted.
        channels: of what comes out.
    """

    given: tuple[int | None, ...] | None
    rank: int | None = None
    channels: int | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model and how it is to be raced.

    Attributes:
        model: a file that `model.save` wrote.
        image: 'HxWxC' for a model that leaves its sizes open.
        batch: batch size; None for the default, or less for a large model.
        direction, mode: of the step.
        processes: fresh processes, at least 2.
        budget: seconds of rounds in each race.
    """

    model: Path
    image: str | None = None
    batch: int | None = None
    direction: str = "training"
    mode: str = "graph"
    processes: int = 3
    budget: float = 12.0


def answer(asked: Question, say: Callable[[str], None]) -> None:
    """Inspect, race where there is something to race, and say what was found.

    Raises:
        UsageError: the file or an option cannot be used.
    """
    path = asked.model
    if asked.processes < 2 or (asked.batch is not None and asked.batch < 1):
        raise UsageError("--processes takes at least 2 and --batch at least 1")
    refused = inspect(read_config(path))
    for layer in refused:
        say(f"{path.name} does not load: {layer.why}")
    if lost := [layer for layer in refused if layer.mend is None]:
        say(
            f"What `{lost[0].layer}` does cannot be told without running its code: if it pools, write it as "
            "DepthMaxPool2D(pool_size) or GlobalAveragePooling2D(), save again, and ask again."
        )
        return
    source = Source(
        kind="file",
        name=str(path.resolve()),
        image=parse_input(asked.image),
        mends=tuple(layer.mend for layer in refused if layer.mend),
    )
    fleet = _Fleet()
    try:
        race_and_say(asked, source, refused, fleet, say)
    except WorkerFailure as failure:
        if failure.reason.startswith("UsageError: "):
            raise UsageError(failure.reason.removeprefix("UsageError: ")) from None
        raise UsageError(f"{path.name} cannot be raced: {failure.reason}") from None
    finally:
        fleet.close()


def parse_input(text: str | None) -> tuple[int, int, int] | None:
    """(224, 224, 3) from '224x224x3'.

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){2}", text):
        raise UsageError(f"--input takes sizes like 224x224x3; got {text!r}")
    height, width, channels = map(int, text.split("x"))
    return height, width, channels


def read_config(path: Path) -> dict[str, Any]:
    """A saved model's config.json.

    Raises:
        UsageError: the file is no .keras model.
    """
    what = "expected a file that model.save('model.keras') wrote"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > MAX_CONFIG_NBYTES:
                raise UsageError(f"{path.name} has a config.json of over {MAX_CONFIG_NBYTES} bytes")
            config = json.loads(archive.read("config.json"))
    except OSError as error:
        raise UsageError(f"cannot read {path.name}: {error.strerror or error}; {what}") from None
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        RecursionError,
        EOFError,
        NotImplementedError,
    ):
        raise UsageError(f"{path.name} is no Keras model; {what}") from None
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise UsageError(f"{path.name} is no Keras model; {what}")
    return config


def inspect(config: dict[str, Any]) -> list[Refused]:
    """The layers that safe mode will not load: Lambdas, and classes that are not Keras' or ours."""
    return [_refuse(entry, config) for entry in layer_entries(config) if not _loads(entry)]


def _loads(entry: dict[str, Any]) -> bool:
    if entry.get("class_name") == "Lambda":
        return False
    module = str(entry.get("module") or "")
    return (
        module.partition(".")[0] == "keras"
        or entry.get("registered_name") == "poolbench>DepthMaxPool2D"
    )


def _refuse(entry: dict[str, Any], config: dict[str, Any]) -> Refused:
    name, kind = str(entry["config"].get("name", "")), str(entry.get("class_name"))
    why = (
        f"the Lambda `{name}` holds Python code, which Keras refuses to run when it loads a file "
        "(safe mode), and without safe mode it is bound to the Python that wrote it"
        if kind == "Lambda"
        else f"the layer `{name}` is a {kind}, whose class Keras cannot find"
    )
    mend = infer(name, kind, hint(entry), shapes_around(entry, config))
    return Refused(layer=name, kind=kind, why=why, mend=mend)


def hint(entry: dict[str, Any]) -> str:
    """Words that tell what a layer does: its class, and the names that its code mentions.

    The code is searched as bytes, never unmarshalled: what comes from a file is not to be trusted.
    """
    config = entry["config"]
    function = config.get("function")
    code = function.get("config", {}) if isinstance(function, dict) else function
    text = code.get("code", "") if isinstance(code, dict) else str(code or "")
    try:
        text = base64.b64decode(text, validate=False).decode("latin-1") + str(function)[:200]
    except (binascii.Error, ValueError):
        text = str(function)
    return f"{entry.get('class_name')} {text}".lower()


def infer(name: str, kind: str, words: str, shapes: Shapes) -> Mend | None:
    """What the layer spells, from the words in it and the shapes around it; None: it cannot be told."""
    means = re.search(r"reduce_mean|average|avg|mean", words) is not None
    maximises = re.search(r"max", words) is not None
    if shapes.given is None or len(shapes.given) != 3 or means == maximises:
        return None
    depth = shapes.given[-1]
    if means and shapes.rank in (2, None) and shapes.channels in (depth, None):
        return Mend(layer=name, op=GLOBAL, candidate=_recipe(GLOBAL, kind))
    if not maximises or shapes.rank != 4 or depth is None or not shapes.channels:
        return None
    pool_size, rest = divmod(depth, shapes.channels)
    if rest or pool_size < 2:
        return None
    return Mend(layer=name, op=DEPTH, pool_size=pool_size, candidate=_recipe(DEPTH, kind))


def _recipe(op: str, kind: str) -> str:
    """The implementation that a Lambda of this op most likely is; an unknown class may be anything."""
    return REGISTRY.ops[op].textbook if kind == "Lambda" and op in REGISTRY.ops else ""


def shapes_around(entry: dict[str, Any], config: dict[str, Any]) -> Shapes:
    """What goes into a layer and what comes out, by its neighbours' saved shapes."""
    for model in layer_entries(config):
        layers = model["config"].get("layers")
        if isinstance(layers, list) and any(layer is entry for layer in layers):
            place = next(i for i, layer in enumerate(layers) if layer is entry)
            given = _own_input(entry) or _before(layers[:place])
            if any(layer.get("inbound_nodes") for layer in layers):
                return _from_edges(entry, layers, given)
            return _from_followers(layers[place + 1 :], given)
    return Shapes(given=None)


def _own_input(entry: dict[str, Any]) -> tuple[int | None, ...] | None:
    for tensor in _tensors(entry.get("inbound_nodes")):
        return tuple(tensor["shape"][1:])
    shape = (entry.get("build_config") or {}).get("input_shape")
    return tuple(shape[1:]) if shape else None


def _before(layers: Sequence[dict[str, Any]]) -> tuple[int | None, ...] | None:
    for layer in layers[-1:]:
        if shape := layer["config"].get("batch_shape"):
            return tuple(shape[1:])
    return None


def _tensors(nodes: Any) -> Iterator[dict[str, Any]]:
    """The configs of the tensors that a layer's saved calls take."""
    if isinstance(nodes, dict):
        if nodes.get("class_name") == "__keras_tensor__":
            yield nodes["config"]
            return
        nodes = list(nodes.values())
    if isinstance(nodes, list):
        for node in nodes:
            yield from _tensors(node)


def _from_edges(
    entry: dict[str, Any], layers: Sequence[dict[str, Any]], given: tuple[int | None, ...] | None
) -> Shapes:
    name = entry["config"].get("name")
    for layer in layers:
        for tensor in _tensors(layer.get("inbound_nodes")):
            if tensor.get("keras_history", [None])[0] == name:
                shape = tensor["shape"]
                return Shapes(given=given, rank=len(shape), channels=shape[-1])
    return Shapes(given=given)


# Layers that save no shape and keep the channels: rank that they take, None for any.
TRANSPARENT = {
    "Dropout": None, "Activation": None, "ReLU": None, "LeakyReLU": None, "Softmax": None,
    "SpatialDropout2D": 4, "MaxPooling2D": 4, "AveragePooling2D": 4, "ZeroPadding2D": 4,
    "UpSampling2D": 4, "GlobalAveragePooling2D": 4, "GlobalMaxPooling2D": 4,
}  # fmt: skip


def _from_followers(
    layers: Sequence[dict[str, Any]], given: tuple[int | None, ...] | None
) -> Shapes:
    """What comes out of a layer of a Sequential model, by the first after it that saved its shape."""
    rank = None
    for layer in layers:
        kind = str(layer.get("class_name"))
        shape = (layer.get("build_config") or {}).get("input_shape")
        if shape:
            return Shapes(given=given, rank=rank or len(shape), channels=shape[-1])
        if kind == "Flatten" and rank is None:
            return _from_flat(layers[layers.index(layer) + 1 :], given)
        if kind not in TRANSPARENT:
            break
        rank = rank or TRANSPARENT[kind]
    return Shapes(given=given)


def _from_flat(layers: Sequence[dict[str, Any]], given: tuple[int | None, ...] | None) -> Shapes:
    """The same behind a Flatten: its length over the pixels, which a depth pool keeps."""
    flat = _from_followers(layers, given).channels
    if given is None or not flat or not given[0] or not given[1]:
        return Shapes(given=given)
    channels, rest = divmod(flat, given[0] * given[1])
    return Shapes(given=given) if rest else Shapes(given=given, rank=4, channels=channels)


class _Fleet:
    """Fresh workers by number, all at once ended."""

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}

    def worker(self, process: int) -> Worker:
        if process not in self._workers:
            limit = psutil.virtual_memory().total * 3 // 4
            self._workers[process] = Worker(WorkerSpec(), memory_nbytes=limit)
        return self._workers[process]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def race_and_say(
    asked: Question,
    source: Source,
    refused: Sequence[Refused],
    fleet: _Fleet,
    say: Callable[[str], None],
) -> None:
    """Find the pools, race them alone, then in place where that can matter, and say what to do."""
    found: Described = fleet.worker(0).call(
        describe, source, asked.batch or 1, timeout=Plan().timeout_seconds * 3
    )
    if not found.pools:
        say(
            "This model has no depthwise max pooling and no global average pooling that is known here: "
            "there is nothing to choose."
        )
        return
    direction = asked.direction
    batch = asked.batch or default_batch(found.macs, direction)
    for line in describe_pools(found.pools, batch):
        say(line)
    alone = Entry(
        name=Path(source.name).stem,
        source=source,
        direction=direction,
        batch=batch,
        mode=asked.mode,
        in_place=False,
        candidates={op: tuple(names) for op, names in PASTABLE.items()},
        processes=asked.processes,
        budget_seconds=asked.budget / 2,
    )
    # What must be replaced is put in place at once; what may be, only where it can be felt.
    must = replace(
        alone,
        in_place=True,
        candidates={op: (name,) for op, name in ADVISED.items()},
        budget_seconds=asked.budget,
    )
    plan = Plan(timeout_seconds=180.0)
    first = race_network(must if refused else alone, fleet, plan)
    second = first if refused else race_placed(first, fleet, plan, budget=asked.budget)
    for line in conclude(first, second, refused):
        say(line)


def default_batch(macs: float, direction: str) -> int:
    """The usual batch size, or the largest power of two whose step takes about a second."""
    cost = macs * (TRAINING_COST if direction == "training" else 1.0) / MACS_A_SECOND
    batch = DEFAULT_BATCH
    while batch > 1 and batch * cost > STEP_SECONDS:
        batch //= 2
    return batch


def describe_pools(pools: Sequence[Pool], batch: int) -> list[str]:
    """A line for each pool."""
    return [
        f"  `{pool.layer}` ({pool.kind}): {TITLES[pool.op]}"
        + (f" of {pool.pool_size}" if pool.pool_size else "")
        + f" at {format_value((batch, *pool.shape[1:]))}"
        for pool in pools
    ]


def race_placed(first: Stepped, fleet: _Fleet, plan: Plan, *, budget: float) -> Stepped | None:
    """Race the step with the quickest layers in place; None where pooling is too little of it.

    No choice of a implementation can win more than the share that pooling has: below 2% of the step
    it is not looked for.
    """
    share = first.share(ALONE + AS_BUILT, AS_BUILT)
    if share is not None and share[2] < SMALL_SHARE:
        return None
    ops = dict.fromkeys(pool.op for pool in first.described.pools)
    kinds = {pool.kind for pool in first.described.pools}
    placed = {
        op: tuple(n for n in fastest(first, op) if PASTABLE[op][n] not in kinds) for op in ops
    }
    if not any(placed.values()):
        return None  # what is quickest is there already
    entry = replace(first.entry, in_place=True, candidates=placed, budget_seconds=budget)
    return race_network(entry, fleet, plan)


def fastest(stepped: Stepped, op: str) -> list[str]:
    """The pastable implementation of the op that took least alone, in a list; [] if none ran."""
    from poolbench.engine.recorder import middle

    times = {}
    for name in PASTABLE[op]:
        m = stepped.measurements.get(f"{ALONE}{op}={name}")
        if m is not None and m.status == "ok" and len(m.samples):
            times[name] = middle(m.samples.seconds)
    return [min(times, key=lambda name: times[name])] if times else []


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a replacement does to the step: speed over the step as it is; None where that does not run."""

    op: str
    candidate: str
    speed: tuple[float, float, float] | None


def promises(stepped: Stepped) -> list[Promise]:
    """Each implementation in place against the step as it is."""
    built = stepped.measurements[AS_BUILT]
    found = []
    for name, m in stepped.measurements.items():
        if name == AS_BUILT or name.startswith(ALONE) or m.status != "ok" or not len(m.samples):
            continue
        op, _, candidate = name.partition("=")
        ratio = estimate(built.samples, m.samples) if built.status == "ok" else None
        found.append(Promise(op=op, candidate=candidate, speed=_interval(ratio)))
    return found


def _interval(found: Estimate | None) -> tuple[float, float, float] | None:
    if found is None or found.low is None:
        return None
    return found.ratio_low, found.ratio, found.ratio_high


def conclude(first: Stepped, second: Stepped | None, refused: Sequence[Refused]) -> list[str]:
    """The sentence on the share, the sentence on what to do, and the snippet."""
    step = {"training": "training step", "forward": "inference step"}[first.entry.direction]
    built = first.measurements[AS_BUILT]
    share = first.share(ALONE + AS_BUILT, AS_BUILT)
    head = (
        f"Pooling is {percent(share)} of your {step} at batch {first.entry.batch}"
        if share
        else f"Your {step} does not run as it is here ({built.status}: {built.reason})"
        if built.status != "ok"
        else f"Your {step} was too unsteady here to say which share of it is pooling"
    )
    offered = promises(second) if second is not None else []
    if refused:
        return [f"{head}."] + [
            line for layer in refused for line in replace_refused(layer, offered, built.status)
        ]
    best = max(
        (p for p in offered if p.speed), key=lambda p: p.speed[1] if p.speed else 0, default=None
    )
    if best is None or best.speed is None or best.speed[0] < SMALLEST_GAIN:
        return [f"{head}: keep what you have."]
    layers = [pool for pool in first.described.pools if pool.op == best.op]
    return [
        f"{head}: replace {names(layers)} by {PASTABLE[best.op][best.candidate]}: {times(best.speed)} the step.",
        snippet(best.candidate, layers[0]),
    ]


def replace_refused(layer: Refused, offered: Sequence[Promise], status: str) -> list[str]:
    """What to do about a layer that does not load, and what it does to the step."""
    mend = layer.mend
    assert mend is not None
    promise = next(
        (p for p in offered if p.op == mend.op and p.candidate == ADVISED[mend.op]), None
    )
    if promise is not None and promise.speed is not None and mend.candidate:
        gain = f"{times(promise.speed)} the step, and it will load again"
    elif promise is not None and status != "ok":
        gain = "it trains here, and it will load again"
    else:
        gain = "it will load again"
    arguments = f"pool_size={mend.pool_size}, " if mend.pool_size else ""
    return [
        f"Replace the {layer.kind} `{layer.layer}` by {STANDING[mend.op]}: {gain}.",
        f"{IMPORTS[mend.op]}\n{STANDING[mend.op]}({arguments}name={layer.layer!r})",
    ]


IMPORTS = {
    DEPTH: "from poolbench.layers import DepthMaxPool2D  # or copy that one file",
    GLOBAL: "from keras.layers import GlobalAveragePooling2D",
}


def snippet(candidate: str, pool: Pool) -> str:
    """What to write in the layer's place."""
    _, h, w, c = pool.shape
    k = pool.pool_size or 1
    texts = {
        "layer-depth_max_pool": f"{IMPORTS[DEPTH]}\nDepthMaxPool2D({k}, name={pool.layer!r})",
        "keras-stock": (
            f"keras.layers.Reshape(({h * w}, {c}, 1))\nkeras.layers.MaxPooling2D((1, {k}))\n"
            f"keras.layers.Reshape(({h}, {w}, {c // k}))"
        ),
        "layer-global_avg_pool": f"{IMPORTS[GLOBAL]}\nGlobalAveragePooling2D(name={pool.layer!r})",
        "avg_pool2d": f"keras.layers.AveragePooling2D(({h}, {w}))"
        + ("" if pool.keepdims else "\nkeras.layers.Flatten()"),
    }
    return texts[candidate]


def names(pools: Sequence[Pool]) -> str:
    """'`depth_pool`', or '`a` and 15 more'."""
    found = list(dict.fromkeys(pool.layer for pool in pools))
    return f"`{found[0]}`" + (f" and {len(found) - 1} more" if len(found) > 1 else "")


def percent(share: tuple[float, float, float]) -> str:
    """'1.3% [1.1, 1.5]' from (low, middle, high) as fractions."""
    low, middle, high = (f"{100 * value:.2g}" for value in share)
    return f"{middle}% [{low}, {high}]"


def times(speed: tuple[float, float, float]) -> str:
    """'1.40x [1.31, 1.49]'."""
    return f"{speed[1]:.2f}x [{speed[0]:.2f}, {speed[2]:.2f}]"
