"""Read model files and options of `which` in plain Python, without running code of a file.

A model file may come from anybody. Sizes, depth and names are checked before Keras sees the file, and no text of it
reaches a message without being shortened and stripped of control characters.
"""

from __future__ import annotations

import itertools
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from poolbench.core.axes import Shape
from poolbench.core.candidate import OWN_LAYERS
from poolbench.core.errors import UsageError
from poolbench.core.text import ESCAPE_CODES

MAX_CONFIG_NBYTES = 64 << 20
MAX_CONFIG_DEPTH = 200
# Weights hardly compress: a member that unpacks to more than this many times its size is not a model.
MAX_COMPRESSION = 100
MAX_MEMBERS = 10_000
EXPECTED = "expected a file that model.save('model.keras') wrote"
OpenShape = tuple[int | None, ...]
# Sizes for an open axis in the options that a message suggests.
SUGGESTED = {1: (128,), 2: (128, 64), 3: (224, 224, 3), 4: (16, 112, 112, 3)}
# What reading a broken archive raises.
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    KeyError,
    ValueError,
    EOFError,
    NotImplementedError,
)


class Unknown(msgspec.Struct, frozen=True, kw_only=True):
    """A layer whose code Keras does not have.

    Attributes:
        name, kind: its name and class.
        root: whether it is the model itself.
    """

    name: str
    kind: str
    root: bool = False


class InputOption(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes that `--input` gives: of the named input, or of those that they fit."""

    name: str
    shape: Shape


def clean(text: object, limit: int = 60) -> str:
    """Return text from a file in printable characters, at most `limit` of them."""
    printable = "".join(c if c.isprintable() else "?" for c in ESCAPE_CODES.sub("", str(text)))
    return printable if len(printable) <= limit else printable[: limit - 3] + "..."


def brief(error: BaseException | str) -> str:
    """Return the first sentence of an error of Keras, without the dump of a config."""
    text = ESCAPE_CODES.sub("", str(error)).strip() or type(error).__name__
    text = re.split(r"\n|[,.:]?\s*(?:Full )?(?:object )?config\s*[=:]|[{\[]", text, maxsplit=1)[0]
    sentence = re.split(r"(?<=[a-z`'\")])\.\s", text, maxsplit=1)[0]
    return clean(sentence.rstrip(" .:,("), 160)


def read_file(path: Path) -> dict[str, Any] | None:
    """Return the config of a .keras file, or None for an HDF5 file, whose config a worker reads.

    Raises:
        UsageError: the file is not a Keras model, or is built to do harm.
    """
    name = clean(path.name)
    if path.is_dir():
        if (path / "saved_model.pb").exists():
            raise UsageError(
                f"{name} is a SavedModel folder: a graph without Keras layers; "
                "load the Keras model that it was exported from and save it with model.save('model.keras')"
            )
        raise UsageError(f"{name} is a folder; {EXPECTED}")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror or error}; {EXPECTED}") from None
    if head.startswith(b"\x89HDF"):
        return None
    if head[4:8] == b"TFL3":
        raise UsageError(
            f"{name} is a TensorFlow Lite model, which is not raced here; give the Keras model it was made from"
        )
    return parse_config(_read_archive(path, name), name)


def _read_archive(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise UsageError(f"{name} holds {len(members)} files; a Keras model holds a few")
            for member in members:
                _check_member(member, name)
            with archive.open("config.json") as file:
                data = file.read(MAX_CONFIG_NBYTES + 1)
    except BROKEN as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{name} is no Keras model; {EXPECTED}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: encrypted
        raise UsageError(f"cannot read {name}: {brief(error)}; {EXPECTED}") from None
    if len(data) > MAX_CONFIG_NBYTES:
        raise UsageError(f"{name} has a config.json of over {MAX_CONFIG_NBYTES} bytes")
    return data


def _check_member(member: zipfile.ZipInfo, name: str) -> None:
    parts = PurePosixPath(member.filename.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in member.filename:
        raise UsageError(f"{name} holds a file whose path leads out of the archive; it is not read")
    if member.file_size > max(1 << 20, MAX_COMPRESSION * member.compress_size):
        raise UsageError(
            f"{name} holds a file that unpacks to {member.file_size} bytes, more than "
            f"{MAX_COMPRESSION} times its size; it is not read"
        )


def parse_config(data: bytes | str, name: str) -> dict[str, Any]:
    """Return a model's config from JSON text.

    Raises:
        UsageError: it is not a model's, or is nested too deeply.
    """
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        raise UsageError(f"{name} is no Keras model; {EXPECTED}") from None
    if not isinstance(config, dict) or not isinstance(config.get("config"), (dict, list)):
        raise UsageError(f"{name} is no Keras model; {EXPECTED}")
    if depth_of(config) > MAX_CONFIG_DEPTH:
        raise UsageError(
            f"{name} nests its layers more than {MAX_CONFIG_DEPTH} levels deep; it is not read"
        )
    return config


def depth_of(value: Any) -> int:
    """Return how deeply lists and dicts are nested in a value of JSON."""
    depth, level = 0, [value]
    while level:
        depth += 1
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = [item for item in below if isinstance(item, (dict, list))]
    return depth


def keras_version(path: Path) -> str:
    """Return the version that a .keras file's metadata gives, '' if none."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("metadata.json") as file:
            return clean(json.loads(file.read(1 << 16)).get("keras_version", ""), 20)
    except (OSError, RuntimeError, AttributeError, *BROKEN):
        return ""


def layer_entries(config: Any) -> Iterator[dict[str, Any]]:
    """Yield every serialised layer of a model's config, the model first, nested and wrapped ones too."""
    if not isinstance(config, dict) or "class_name" not in config:
        return
    inner = config.get("config")
    if isinstance(inner, list):  # a Sequential model of Keras before 2.2
        inner = {"layers": inner}
    if not isinstance(inner, dict):
        return
    yield config
    layers = inner.get("layers")
    for entry in layers if isinstance(layers, list) else ():
        yield from layer_entries(entry)
    for key in ("layer", "forward_layer", "backward_layer", "cell"):
        yield from layer_entries(inner.get(key))


def name_of(entry: dict[str, Any]) -> str:
    """Return a serialised layer's name."""
    inner = entry.get("config")
    return str(inner.get("name", "") if isinstance(inner, dict) else "") or str(entry.get("name"))


def is_known(entry: dict[str, Any], *, legacy: bool, classes: frozenset[str]) -> bool:
    """Tell whether a serialised layer is Keras's own, this package's, or among the user's classes."""
    kind, registered = str(entry.get("class_name")), entry.get("registered_name")
    if kind == "Lambda":
        return False
    if legacy and "module" not in entry:
        return kind in classes
    keras_own = str(entry.get("module") or "").partition(".")[0] == "keras"
    own = str(registered).removeprefix("poolbench>") in OWN_LAYERS
    return keras_own or own or str(registered or kind) in classes or kind in classes


def find_unknown(
    config: dict[str, Any], *, legacy: bool = False, classes: frozenset[str] = frozenset()
) -> list[Unknown]:
    """Return the layers that need code that is not Keras's, in order, each once.

    Args:
        config: of the model.
        legacy: whether a class without a module is looked up in `classes`, as in HDF5 files.
        classes: names of the classes that are known besides.
    """
    found = [
        Unknown(name=name_of(entry), kind=str(entry.get("class_name")), root=entry is config)
        for entry in layer_entries(config)
        if not is_known(entry, legacy=legacy, classes=classes)
    ]
    return list(dict.fromkeys(found))


def consumed_shapes(config: dict[str, Any]) -> dict[str, OpenShape]:
    """Return what comes out of layers, by the saved shapes of what takes it: name to shape with N."""
    found: dict[str, OpenShape] = {}
    for model in layer_entries(config):
        inner = model["config"]
        found_layers = inner.get("layers") if isinstance(inner, dict) else None
        if not isinstance(found_layers, list):
            continue
        layers = [entry for entry in found_layers if isinstance(entry, dict)]
        for entry, following in itertools.pairwise([*layers, {}]):
            for tensor in saved_tensors(entry.get("inbound_nodes")):
                history, shape = tensor.get("keras_history"), tensor.get("shape")
                if isinstance(history, list) and history:
                    found.setdefault(
                        str(history[0]), tuple(shape) if isinstance(shape, list) else ()
                    )
            built = following.get("build_config")
            shape = built.get("input_shape") if isinstance(built, dict) else None
            if model.get("class_name") == "Sequential" and isinstance(shape, list):
                found.setdefault(name_of(entry), tuple(shape))
    return {
        name: shape
        for name, shape in found.items()
        if all(size is None or isinstance(size, int) for size in shape)
    }


def saved_tensors(nodes: Any) -> Iterator[dict[str, Any]]:
    """Yield the configs of the tensors that a layer's saved calls take."""
    if isinstance(nodes, dict):
        if nodes.get("class_name") == "__keras_tensor__":
            if isinstance(nodes.get("config"), dict):
                yield nodes["config"]
            return
        nodes = list(nodes.values())
    if isinstance(nodes, list):
        for node in nodes:
            yield from saved_tensors(node)


def parse_input(text: str) -> InputOption:
    """Return InputOption('image', (48, 48, 3)) from 'image=48x48x3'; the name may be left out.

    Raises:
        UsageError: it is not of this form.
    """
    name, equals, sizes = text.rpartition("=")
    if (equals and not name) or not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){0,7}", sizes):
        raise UsageError(
            f"--input takes sizes like 224x224x3 or image=224x224x3; got {clean(text)!r}"
        )
    return InputOption(name=name, shape=tuple(map(int, sizes.split("x"))))


class InputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One input of a model: its name, its shape with N, open sizes None, and its dtype."""

    name: str
    shape: OpenShape
    dtype: str = "float32"


def sizes_text(shape: Sequence[int | None]) -> str:
    """Return '224x224x3', open sizes as '?'."""
    return "x".join("?" if size is None else str(size) for size in shape)


def suggest(spec: InputSpec, *, named: bool) -> str:
    """Return an option that fills the input's open sizes: '--input image=224x224x3'."""
    own = spec.shape[1:]
    usual = SUGGESTED.get(len(own)) or (8,) * len(own)
    filled = [other if size is None else size for size, other in zip(own, usual, strict=True)]
    return f"--input {clean(spec.name) + '=' if named else ''}{sizes_text(filled)}"


def fill_shapes(
    specs: Sequence[InputSpec], options: Sequence[InputOption], batch: int
) -> tuple[Shape, ...]:
    """Return the inputs' shapes with N, open sizes taken from the options.

    An option with a name fills that input. One without fills every open input that it fits; several without go
    to the inputs by position.

    Raises:
        UsageError: sizes stay open, or an option fits no input.
    """
    chosen: dict[int, InputOption] = {}
    unnamed = [option for option in options if not option.name]
    for option in options:
        if option.name:
            places = [i for i, spec in enumerate(specs) if spec.name == option.name]
            if not places:
                names = ", ".join(f"`{clean(spec.name)}`" for spec in specs)
                raise UsageError(
                    f"no input is called `{clean(option.name)}`; the model takes {names}"
                )
            chosen[places[0]] = option
    if len(options) > len(specs):
        raise UsageError(f"the model has {len(specs)} inputs, --input is given {len(options)}x")
    left = [i for i in range(len(specs)) if i not in chosen]
    if len(unnamed) == 1:
        places = [i for i in left if None in specs[i].shape[1:]] or left
        fitting = [i for i in places if _fits(specs[i], unnamed[0])] or places[:1]
        chosen.update(dict.fromkeys(fitting, unnamed[0]))
    else:
        chosen.update(zip(left, unnamed, strict=False))
    several = len(specs) > 1
    return tuple(_fill(spec, chosen.get(i), batch, several=several) for i, spec in enumerate(specs))


def _fits(spec: InputSpec, option: InputOption) -> bool:
    own = spec.shape[1:]
    return len(own) == len(option.shape) and all(
        a in (None, b) for a, b in zip(own, option.shape, strict=True)
    )


def _fill(spec: InputSpec, option: InputOption | None, batch: int, *, several: bool) -> Shape:
    own = spec.shape[1:]
    if option is not None and not _fits(spec, option):
        raise UsageError(
            f"the input `{clean(spec.name)}` takes {sizes_text(own)}; --input {sizes_text(option.shape)} "
            f"does not fit it (try {suggest(spec, named=several)})"
        )
    wanted = own if option is None else option.shape
    if None in wanted:
        raise UsageError(
            f"the input `{clean(spec.name)}` leaves sizes open ({sizes_text(own)}); give them: "
            f"{suggest(spec, named=several)}"
        )
    return (batch, *(int(size) for size in wanted if size is not None))


def fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """Return the batch size that the file fixes, None if it leaves it open."""
    return next((spec.shape[0] for spec in specs if spec.shape and spec.shape[0]), None)
