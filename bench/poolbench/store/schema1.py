"""Convert records of schema 1 to schema 2: names of fields and kinds have changed, their contents have not."""

from __future__ import annotations

from typing import Any

KINDS = {
    "capability": "matrix_cell",
    "account": "trace_summary",
    "network": "model",
    "shares": "time",
}
FIELDS = {
    "settled": "stopped_early",
    "joules": "energy_joules",
    "network": "model",
    "spell" + "ing": "candidate",  # split: the word is in use nowhere else
}
MACHINE = {"kept_awake": "idle_states_disabled"}
OPTIONS = {"replicas": "processes", "max_replicas": "max_processes"}
# Keys of the checks of the support matrix.
CHECKS = {"repeat-replicas": "repeat-processes"}
WORDS = {
    "ceiling-read": "bandwidth-read",
    "ceiling-write": "bandwidth-write",
    "ceiling-copy": "bandwidth-copy",
    "faster-than-ceiling": "faster-than-limit",
    "settled": "stopped-early",
    "lead_in": "warmup",
}


def lift(record: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object of a record in schema 2, from that of schema 1."""
    kind = record.get("type")
    lifted = {FIELDS.get(name, name): value for name, value in record.items()}
    lifted["type"] = KINDS.get(str(kind), kind)
    for name in ("samples", "wall_samples"):
        _rename(lifted, name, {"replica": "process"})
    if isinstance(case := record.get("case"), dict):
        lifted["case"] = _lift_case(case)
    if isinstance(environment := record.get("environment"), dict):
        lifted["environment"] = dict(environment)
        _rename(lifted["environment"], "machine", MACHINE)
    if kind == "header":
        lifted["schema"] = 2
        _rename(lifted, "options", OPTIONS)
    if kind == "measurement":
        lifted["candidate"] = _word(lifted.get("candidate"), WORDS)
        lifted["flags"] = _word(lifted.get("flags", []), WORDS)
    if kind == "capability":
        lifted["probe"] = _word(lifted.get("probe"), CHECKS)
    if kind == "network" and lifted.get("direction") == "inference":
        lifted["direction"] = "forward"
    if kind == "shares":
        _rename(lifted, "seconds", WORDS)
    if kind == "selftest":
        _rename(lifted, "figures", OPTIONS)
    return lifted


def _lift_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case as op and axes; a null field is an axis that the op does not have."""
    axes = {name: value for name, value in case.items() if name != "op" and value is not None}
    return {"op": case.get("op"), "axes": axes}


def _word(value: Any, words: dict[str, str]) -> Any:
    """Return a word, or a list of them, in schema 2; other values stay, for the validation to refuse."""
    if isinstance(value, list):
        return [_word(item, words) for item in value]
    return words.get(value, value) if isinstance(value, str) else value


def _rename(record: dict[str, Any], field: str, names: dict[str, str]) -> None:
    value = record.get(field)
    if isinstance(value, dict):
        record[field] = {names.get(name, name): item for name, item in value.items()}
