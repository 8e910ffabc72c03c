"""Run Python in a process of its own: a copy of one file of the package alone, on JAX too; what a command costs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import given, settings

PACKAGE = Path(__file__).parent.parent / "bench" / "poolbench"


def cpu_seconds(*words):
    """Run Python with these words; return its CPU seconds (user and system) and the finished process."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, *words],
        cwd=PACKAGE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4]), done


def compare_with_pandas(*words):
    """Run Python with these words; return its CPU time over that of `import pandas`, and the process.

    A ratio, for the same words take twice as long on a machine that others use as well. The two run
    in turn, and the least of three counts for each.
    """
    runs = [(cpu_seconds(*words), cpu_seconds("-c", "import pandas")) for _ in range(3)]
    least, pandas = (min(seconds for seconds, _ in side) for side in zip(*runs, strict=True))
    return least / pandas, runs[0][0][1]


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
