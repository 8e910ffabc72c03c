"""Take the screenshots of README.md and docs/ from the reference run in a real browser.

`nox -s screenshots`; run it after a new reference run, and look at what it wrote.
"""

from __future__ import annotations

from pathlib import Path

from chromium import SECONDS, launch, open_trace
from playwright.sync_api import Browser, sync_playwright
from poolbench.report import page as report_page
from poolbench.report import tensorboard
from poolbench.report.frame import load

IMAGES = Path("docs") / "images"
REFERENCE = Path("results") / "reference"
# (name, width, height, colours) of the page's pictures.
PAGES = (
    ("page", 1400, 900, "light"),
    ("page-dark", 1400, 900, "dark"),
    ("page-narrow", 400, 900, "light"),
)
TRACE = "compare-depth_max_pool"  # how the name of the trace begins that docs/profiling.md tells of
TRACE_MODE = "-forward-graph-"


def main() -> None:
    """Write every picture into docs/images/."""
    page = report_page.render(load(REFERENCE), REFERENCE / "report").page
    with sync_playwright() as tool:
        browser = launch(tool)
        for name, width, height, scheme in PAGES:
            view = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            view.goto(page.resolve().as_uri())
            view.wait_for_timeout(SECONDS)
            view.screenshot(path=IMAGES / f"{name}.png")
            view.close()
        draw_trace(browser)
        browser.close()


def draw_trace(browser: Browser) -> None:
    """The candidates of a case above one another in TensorBoard's trace viewer."""
    logdir = REFERENCE / "traces"
    traces = tensorboard.find_traces(logdir)
    run = next(name for name in traces if name.startswith(TRACE) and TRACE_MODE in name)
    with tensorboard.serve(logdir) as (_, address):
        view = browser.new_page(viewport={"width": 1400, "height": 1100})
        open_trace(view, tensorboard.deep_link(address, run, traces[run]))
        view.wait_for_timeout(3 * SECONDS)
        view.screenshot(path=IMAGES / "trace-compare.png")
        view.close()


if __name__ == "__main__":
    main()
