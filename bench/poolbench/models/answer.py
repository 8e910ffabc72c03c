"""Write the answer of `which`: lines on layers, pools, shares and replacements, from the measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from poolbench.core.axes import format_value
from poolbench.engine.recorder import middle
from poolbench.models.config import brief, clean
from poolbench.models.pools import Pool
from poolbench.models.results import Described, Interval, Stepped
from poolbench.models.steps import ALONE, AS_BUILT

SMALL_SHARE = 0.02
SMALLEST_GAIN = 1.02
# A share counts as unknown if the interval's upper end is more than this many times its lower end.
WIDE = 1.5
STEPS = {"training": "training step", "forward": "inference step"}


def needs_code(pool: Pool, found: Described) -> bool:
    """Tell whether a pool is computed by code that safe mode does not load."""
    return bool(set(pool.names).intersection(found.code))


def stands(found: Described, op: str, candidate: str) -> bool:
    """Tell whether every pool of the op is this candidate already."""
    kinds = {pool.kind for pool in found.pools if pool.op == op}
    text = found.pastable[op][candidate].removeprefix("keras.layers.")
    return kinds == {text.partition("(")[0]}


def describe_layers(found: Described) -> Iterator[str]:
    """Yield a line for each layer whose code did not run, and for each whose code is not a pool."""
    for layer in found.unknown:
        if layer.kind == "Lambda":
            yield (
                f"`{clean(layer.name)}` is a Lambda: Python code in the file, which is run only with --trust."
            )
        else:
            yield (
                f"`{clean(layer.name)}` is a `{clean(layer.kind)}`, a class that Keras does not have: give the file "
                "that defines it with --custom FILE."
            )
    for name, note in found.notes.items():
        yield f"`{clean(name)}` is {clean(note, 160)}."


def describe_pools(found: Described, batch: int) -> Iterator[str]:
    """Yield a line for each pool: its function, and the number of compared inputs."""
    lines: Counter[str] = Counter()
    for pool in found.pools:
        size = (batch, *pool.given[1:])
        line = f"  `{clean(pool.layer)}` ({pool.kind}): {pool.title} at {format_value(size)}"
        if pool.form is not None:
            line += f", equal on {pool.inputs} inputs"
            line += f" and {pool.gradients} gradients" if pool.gradients else ""
        lines[line + (f" ({clean(pool.note, 160)})" if pool.note else "")] += 1
    for line, count in lines.items():
        yield line + (f", called {count} times" if count > 1 else "")


def is_wide(share: Interval | None) -> bool:
    """Tell whether a share that may matter has too wide an interval."""
    return share is None or (share[2] > SMALL_SHARE and share[2] > WIDE * share[0])


def fastest(stepped: Stepped, op: str) -> str:
    """Return the fastest candidate alone that can be written into the model; '' if none ran."""
    times = {}
    for name in stepped.described.pastable.get(op, {}):
        m = stepped.measurements.get(f"{ALONE}{op}={name}")
        if m is not None and m.status == "ok" and len(m.samples):
            times[name] = middle(m.samples.seconds)
    return min(times, key=lambda name: times[name]) if times else ""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """The effect of a replacement on the step: speed over the original step; None if that does not run."""

    op: str
    candidate: str
    speed: Interval | None


def promises(stepped: Stepped) -> list[Promise]:
    """Return the speed of each replacement over the original step."""
    found = []
    for name, m in stepped.measurements.items():
        if name != AS_BUILT and not name.startswith(ALONE) and m.status == "ok" and len(m.samples):
            op, _, candidate = name.partition("=")
            found.append(Promise(op=op, candidate=candidate, speed=stepped.ratio(AS_BUILT, name)))
    return found


def conclude(first: Stepped, second: Stepped | None) -> tuple[list[str], dict[str, str]]:
    """Return the lines of the answer, and the replacements: op to candidate."""
    found, built = first.described, first.measurements[AS_BUILT]
    share = first.share(ALONE + AS_BUILT, AS_BUILT)
    head = describe_share(first, share)
    offered = promises(second) if second is not None else []
    lines: list[str] = []
    chosen: dict[str, str] = {}
    for promise in offered:
        pools = [pool for pool in found.pools if pool.op == promise.op]
        code = any(needs_code(pool, found) for pool in pools)
        faster = promise.speed is not None and promise.speed[0] >= SMALLEST_GAIN
        if not (code or faster or built.status != "ok"):
            continue
        gains = [f"{times(promise.speed)} the step"] if promise.speed else []
        gains += [f"the {STEPS[first.entry.direction]} runs here"] if built.status != "ok" else []
        gains += ["safe mode loads it"] if code else []
        text = found.pastable[promise.op][promise.candidate]
        kind = text.removeprefix("keras.layers.").partition("(")[0]
        lines += [f"Replace {layer_names(pools)} by {kind}: {', and '.join(gains)}.", snippet(text)]
        chosen[promise.op] = promise.candidate
    if lines:
        return [f"{head}.", *lines], chosen
    return [f"{head}: {no_gain(first, share)}, so nothing is to be won."], chosen


def describe_share(first: Stepped, share: Interval | None) -> str:
    """Describe pooling's share of the step, or why it is unknown."""
    step = STEPS[first.entry.direction]
    built = first.measurements[AS_BUILT]
    if built.status != "ok":
        return f"Your {step} does not run as it is here ({brief(built.reason)})"
    if share is None:
        return f"Your {step} was too unsteady here to say which share of it is pooling"
    if is_wide(share):
        low, high = (f"{100 * value:.2g}" for value in (share[0], share[2]))
        return (
            f"Pooling is between {low} and {high}% of your {step} at batch {first.entry.batch}; it is not known "
            "better on this machine, though it was measured again for longer"
        )
    return f"Pooling is {percent(share)} of your {step} at batch {first.entry.batch}"


def no_gain(first: Stepped, share: Interval | None) -> str:
    """Return why no replacement is advised."""
    if share is not None and share[2] < SMALL_SHARE:
        return f"no implementation of it can win more than {100 * share[2]:.2g}%"
    if not any(first.described.pastable.values()):
        return "no other implementation of it ships"
    return "no other implementation is faster here"


def conclude_alone(stepped: Stepped) -> list[str]:
    """Return the answer for a step that cannot run: the known pools alone."""
    lines = ["Which share of the step pooling is, is unknown: not every layer runs."]
    for op in dict.fromkeys(pool.op for pool in stepped.described.pools if pool.op):
        pools = [pool for pool in stepped.described.pools if pool.op == op]
        own = [name for name in stepped.described.pastable[op] if stands(stepped.described, op, name)]  # fmt: skip
        best = fastest(stepped, op)
        if not best:
            lines.append(f"{layer_names(pools)}: no implementation of it ran here.")
            continue
        text = stepped.described.pastable[op][best]
        ratio = stepped.ratio(f"{ALONE}{op}={own[0]}", f"{ALONE}{op}={best}") if own else None
        if own == [best] or (ratio is not None and ratio[0] < SMALLEST_GAIN):
            lines.append(f"{layer_names(pools)}: no other implementation is faster here, alone.")
        else:
            gain = f", {times(ratio)} as fast alone" if ratio else ""
            lines += [f"{layer_names(pools)}: fastest alone is this{gain}.", snippet(text)]
    return lines


def snippet(text: str) -> str:
    """Return the code of a replacement, with its import."""
    if text.startswith("keras."):
        return f"import keras\n{text}"
    own = "from poolbench.layers import DepthMaxPool2D  # or copy that one file"
    return f"{own}\n{text}" if "DepthMaxPool2D" in text else text


def layer_names(pools: Sequence[Pool]) -> str:
    """Return '`depth_pool`', or '`a` and 15 more'."""
    found = list(dict.fromkeys(clean(pool.layer) for pool in pools))
    return f"`{found[0]}`" + (f" and {len(found) - 1} more" if len(found) > 1 else "")


def percent(share: Interval) -> str:
    """Return '1.3% [1.1, 1.5]' from (low, middle, high) as fractions."""
    low, middle, high = (f"{100 * value:.2g}" for value in share)
    return f"{middle}% [{low}, {high}]"


def times(speed: Interval) -> str:
    """Return '1.40x [1.31, 1.49]'."""
    return f"{speed[1]:.2f}x [{speed[0]:.2f}, {speed[2]:.2f}]"
