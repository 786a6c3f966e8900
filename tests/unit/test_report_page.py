"""The report in a browser: what it asks for, how it looks, and the token view under mouse and keyboard.

Screenshots of each run stay in `.runs/report/`. Needs Playwright for Python (`pip install '.[dev]'`) and Chromium
(Debian: `apt-get install chromium`), and is skipped without.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report_world import POLICIES, result
from whiflash_workloads.html_report import render
from whiflash_workloads.results import Result

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed (extra `dev`)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)")

SHOTS = Path(__file__).parents[2] / ".runs" / "report"
EVIL = "</script><img src=x onerror=\"document.title='broken'\">"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 420, "height": 800}


def with_evil_text(original: Result) -> Result:
    """One more turn: markup in its first token and in the name of its session, and a drafter that nobody knows."""
    views = original.detail.views
    first = views[0]
    rounds = list(first.figures.trace or [])
    rounds[0] = rounds[0].model_copy(update={"drafter": "ngram", "tokens": [*rounds[0].tokens[:-1], ""]})
    figures = first.figures.model_copy(update={"first": EVIL, "trace": rounds})
    view = first.model_copy(update={"session_id": EVIL, "figures": figures})
    return original.model_copy(update={"detail": original.detail.model_copy(update={"views": [*views, view]})})


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(
        render([*(result(label) for label in POLICIES if label != "entropy"), with_evil_text(result("entropy"))])
    )
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield running
        running.close()


class Watched:
    """A page, and what it asked for or complained of."""

    def __init__(self, browser: Any, address: str, scheme: str = "light", viewport: dict[str, int] = DESKTOP):
        self.page = browser.new_page(color_scheme=scheme, viewport=viewport)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)

    def token(self, number: int) -> Any:
        return self.page.locator("#text [data-token]").nth(number)

    def focused(self) -> int:
        return int(self.page.evaluate("document.activeElement.dataset.token ?? -1"))

    def tip(self) -> dict[str, str]:
        """What the tooltip says, by term; empty where it is not shown."""
        tip = self.page.locator("#tip")
        if not tip.is_visible():
            return {}
        return dict(zip(tip.locator("dt").all_inner_texts(), tip.locator("dd").all_inner_texts(), strict=True))


@pytest.fixture
def watched(browser: Any, address: str) -> Iterator[Watched]:
    opened = Watched(browser, address)
    yield opened
    opened.page.close()
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [address]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_renders(browser: Any, address: str, scheme: str, viewport: dict[str, int]) -> None:
    """Without network, console message or anything wider than the window."""
    opened = Watched(browser, address, scheme, viewport)
    opened.page.select_option("#turn", index=1)
    opened.token(20).hover()
    SHOTS.mkdir(parents=True, exist_ok=True)
    opened.page.screenshot(path=SHOTS / f"{scheme}-{viewport['width']}.png", full_page=True)
    assert (SHOTS / f"{scheme}-{viewport['width']}.png").stat().st_size > 50_000
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [address]
    opened.page.close()


def test_the_text_of_a_turn_is_whole(watched: Watched) -> None:
    """Every token of the result stands there, in order; what was rejected only where it is wanted."""
    view = result("entropy").detail.views[1]
    watched.page.select_option("#turn", label=f"{view.session_id}, turn {view.depth}")
    pieces = [view.figures.first or "", *(token for each in view.figures.trace or () for token in each.tokens)]
    script = "[...document.querySelectorAll('#text [data-token]')].map(e => e.textContent.replaceAll('⏎\\n', '\\n'))"
    assert watched.page.evaluate(script) == pieces
    drafts = watched.page.locator("#text .drafts")
    assert drafts.count() == sum(len(each.drafts) > each.accepted for each in view.figures.trace or ())
    assert not drafts.first.is_visible()
    watched.page.check("#rejected")
    assert drafts.first.is_visible()
    assert watched.page.locator("#text .switch").count() == view.figures.switches > 0


def test_hover_shows_al_entropy_and_score(watched: Watched) -> None:
    view = result("entropy").detail.views[1]
    first = (view.figures.trace or [])[0]
    watched.page.select_option("#turn", label=f"{view.session_id}, turn {view.depth}")
    assert watched.tip() == {}
    watched.token(len(first.tokens)).hover()  # token 0 is that of the prefill: this is the bonus token
    said = watched.tip()
    assert said["proposed by"] == "the target (bonus token)"
    assert said["AL"] == f"{len(first.tokens)} ({first.accepted} of {len(first.drafts)} drafts + its own)"
    assert said["entropy"] == f"{first.entropy:.3f}".rstrip("0") + " nats"
    assert said["router score"] == f"{first.score:.3f}".rstrip("0").rstrip(".") + " AL"
    assert said["round"] == f"1 of {len(view.figures.trace or [])}, {first.span}"
    watched.page.mouse.move(0, 0)
    assert watched.tip() == {}
    watched.token(0).hover()
    assert watched.tip()["proposed by"] == "the target (prefill)"


def test_the_keyboard_reaches_every_token(watched: Watched) -> None:
    """One stop for Tab, arrows within; focus shows what hover does."""
    watched.page.select_option("#turn", index=1)
    watched.page.focus("#rejected")
    watched.page.keyboard.press("Tab")  # to what the turn answers
    watched.page.keyboard.press("Tab")
    assert watched.focused() == 0
    watched.page.keyboard.press("ArrowRight")
    assert watched.focused() == 1
    assert {"AL", "entropy", "router score"} <= watched.tip().keys()
    watched.page.keyboard.press("ArrowDown")
    assert watched.tip()["round"].startswith("2 of ")
    watched.page.keyboard.press("ArrowUp")
    assert watched.tip()["round"].startswith("1 of ")
    watched.page.keyboard.press("End")
    last = watched.page.locator("#text [data-token]").count() - 1
    assert watched.focused() == last
    watched.page.keyboard.press("ArrowRight")
    assert watched.focused() == last
    watched.page.keyboard.press("Home")
    watched.page.keyboard.press("ArrowUp")
    assert watched.focused() == 0
    watched.page.keyboard.press("Escape")
    assert watched.tip() == {}
    watched.page.keyboard.press("Tab")
    assert watched.focused() == -1


def test_policies_and_turns_are_chosen_by_keyboard(watched: Watched) -> None:
    assert watched.page.locator("input[name=policy]:checked").get_attribute("value") == "entropy"  # it switches
    watched.page.focus("input[name=policy]:checked")
    watched.page.keyboard.press("ArrowLeft")
    assert watched.page.locator("input[name=policy]:checked").get_attribute("value") == "fixed:df"
    assert watched.page.locator("#text .token.draft.e3").count() == 0
    watched.page.focus("#next")
    watched.page.keyboard.press("Enter")
    assert watched.page.locator("#turn").input_value() == "1"
    assert watched.page.locator("input[name=policy]:checked").get_attribute("value") == "fixed:df"  # it is kept


def test_proposers_differ_in_more_than_colour(watched: Watched) -> None:
    watched.page.select_option("#turn", index=1)
    kinds = (".draft.df", ".draft.e3", ".own:not(.prefill)", ".own.prefill")
    script = "s => getComputedStyle(document.querySelector('#text .token' + s)).borderBottomStyle"
    styles = [watched.page.evaluate(script, kind) for kind in kinds]
    assert len(set(styles)) == len(kinds), styles


CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (text) => rgb(text).map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
  };
  const found = {};
  for (const selector of ["td", ".soft", ".note", ".facts dt", "#text .df", "#text .e3", "#text .own", "#text .count",
                          "#text .switch", "#text .break", ".legend li", ".axis"]) {
    const element = document.querySelector(selector);
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
    found[selector] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Any, address: str, scheme: str) -> None:
    """WCAG AA: 4.5 to 1."""
    opened = Watched(browser, address, scheme)
    opened.page.select_option("#turn", index=1)
    found = opened.page.evaluate(CONTRAST)
    opened.page.close()
    assert {selector: ratio for selector, ratio in found.items() if ratio < 4.5} == {}


def test_markup_in_a_trace_is_text(watched: Watched) -> None:
    watched.page.select_option("#turn", label=f"{EVIL}, turn 1")
    assert watched.token(0).inner_text() == EVIL
    assert watched.page.title() != "broken"
    assert watched.page.locator("img").count() == 0


def test_other_drafters_and_tokens_without_text_are_shown(watched: Watched) -> None:
    assert not watched.page.locator("#other").is_visible()
    watched.page.select_option("#turn", label=f"{EVIL}, turn 1")
    assert watched.page.locator("#other").is_visible()
    watched.page.locator("#text .token.draft.other").first.hover()
    assert watched.tip()["proposed by"].startswith("ngram, draft 1 of ")
    assert "∅" in watched.page.locator("#text .token.own:not(.prefill)").all_inner_texts()
