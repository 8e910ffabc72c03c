"""Run a copy of one file of the package without the rest of the package, on JAX too."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import given, settings

PACKAGE = Path(__file__).parent.parent / "bench" / "poolbench"


def run_alone(module, folder, code, **environment):
    """Return the last line that code printed, read as JSON; code may import the module by its name."""
    shutil.copy(PACKAGE / f"{module}.py", folder)
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


JAX_CODE = """
import json, keras, numpy as np, jax
assert keras.backend.backend() == "jax"
{code}
data, out = np.load("cases.npz"), {{}}
for i, case in enumerate(json.load(open("cases.json"))):
    arrays = {{name: data[f"{{name}}{{i}}"] for name in {names}}}
    for name in ("x", "dy"):
        arrays[name] = arrays[name].astype(jax.numpy.dtype(case["dtype"]))
    out |= {{f"{{name}}{{i}}": np.asarray(a).astype("float32") for name, a in run(case, **arrays).items()}}
np.savez("out.npz", **out)
print("null")
"""


def run_on_jax(module, folder, cases, arrays_of, code):
    """Yield each case with what `run(case, **arrays)`, which the code defines, returns for it on JAX.

    `arrays_of(case)` returns the arrays by name; x and dy are given in the case's dtype.
    """
    arrays = [arrays_of(case) for case in cases]
    np.savez(
        folder / "cases.npz",
        **{f"{n}{i}": a for i, one in enumerate(arrays) for n, a in one.items()},
    )
    (folder / "cases.json").write_text(json.dumps(cases))
    run_alone(
        module, folder, JAX_CODE.format(code=code, names=tuple(arrays[0])), KERAS_BACKEND="jax"
    )
    out = np.load(folder / "out.npz")
    for i, case in enumerate(cases):
        names = [name for name in ("y", "dx", "dp") if f"{name}{i}" in out]
        yield case, {name: out[f"{name}{i}"] for name in names}


def draw_many(strategy, count):
    """Return so many examples of a strategy."""
    found = []
    settings(max_examples=count)(given(strategy)(lambda one: found.append(one)))()
    return found
