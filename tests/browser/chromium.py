"""The browser for tests and screenshots.

Its limits are far above what anything takes: a page that lacks something fails later, not otherwise.
"""

from pathlib import Path

PROGRAM = Path("/usr/bin/chromium")
SECONDS = 1000.0  # Playwright counts milliseconds
LIMIT = 600 * SECONDS


def launch(tool):
    """A headless Chromium; in a container it has no sandbox."""
    return tool.chromium.launch(
        executable_path=str(PROGRAM), args=["--no-sandbox", "--disable-gpu"]
    )


def open_trace(view, link):
    """The frame of TensorBoard's trace viewer behind a deep link, once it shows the host's steps."""
    view.goto(link, timeout=LIMIT)
    view.wait_for_selector("iframe", timeout=LIMIT, state="attached")
    frame = None
    for _ in range(3000):
        frame = next((f for f in view.frames if "trace_viewer_index" in f.url), None)
        if frame is not None:
            break
        view.wait_for_timeout(0.2 * SECONDS)
    assert frame is not None, "the trace viewer did not open"
    frame.locator("text=/host:CPU").first.wait_for(state="attached", timeout=LIMIT)
    return frame
