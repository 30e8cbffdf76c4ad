"""The page in a real browser: by mouse, by keyboard, on a phone, offline."""

import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, served):
    """`visit(size)` -> the page, opened; what it asked for and what went wrong in it are looked at in the end."""
    contexts, addresses, errors = [], set(), []

    def open_page(size, **options):
        contexts.append(browser.new_context(viewport=size, **options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(30_000)
        tab.on("request", lambda request: addresses.add(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(served.url, wait_until="domcontentloaded")
        tab.get_by_role("button", name="Example: 00").wait_for()  # named last of all
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert addresses and all(address.startswith((served.url, "data:", "blob:")) for address in addresses)


def choose(tab, path):
    tab.locator("#coca-picture input[type=file]").set_input_files(path)
    tab.locator("#coca-picture img").wait_for()


def overflow(tab):
    return tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_on_a_phone_by_touch(visit, photos):
    tab = visit(PHONE, has_touch=True, is_mobile=True)
    tab.get_by_text("Drop a picture here").wait_for()
    assert overflow(tab) == 0

    tab.get_by_role("button", name="Write a caption").tap()  # too early
    tab.get_by_text("Choose a picture first.").wait_for()
    choose(tab, photos / "00.png")
    tab.get_by_role("button", name="Write a caption").tap()
    tab.locator(".coca-words img").first.wait_for()
    words = tab.locator(".coca-words figcaption").all_inner_texts()
    assert words == tab.locator("#caption-text textarea").input_value().split()
    boxes = [image.bounding_box() for image in tab.locator(".coca-words img").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] >= 120 for box in boxes)
    assert overflow(tab) == 0

    choose(tab, photos / "03.png")  # what was said about the other one goes
    playwright.expect(tab.locator(".coca-words")).to_have_count(0)
    assert tab.locator("#caption-text textarea").input_value() == ""

    tab.get_by_role("tab", name="Search").tap()
    tab.locator("#words textarea").fill("a red square")
    tab.get_by_role("button", name="Search").tap()
    playwright.expect(tab.locator(".coca-hits img")).to_have_count(12)
    assert tab.locator(".coca-hits img").first.evaluate("image => image.naturalWidth") > 0
    assert overflow(tab) == 0


def test_by_keyboard_alone(visit, served, photos):
    """Tab reaches everything in the order in which it is seen, Enter and the space bar do it."""
    tab = visit(DESKTOP)

    def focused():
        return tab.evaluate("(e => e.getAttribute('aria-label') || e.innerText || e.id)(document.activeElement)")

    def reach(name, presses=12):
        for _ in range(presses):
            tab.keyboard.press("Tab")
            if focused() == name:
                return
        raise AssertionError(f"{presses} times Tab do not reach {name}")

    reach("Drop an image file here to upload", 2)
    for attempt in range(3):  # on a busy machine the key may count no more as the user's when the page gets to it
        try:
            with tab.expect_file_chooser(timeout=8_000) as chooser:
                tab.keyboard.press("Enter")
            break
        except playwright.TimeoutError:
            assert attempt < 2
    chooser.value.set_files(photos / "00.png")
    tab.locator("#coca-picture img").wait_for()
    reach("Ask")
    tab.keyboard.press("Enter")
    tab.get_by_label("Question").wait_for()
    outline = tab.evaluate("(s => s.outlineStyle + s.boxShadow)(getComputedStyle(document.activeElement))")
    assert outline != "nonenone"  # one sees where one is
    tab.get_by_label("Question").focus()
    tab.keyboard.type("what is it?")
    tab.keyboard.press("Enter")
    tab.get_by_text("a probability of").wait_for()
    tab.get_by_label("Question").fill("what " * 30)
    tab.keyboard.press("Enter")
    tab.get_by_text("The question is too long for this model").wait_for()
    assert tab.get_by_text("a probability of").count() == 0  # the old answer is none to the new question


def test_labels_and_an_example_in_the_dark(visit, photos):
    tab = visit(DESKTOP, color_scheme="dark")
    assert tab.locator("body.dark, .dark").count()
    tab.get_by_role("button", name="Example: 00").click()
    tab.locator("#coca-picture img").wait_for()
    tab.get_by_role("tab", name="Classify").click()
    tab.locator("#labels textarea").fill("red, blue")
    tab.get_by_role("button", name="Classify").click()
    playwright.expect(tab.locator(".coca-chart dt, .coca-chart .text")).not_to_have_count(0)
    assert {"red", "blue"} <= set(tab.locator(".coca-chart").inner_text().split())
    assert overflow(tab) == 0


def test_a_busy_page_says_so(visit, served, photos, monkeypatch):
    tab = visit(DESKTOP)
    choose(tab, photos / "00.png")
    monkeypatch.setattr(served.page._queue, "max_size", 0)
    tab.get_by_role("button", name="Write a caption").click()
    tab.get_by_text("This application is currently busy. Please try again.").wait_for()
