"""Write the answer of `which`: lines on layers, pools, shares and replacements, from the measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from poolbench.core.axes import format_value
from poolbench.core.candidate import OWN_LAYERS
from poolbench.core.text import with_interval
from poolbench.models.config import brief, clean
from poolbench.models.pools import Pool
from poolbench.models.results import Described, Interval, Stepped
from poolbench.models.steps import ISOLATED, ORIGINAL

SMALL_SHARE = 0.02
SMALLEST_GAIN = 1.02
# A share counts as unknown if the interval's upper end is more than this many times its lower end.
WIDE = 1.8
# One process says that a share is small if this many times the share is; it is seldom off by a third.
SURE = 4
# In isolation, one process shows that a candidate is faster if it is so by this factor.
CLEARLY = 1.1
STEPS = {"training": "training step", "forward": "inference step"}


def needs_code(pool: Pool, found: Described) -> bool:
    """Tell whether a pool is computed by code that safe mode does not load."""
    return bool(set(pool.names).intersection(found.code))


def kind_of(text: str) -> str:
    """Return the class that the code of a replacement makes: 'MaxPooling2D', 'keras.Sequential'."""
    return text.removeprefix("keras.layers.").partition("(")[0]


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


def is_negligible(stepped: Stepped) -> bool:
    """Tell whether one process is enough to know that pooling is a small share of the step."""
    share = stepped.rough_share()
    return share is not None and share * SURE < SMALL_SHARE


def isolated_seconds(stepped: Stepped, op: str) -> dict[str, float]:
    """Return the time of the op's isolated pooling by candidate, the fastest first."""
    names = stepped.described.pastable.get(op, {})
    found = {name: stepped.seconds(f"{ISOLATED}{op}={name}") for name in names}
    times = {name: seconds for name, seconds in found.items() if seconds is not None}
    return dict(sorted(times.items(), key=lambda item: item[1]))


def own_candidate(found: Described, op: str) -> str:
    """Return the candidate that every pool of the op is already; '' if there is none."""
    kinds = {pool.kind for pool in found.pools if pool.op == op}
    names = (name for name, text in found.pastable[op].items() if {kind_of(text)} == kinds)
    return next(names, "")


def worth_racing(look: Stepped, op: str) -> str:
    """Return the replacement of the op's pools that may win something; '' if none can."""
    found = look.described
    times, own = isolated_seconds(look, op), own_candidate(found, op)
    best = next(iter(times), "")
    if best in ("", own):
        return ""
    if found.unknown:  # the step does not run: a layer is compared in isolation
        return best if own in times and times[own] > CLEARLY * times[best] else ""
    share = look.rough_share()
    if share is None or any(needs_code(pool, found) for pool in found.pools if pool.op == op):
        return best
    gain = share * (1 - times[best] / times[own] if own in times else 1)
    # One process knows a gain within a factor of two.
    return best if 2 * gain > SMALL_SHARE else ""


def conclude(raced: Stepped) -> tuple[list[str], dict[str, str]]:
    """Return the lines of the answer, and the replacements: op to candidate."""
    found, built = raced.described, raced.measurements[ORIGINAL]
    lines: list[str] = []
    chosen: dict[str, str] = {}
    for name in raced.measurements:
        op, equals, candidate = name.partition("=")
        if not equals or name.startswith(ISOLATED) or not raced.seconds(name):
            continue
        pools = [pool for pool in found.pools if pool.op == op]
        code = [pool for pool in pools if needs_code(pool, found)]
        speed = raced.ratio(ORIGINAL, name)
        faster = speed is not None and speed[0] >= SMALLEST_GAIN
        if not (code or faster or built.status != "ok"):
            continue
        gains = [f"{shown(speed)} the step"] if speed else []
        gains += [f"the {STEPS[raced.entry.direction]} runs here"] if built.status != "ok" else []
        gains += ["safe mode loads it"] if code else []
        text = found.pastable[op][candidate]
        named = layer_names(pools if faster or not code else code)
        lines += [f"Replace {named} by {kind_of(text)}: {', and '.join(gains)}.", snippet(text)]
        chosen[op] = candidate
    head = describe_share(raced)
    if lines:
        return [f"{head}.", *lines], chosen
    return [f"{head}: {no_gain(raced)}, so nothing is to be won."], chosen


def describe_share(raced: Stepped) -> str:
    """Describe pooling's share of the step, or why it is unknown."""
    step, share = STEPS[raced.entry.direction], raced.share()
    built = raced.measurements[ORIGINAL]
    if built.status != "ok":
        return f"Your {step} does not run as it is here ({brief(built.reason)})"
    step += f" at batch {raced.entry.batch}"
    if share is None and is_negligible(raced):
        return f"Pooling is under {100 * SMALL_SHARE:.0f}% of your {step}"
    if share is None:
        return f"Your {step} was too unsteady here to say which share of it is pooling"
    if is_wide(share):
        low, high = (f"{100 * value:.2g}" for value in (share[0], min(share[2], 1.0)))
        return (
            f"Pooling is between {low} and {high}% of your {step}; it is not known better on this machine "
            "(more --processes may narrow it)"
        )
    return f"Pooling is {shown(share, '%')} of your {step}"


def no_gain(raced: Stepped) -> str:
    """Return why no replacement is advised."""
    share = raced.share()
    if share is None and is_negligible(raced):
        return "no implementation of it can win more"
    if share is not None and share[2] < SMALL_SHARE:
        return f"no implementation of it can win more than {100 * share[2]:.2g}%"
    if not any(raced.described.pastable.values()):
        return "no other implementation of it ships"
    return "no other implementation is faster here"


def conclude_isolated(stepped: Stepped) -> list[str]:
    """Return the answer for a step that cannot run: the known pools in isolation."""
    lines = ["Which share of the step pooling is, is unknown: not every layer runs."]
    for op in dict.fromkeys(pool.op for pool in stepped.described.pools if pool.op):
        pools = [pool for pool in stepped.described.pools if pool.op == op]
        own = own_candidate(stepped.described, op)
        best = next(iter(isolated_seconds(stepped, op)), "")
        if not best:
            lines.append(f"{layer_names(pools)}: no implementation of it ran here.")
            continue
        text = stepped.described.pastable[op][best]
        ratio = stepped.ratio(f"{ISOLATED}{op}={own}", f"{ISOLATED}{op}={best}")
        if own and (ratio is None or ratio[0] < SMALLEST_GAIN):
            lines.append(
                f"{layer_names(pools)}: in isolation no other implementation is faster here."
            )
        else:
            gain = f", {shown(ratio)} as fast" if ratio else ""
            lines += [f"{layer_names(pools)}: in isolation this is fastest{gain}.", snippet(text)]
    return lines


def snippet(text: str) -> str:
    """Return the code of a replacement, with its imports."""
    lines = ["import keras"] if "keras." in text else []
    for kind, module in OWN_LAYERS.items():
        if f"{kind}(" in text:
            lines.append(f"from {module} import {kind}  # or copy that one file")
    return "\n".join([*lines, text])


def layer_names(pools: Sequence[Pool]) -> str:
    """Return '`depth_pool`', or '`a` and 15 more'."""
    found = list(dict.fromkeys(clean(pool.layer) for pool in pools))
    return f"`{found[0]}`" + (f" and {len(found) - 1} more" if len(found) > 1 else "")


def shown(value: Interval, unit: str = "x") -> str:
    """Return '1.40x [1.31, 1.49]' from (low, middle, high)."""
    return with_interval(value[1], value[0], value[2], unit)
