"""Every snippet of docs/recipes.md runs, in order, in one process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_recipes_run_as_they_stand(tmp_path):
    assert len(SNIPPETS) >= 6
    # Each in a namespace of its own: none may lean on the one before.
    code = "\n".join(
        f"exec(compile({snippet!r}, 'recipe {i}', 'exec'), {{}})"
        for i, snippet in enumerate(SNIPPETS)
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
