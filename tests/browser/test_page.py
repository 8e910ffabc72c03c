"""The page in a real browser, offline: it loads, answers, sorts, filters, and runs no script of a journal's."""

import itertools
import json
import os
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import synthetic
from chromium import LIMIT, PROGRAM, launch
from poolbench.report import page as report_page
from poolbench.report.frame import load
from poolbench.report.recommend import answer

pytestmark = pytest.mark.slow
WIDTHS, SCHEMES = (400, 1400), ("light", "dark")
HOSTILE = (
    "<script>window.pwned=1</script>", "<img src=x onerror=window.pwned=1>", '"><svg onload=window.pwned=1>',
    "</script><script>window.pwned=1</script>", "';window.pwned=1;//", "{{7*7}}{% raw %}", "../../etc/passwd",
    "&lt;img src=x onerror=window.pwned=1&gt;", "a\nb\r\nc", "\u2028window.pwned=1", "\u202egnp.exe",
    "javascript:window.pwned=1", "<style>*{display:none}</style>", "]]><script>window.pwned=1</script>",
    "<!--", "--><script>window.pwned=1</script>", "$x_1$ \\frac{", "%s%n{0}", "=cmd|' /C calc'!A0", "\x00\x1b[31m",
    "<iframe srcdoc='<script>parent.pwned=1</script>'>", "<a href=javascript:window.pwned=1>x</a>",
    "<details open ontoggle=window.pwned=1>", "</textarea><script>window.pwned=1</script>", "\\u003cscript\\u003e",
    "<svg><script>window.pwned=1</script></svg>", "<svg><animate onbegin=window.pwned=1 attributeName=x dur=1s>",
    "<math><mi//xlink:href='data:x,<script>window.pwned=1</script>'>", "<body onload=window.pwned=1>",
    "<input autofocus onfocus=window.pwned=1>", "<video><source onerror=window.pwned=1></video>",
    "<object data=javascript:window.pwned=1></object>", "<embed src=javascript:window.pwned=1>",
    "<form action=javascript:window.pwned=1><button>x</button></form>", "<base href=javascript:window.pwned=1//>",
    "<meta http-equiv=refresh content='0;url=javascript:window.pwned=1'>",
    "<link rel=stylesheet href=//nowhere.invalid/x>",
    "<marquee onstart=window.pwned=1>x</marquee>", "<template><script>window.pwned=1</script></template>",
    "<noscript><p title='</noscript><img src=x onerror=window.pwned=1>'>",
    "<xss style=animation-name:x onanimationend=window.pwned=1>",
    "</style><script>window.pwned=1</script>", "</title><script>window.pwned=1</script>",
    "'\"><img/src=x/onerror=window.pwned=1>",
    "<ScRiPt>window.pwned=1</sCrIpT>", "<script\t>window.pwned=1</script\n>", "<scr\x00ipt>window.pwned=1</script>",
    "\ufeff<script>window.pwned=1</script>", "\uff1cscript\uff1ewindow.pwned=1\uff1c/script\uff1e",
    "%3Cscript%3Ewindow.pwned=1%3C/script%3E", "&#60;script&#62;window.pwned=1&#60;/script&#62;", "${window.pwned=1}",
    "`-(window.pwned=1)-`", "constructor", "__proto__", "..\\..\\windows\\system32", "/etc/passwd\x00.svg",
    "{% import os %}",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    if not PROGRAM.exists():
        reason = f"{PROGRAM} is not installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with playwright.sync_playwright() as tool:
        browser = launch(tool)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """(the run as it was laid out, its page)."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    loaded = load(synthetic.write(folder, synthetic.records()))
    return loaded, report_page.render(loaded, folder / "report").page


def opened(chromium, path, *, width=1400, scheme="light"):
    """A page with what it complained of and asked of a network."""
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(LIMIT)
    problems = []
    page.on(
        "console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else problems.append(r.url),
    )
    page.goto(path.as_uri())
    page.wait_for_selector("#measurements tbody tr")
    return page, problems


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_loads_without_a_word_or_a_request_and_fits(chromium, rendered, width, scheme):
    page, problems = opened(chromium, rendered[1], width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.close()
    assert problems == []


def choose(page, key):
    """Set the chooser, as a user does it, and return its answer."""
    op, device, mode, direction, dtype, shape, others = key
    page.select_option("[name=op]", op)
    for name, value in (
        ("device", device),
        ("mode", mode),
        ("direction", direction),
        ("dtype", dtype),
    ):
        page.select_option(f"[name={name}]", value)
    page.fill("[name=shape]", shape)
    if others is not None:
        page.select_option("[name=others]", others)
    return page.inner_text("#answer")


def test_the_choice_answers_each_combination_with_the_row_of_the_data(chromium, rendered):
    loaded, path = rendered
    page, problems = opened(chromium, path)
    answers = json.loads(page.text_content("#data"))["answers"]
    found = {choice.race: choice for choice in answer(loaded).choices}
    assert len(answers) == len(found) > 80
    for one in answers:
        text = choose(page, one["key"])
        row = loaded.table.loc[int(page.get_attribute("#answer", "data-row"))]
        assert [
            str(row[name]) for name in ("op", "device", "mode", "direction", "dtype", "shape")
        ] == (one["key"][:6])
        assert row["candidate"] == found[row["race"]].recommended
        assert text.startswith(f"Use {row['candidate']}")
        assert "@candidate" not in text
    page.close()
    assert problems == []


def test_page_opens_with_a_card_per_op_and_its_code_on_the_first_screen(chromium, rendered):
    loaded, path = rendered
    page, problems = opened(chromium, path)
    cards = page.locator(".card")
    assert cards.count() == len(answer(loaded).recommendations) == 2
    for card, advice in zip(cards.all(), answer(loaded).recommendations.values(), strict=True):
        assert card.locator(".use").inner_text() == f"Use {advice.candidate}"
        assert card.locator(".facts div").count() == 3
        box = card.locator(".code, .meta").first.bounding_box()
        assert box["y"] + box["height"] <= 900
        assert "`" not in card.inner_text()
    page.close()
    assert problems == []


def test_a_size_that_was_not_measured_gets_the_command_that_measures_it(chromium, rendered):
    page, _ = opened(chromium, rendered[1])
    key = ["depth_max_pool", "cpu:0", "xla", "training", "bfloat16", "3x5x7x9", "k3, valid"]
    text = choose(page, key)
    assert "Use " not in text
    assert (
        "poolbench run --op depth_max_pool --axis shape=3x5x7x9 --axis mode=xla --axis direction=training "
        "--axis dtype=bfloat16 --axis pool_size=3 --axis padding=valid"
    ) in text
    assert "--axis device=gpu" in choose(page, [*key[:1], "gpu:0", *key[2:]])
    assert "whole numbers" in choose(page, [*key[:5], "a lot", key[6]])
    page.close()


def test_the_table_holds_all_rows_sorts_by_value_and_filters(chromium, rendered):
    loaded, path = rendered
    page, _ = opened(chromium, path)
    assert f"of {len(loaded.table)} entries" in page.inner_text(".dt-info")
    assert page.locator("#measurements thead th").count() <= 12
    page.locator("#measurements thead th", has_text="time per call").click()
    page.wait_for_selector("#measurements thead th.dt-ordering-asc")
    shown = page.locator("#measurements tbody tr").first.locator("td").nth(2).inner_text()
    assert shown == loaded.table.loc[loaded.table["seconds"].idxmin(), "candidate"]
    page.locator("#measurements thead th", has_text="speed over baseline").click()
    page.wait_for_selector("#measurements thead th.dt-ordering-desc")
    shown = page.locator("#measurements tbody tr").first.locator("td").nth(2).inner_text()
    assert shown == loaded.table.loc[loaded.table["ratio"].idxmin(), "candidate"]
    page.fill(".dt-search input", "recipe-verbatim")
    names = page.locator("#measurements tbody tr td:nth-child(3)").all_inner_texts()
    assert set(names) == {"recipe-verbatim"}
    count = int((loaded.table["candidate"] == "recipe-verbatim").sum())
    assert f"of {count} entries" in page.inner_text(".dt-info")
    page.close()


def test_a_row_opens_its_samples_from_the_disk_by_keyboard(chromium, rendered):
    page, problems = opened(chromium, rendered[1])
    button = page.locator("#measurements button").first
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#samples-plot circle")
    assert page.locator("#samples-plot circle").count() == int(button.inner_text())
    page.keyboard.press("Escape")
    assert not page.is_visible("#samples")
    page.close()
    assert problems == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_accessible(chromium, rendered, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page, _ = opened(chromium, rendered[1], scheme=scheme)
    results = axe.Axe().run(page)
    serious = [
        (v["id"], [n["target"] for n in v["nodes"]][:4])
        for v in results.response["violations"]
        if v["impact"] in ("serious", "critical")
    ]
    page.close()
    assert serious == []


# Of fixed words, checked when a journal is read, or of what the page must know to show anything.
KEPT = {"type", "case", "state", "status", "kind", "clock", "direction", "mode", "op", "trace", "schema", "name",
        "axes", "baseline", "samples", "wall_samples", "accuracy", "form", "node", "contention"}  # fmt: skip


def hostile_everywhere(record):
    """The record with hostile strings in all its text that is free, in names of values too."""
    texts = itertools.cycle(HOSTILE)

    def spoilt(value):
        if isinstance(value, str):
            return next(texts)
        if isinstance(value, dict):
            return {next(texts): spoilt(one) for one in value.values()}
        return [*map(spoilt, value)] if isinstance(value, list) else value

    plain = msgspec.to_builtins(record)
    for key, value in plain.items():
        if key == "parts":
            plain[key] = [part | {"name": next(texts)} for part in value]
        elif key in ("environment", "program") and value:
            plain[key] = {name: spoilt(one) for name, one in value.items()}
        elif key not in KEPT:
            plain[key] = spoilt(value)
    return msgspec.convert(plain, type(record))


def test_nothing_of_a_hostile_journal_runs(chromium, tmp_path):
    records = []
    assert len(set(HOSTILE)) == len(HOSTILE) >= 50
    for i, text in enumerate(HOSTILE):
        case = synthetic.op_case("depth_max_pool", shape=(1, 8, 8, 3 * (i + 1)))
        for m in synthetic.race(
            case, np.random.default_rng(i), names=["reshape-reduce_max", "slices-maximum"]
        ):
            hostile = m.candidate == "slices-maximum"
            records.append(
                msgspec.structs.replace(
                    m, candidate=text, reason=text, tail=text, issue=text, flags=(text,), form=text
                )
                if hostile
                else m
            )
    head, unusual = synthetic.unusual()
    records += [hostile_everywhere(record) for record in (*unusual, *synthetic.extras())]
    head = msgspec.structs.replace(
        hostile_everywhere(head), sources={"depth_max_pool": {text: text for text in HOSTILE}}
    )
    folder = synthetic.write(tmp_path / "hostile", records, head)
    path = report_page.render(load(folder), tmp_path / "report").page
    page, problems = opened(chromium, path)
    page.select_option(".dt-length select", "100")
    for text in HOSTILE:
        page.fill(".dt-search input", text.replace("\x00", ""))
    page.fill(".dt-search input", "")
    for button in page.locator("#measurements button").all()[:40]:
        button.click()
        page.wait_for_selector("#samples-plot circle")
        page.keyboard.press("Escape")
    shown = set(page.locator("#measurements tbody td:nth-child(3)").all_inner_texts())
    assert HOSTILE[0] in shown
    assert page.evaluate("window.pwned") is None
    page.close()
    assert problems == []


def test_twenty_thousand_measurements_stay_quick(chromium, tmp_path):
    """Sizes are asserted; times are printed, for the machine is not always ours alone."""
    loaded = load(synthetic.write_large(tmp_path / "large", 20_000))
    path = report_page.render(loaded, tmp_path / "report").page
    assert path.stat().st_size < 15e6
    page, problems = opened(chromium, path)
    first_view = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    )
    print(f"first view after {first_view:.0f} ms, {path.stat().st_size / 1e6:.1f} MB")
    assert f"of {len(loaded.table):,} entries" in page.inner_text(".dt-info")
    page.close()
    assert problems == []
