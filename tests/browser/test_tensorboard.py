"""The deep link in a real browser, with every request that is not local refused."""

import re

import pytest
from chromium import LIMIT, PROGRAM, SECONDS, launch, open_trace
from poolbench.core.case import make_case
from poolbench.engine.tracing import Recorder, trace_name
from poolbench.report import tensorboard
from poolbench.worker.trace import STEPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(logdir, the run's name) of one candidate."""
    logdir = tmp_path_factory.mktemp("results") / "night" / "traces"
    case = make_case(op="depth_max_pool", shape=(8, 28, 28, 96), pool_size=3, padding="valid")
    trace_summary = Recorder(logdir=logdir).record(case, "reshape-reduce_max")
    assert trace_summary.status == "ok", trace_summary.reason
    return logdir, trace_name(case, "reshape-reduce_max")


@pytest.mark.parametrize("above", [False, True], ids=["traces", "results"])
def test_the_deep_link_shows_the_steps_and_finds_an_operation(recorded, tmp_path, above):
    playwright = pytest.importorskip("playwright.sync_api")
    if not PROGRAM.exists():
        pytest.skip("Chromium is not installed")
    logdir, name = recorded
    run = name
    if above:  # `tensorboard --logdir results` names a trace by its folders
        logdir, run = logdir.parent.parent, f"night/traces/{name}"
    with tensorboard.serve(logdir) as (_, address), playwright.sync_playwright() as tool:
        browser = launch(tool)
        page = browser.new_page(viewport={"width": 1400, "height": 700})
        page.set_default_timeout(LIMIT)
        page.route(lambda url: not url.startswith(address), lambda route: route.abort())
        frame = open_trace(page, tensorboard.deep_link(address, run, [name]))
        find = frame.locator("input#filter")
        for word, count in (("reshape-reduce_max", STEPS), ("Max", STEPS)):
            found = None
            for _ in range(100):  # the viewer searches what it has loaded so far
                find.click()
                find.fill("")
                find.press_sequentially(word)
                page.wait_for_timeout(2 * SECONDS)
                shown = frame.locator("tr-ui-find-control").inner_text()
                found = re.search(r"of\s+(\d+)", shown)
                if found and int(found[1]) >= count:
                    break
            assert found, shown
            assert int(found[1]) >= count
        picture = tmp_path / "trace.png"
        page.screenshot(path=str(picture))
        print("screenshot:", picture)
        browser.close()
    assert picture.stat().st_size > 10_000
