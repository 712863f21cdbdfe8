"""The page in a real browser: what a user sees and can do, and that nothing but this server is asked for anything."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Chromium")

ARGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
)
ROOT = Path(__file__).parents[2]
SHOT = os.environ.get("OPENBOOK_SCREENSHOT")  # a run folder; its page then becomes docs/images/serve.png
ATTACK = "<img src=x onerror=\"document.title='attacked'\">"
ENTRIES = {"first": "who wrote it\tand when", "attack": ATTACK, "third": "w" * 300}

CONTRAST = """element => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(x => x / 255)
      .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(light);
  return (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=ARGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(started: Callable[..., Any]) -> Any:
    """Its labels and its book hold markup, as data from strangers does."""
    return started(model={"labels": ["no", ATTACK], "entries": ENTRIES}, name=f"my model {ATTACK}")


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Any]:
    """The page, ready; it has asked this server only, and complained of nothing."""
    yield from opened(browser, server.url)


def opened(browser: Any, url: str, expected: bool = False, **options: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 900, "height": 800}, **options)
    page = context.new_page()
    page.set_default_timeout(15_000)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#ask:enabled")
    yield page
    assert expected or all(one.startswith((url, "data:")) for one in asked), asked
    assert expected or not complaints
    context.close()


def ask(page: Any, text: str, how: str = "button") -> None:
    page.get_by_label("Text", exact=True).fill(text)
    if how == "button":
        page.get_by_role("button", name="Predict").click()
    else:
        page.keyboard.press(how)
    page.wait_for_selector("#answer:not([hidden]):not(.old)")


def cells(page: Any, table: str) -> list[list[str]]:
    return [row.locator("th, td").all_inner_texts() for row in page.locator(f"{table} tbody tr").all()]


def share(text: str) -> float:
    assert text.endswith("\u00a0%")
    return float(text[:-2])


def test_a_user_sees_the_answer_its_probabilities_and_what_decided_it(page: Any) -> None:
    ask(page, "a b c")
    chances = cells(page, "#chances")
    assert [row[0] for row in chances] in (["no", ATTACK], [ATTACK, "no"])
    numbers = [share(row[2]) for row in chances]
    assert numbers == sorted(numbers, reverse=True)
    assert sum(numbers) == pytest.approx(100, abs=0.2)
    assert page.locator("#verdict").inner_text() == chances[0][0]
    assert page.locator("#remark").inner_text().startswith(f"{chances[0][2]} · 3 word-pieces")
    whole, fill = (page.locator(f"#chances tr:first-child {part}").bounding_box()["width"] for part in (".bar", "i"))
    assert 100 * fill / whole == pytest.approx(numbers[0], abs=1)
    rows = cells(page, "#neighbours")
    assert [row[0] for row in rows] == ["who wrote it\nand when", ATTACK, "w" * 300]
    assert sum(share(row[3].strip()) for row in rows) == pytest.approx(100, abs=0.2)
    added = sum(share(row[4]) for row in rows)
    student, book = (share(page.locator(f"#{part}").inner_text().split(" ", 1)[1]) for part in ("student", "book"))
    assert added == pytest.approx(book, abs=0.2)
    assert student + book == pytest.approx(numbers[0], abs=0.2)


def test_what_users_and_the_book_write_is_never_markup(page: Any) -> None:
    ask(page, ATTACK)
    assert page.locator("h1").inner_text() == f"my model {ATTACK}"
    assert page.get_by_text(ATTACK).count() >= 3
    assert page.locator("img").count() == 0
    assert page.title() != "attacked"


def test_other_texts_give_other_answers_and_an_empty_one_is_a_text(page: Any) -> None:
    seen = set()
    for text in ("a", "b c", ""):
        ask(page, text)
        seen.add(page.locator("#chances").inner_text())
    assert len(seen) == 3


def test_the_keyboard_is_enough(page: Any) -> None:
    assert page.evaluate("document.activeElement.id") == "first"
    page.keyboard.type("a b")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#answer:not([hidden])")
    assert "2 word-pieces" in page.locator("#remark").inner_text()
    order = []
    for _ in range(3):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert order == ["ask", "pair", "A"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_pair_has_two_fields(page: Any) -> None:
    assert not page.get_by_label("Second text", exact=True).is_visible()
    page.get_by_label("with a second text").check()
    page.get_by_label("First text", exact=True).fill("a b")
    page.get_by_label("Second text", exact=True).fill("c")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#answer:not([hidden])")
    assert "3 word-pieces" in page.locator("#remark").inner_text()


def test_a_long_text_says_that_it_was_cut(page: Any) -> None:
    ask(page, "word " * 100)
    assert "its end was left out" in page.locator("#remark").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_writing_has_contrast(browser: Any, server: Any, scheme: str) -> None:
    for page in opened(browser, server.url, color_scheme=scheme):
        ask(page, "a b c")
        for name in (
            "h1",
            "button",
            "textarea",
            "#verdict",
            "#remark",
            "#chances td",
            "thead th",
            ".quote",
            "a",
        ):
            assert page.locator(name).first.evaluate(CONTRAST) >= 4.5, name
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(253, 253, 251)") is (scheme == "light")


def test_a_narrow_screen_needs_no_scrolling_sideways(browser: Any, server: Any) -> None:
    for page in opened(browser, server.url):
        page.set_viewport_size({"width": 340, "height": 700})
        ask(page, "w" * 200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 340


def test_the_policy_stops_what_is_not_of_this_page(browser: Any, server: Any) -> None:
    for page in opened(browser, server.url, expected=True):
        check_policy(page)


def check_policy(page: Any) -> None:
    stopped = page.evaluate(
        """async () => {
          const stopped = [];
          document.addEventListener("securitypolicyviolation", event => stopped.push(event.effectiveDirective));
          const script = document.createElement("script");
          script.textContent = "document.title = 'attacked'";
          const image = document.createElement("img");
          image.src = "http://127.0.0.2:9/x.png";
          document.body.append(script, image);
          await fetch("http://127.0.0.2:9/").catch(() => 0);
          await new Promise(done => setTimeout(done, 100));
          return stopped.sort();
        }"""
    )
    assert stopped == ["connect-src", "img-src", "script-src-elem"]
    assert page.title() != "attacked"


def test_a_model_without_labels_shows_a_score(browser: Any, started: Callable[..., Any]) -> None:
    server = started(model={"labels": None, "kind": "regression"})
    for page in opened(browser, server.url):
        ask(page, "a b")
        assert float(page.locator("#verdict").inner_text()) >= 0
        assert not page.locator("#chances").is_visible()
        assert page.locator("#remark").inner_text() == "2 word-pieces"
        assert len(cells(page, "#neighbours")) == 1


def test_many_labels_are_summed_up(browser: Any, started: Callable[..., Any]) -> None:
    server = started(model={"labels": [f"label {place}" for place in range(30)]})
    for page in opened(browser, server.url):
        ask(page, "a b")
        assert len(cells(page, "#chances")) == 10
        assert page.locator("#others").inner_text().startswith("and 20 other labels: ")


def test_refusals_and_a_server_that_is_gone_are_told(browser: Any, started: Callable[..., Any]) -> None:
    server = started(wait=4, limits={"max_characters": 5})
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    note = page.get_by_role("alert")
    note.get_by_text("The model is being loaded.").wait_for()
    page.wait_for_selector("#ask:enabled")
    assert note.inner_text() == ""
    ask(page, "a b")
    page.get_by_label("Text", exact=True).fill("a b c d")
    page.keyboard.press("Control+Enter")
    note.get_by_text("Texts[0]: it has 7 characters; send at most 5.").wait_for()
    assert not page.locator("#answer").is_visible()
    assert server.stop() == 0
    page.keyboard.press("Control+Enter")
    note.get_by_text("The server cannot be reached.").wait_for()
    context.close()


def test_the_screenshot_of_the_docs(browser: Any, server: Any, tmp_path: Path) -> None:
    """Of the stand-in it goes nowhere. `OPENBOOK_SCREENSHOT=runs/quickstart` writes docs/images/serve.png."""
    import subprocess
    import sys

    if SHOT is None:
        assert taken(browser, server.url, tmp_path / "serve.png") > 10_000
        return
    command = [sys.executable, "-m", "openbook", "serve", "--model", SHOT, "--port", "8917"]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        for _ in range(600):
            with suppress(httpx2.HTTPError):
                if httpx2.get("http://127.0.0.1:8917/ready").status_code == 200:
                    break
            time.sleep(0.1)
        (ROOT / "docs" / "images").mkdir(exist_ok=True)
        assert taken(browser, "http://127.0.0.1:8917", ROOT / "docs" / "images" / "serve.png") > 10_000
    finally:
        process.terminate()
        assert process.wait(30) == 0


def taken(browser: Any, url: str, path: Path) -> int:
    """Bytes of the picture."""
    page = browser.new_page(viewport={"width": 900, "height": 600}, device_scale_factor=1.5)
    page.goto(url)
    page.wait_for_selector("#ask:enabled", timeout=60_000)
    ask(page, "How far is the moon?")
    page.screenshot(path=path, full_page=True)
    page.close()
    return path.stat().st_size
