"""Build the tables on the machine and the trust in a run: self-test, background load, bandwidth, environment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from poolbench.core.case import case_label
from poolbench.core.records import Environment, Selftest, TimeBreakdown, samples_by
from poolbench.core.text import (
    format_bandwidth,
    format_nbytes,
    format_seconds,
    format_share,
    one_line,
    significant,
)
from poolbench.machine.nvml import is_gpu
from poolbench.report.frame import RunFrame
from poolbench.report.medians import median, process_medians


def selftest_table(selftests: Sequence[Selftest]) -> pd.DataFrame:
    """Return one row per injected slowdown: its detections, and the false alarms."""
    rows = []
    for record in selftests:
        found = record.faster + record.slower if record.injected == 0 else record.slower
        what = "false alarms" if record.injected == 0 else "power"
        rows.append(
            {
                "injected": "none (A/A)" if record.injected == 0 else format_share(record.injected),
                "margin": format_share(record.margin),
                "comparisons": record.comparisons,
                "FASTER": record.faster,
                "SLOWER": record.slower,
                "SAME": record.same,
                "UNDECIDED": record.undecided,
                "reads as": f"{what} {format_share(found / record.comparisons) if record.comparisons else '?'}",
                "noise floor": format_share(record.noise_floor),
            }
        )
    return pd.DataFrame(rows)


def environment_table(environment: Environment) -> pd.DataFrame:
    """Return one row per field with its value."""
    groups: dict[str, Mapping[str, object]] = {
        "machine": environment.machine,
        "device": environment.devices,
        "version": environment.versions,
        "setting": environment.settings,
        "source": environment.source,
    }
    return pd.DataFrame(
        [
            {"what": group, "field": name, "value": _environment_value(name, value)}
            for group, fields in groups.items()
            for name, value in fields.items()
        ],
        columns=["what", "field", "value"],
    )


# None means no limit: the system always shows an existing one.
LIMITS = ("cpu_quota", "memory_limit_nbytes")


def _environment_value(name: str, value: object) -> str:
    if value is None:
        return "none" if name in LIMITS else "cannot be seen here"
    if name.endswith("nbytes") and isinstance(value, (int, float)):
        return format_nbytes(float(value))
    if name == "cpu_quota" and isinstance(value, (int, float)):
        return f"{value:.3g} processors; TensorFlow still starts a thread per usable processor"
    return one_line(str(value), 600)


def contention_table(loaded: RunFrame) -> pd.DataFrame:
    """Return the background load by op and mode: the worst race, and the blocks marked and repeated."""
    races = loaded.table.drop_duplicates("race")
    rows = []
    for (op, mode), group in races.groupby(["op", "mode"], sort=False):
        steal, others, throttled = (group[name].max() for name in ("steal", "others", "throttled"))
        rows.append(
            {
                "op": op,
                "mode": mode,
                "races": len(group),
                "blocks marked": int(group["blocks_marked"].sum()),
                "blocks redone": int(group["blocks_redone"].sum()),
                "worst steal": format_share(steal) or "cannot be seen here",
                "worst others' share": format_share(others) or "cannot be seen here",
                "worst throttled by a CPU quota": format_share(throttled) or "no quota",
            }
        )
    return pd.DataFrame(rows)


def device_table(loaded: RunFrame) -> pd.DataFrame:
    """Return the GPU's figures per candidate, and its state during the race; empty without a GPU."""
    rows = []
    for m in loaded.run.measurements:
        seen = m.contention
        if m.kind != "candidate" or m.status != "ok" or not is_gpu(m.case.device) or seen is None:
            continue
        low, high = seen.device_clock_mhz or (math.nan, math.nan)
        rows.append(
            {
                "op": m.case.op,
                "case": case_label(m.case),
                "candidate": m.candidate,
                "on the device": format_seconds(
                    math.nan if m.device_seconds is None else m.device_seconds
                ),
                "called": format_seconds(median(process_medians(samples_by(m, "wall")))),
                "energy a call": ""
                if m.energy_joules is None
                else f"{significant(1e3 * m.energy_joules)} mJ",
                "peak memory": "" if m.peak_nbytes is None else format_nbytes(m.peak_nbytes),
                "clock": " to ".join(dict.fromkeys((f"{low:.0f}", f"{high:.0f}"))) + " MHz"
                if math.isfinite(low)
                else "",
                "hottest": "" if seen.device_celsius is None else f"{seen.device_celsius:.0f} °C",
                "held down by": ", ".join(seen.device_slowdowns),
            }
        )
    return pd.DataFrame(rows)


def bandwidth_limit_table(probes: pd.DataFrame) -> pd.DataFrame:
    """Return memory bandwidths by device, dtype, threads and cache, for the largest array probed."""
    if probes.empty:
        return pd.DataFrame()
    rows = []
    for (device, dtype, threads, cache, probe), group in probes.groupby(
        ["device", "dtype", "threads", "cache", "probe"], sort=True
    ):
        top = group.sort_values("nbytes").iloc[-1]
        rows.append(
            {
                "device": device,
                "dtype": dtype,
                "threads": threads or "all",
                "caches": cache,
                "probe": probe,
                "bytes a call": format_nbytes(top["nbytes"]),
                "bandwidth": format_bandwidth(top["bandwidth"]),
                "races": len(group),
            }
        )
    return pd.DataFrame(rows)


def shares_table(loaded: RunFrame) -> pd.DataFrame:
    """Return the wall time by kind."""
    rows = []
    for record in loaded.run.of(TimeBreakdown):
        for kind, seconds in sorted(record.seconds.items(), key=lambda item: -item[1]):
            share = seconds / record.wall_seconds if record.wall_seconds else math.nan
            rows.append(
                {"kind": kind, "time": format_seconds(seconds), "share": format_share(share)}
            )
        rows.append({"kind": "wall", "time": format_seconds(record.wall_seconds), "share": ""})
    return pd.DataFrame(rows)
