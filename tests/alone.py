"""Run a copy of one file of the package without the rest of the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
