"""The page in a browser: coloured text, live figures, the policy; by keyboard alone, light and dark, at any width."""

import json
import os
import shutil

import pytest

from tests.util.servers import held_engine, serving, wait_until

pytestmark = pytest.mark.browser

CONTRASTS = """
() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const linear = (c) => (c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = channels(colour).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
  };
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility() || element.disabled) continue;
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && !element.value) continue;
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(background(element))];
    found[`${element.tagName}#${element.id}.${element.className}`] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    names = (os.environ.get("RRT_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    path = next((found for found in map(shutil.which, names) if found), None)
    if path is None:
        pytest.fail(
            "RRT_CHROMIUM: found no Chromium; set it to one, or install one: apt install chromium", pytrace=False
        )
    with sync_playwright() as playwright:
        # The sandbox does not run as root, as CI often does.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, server):
    """Open the page; at the end nothing may have gone wrong in it, or been asked of another server."""
    pages, faults = [], []

    def open_one(**options):
        page = chromium.new_page(**options)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith(server.url) or faults.append(request.url))
        page.goto(server.url)
        pages.append(page)
        return page

    yield open_one
    for page in pages:
        page.close()
    assert not faults


def expect(locator):
    from playwright.sync_api import expect as playwright_expect

    return playwright_expect(locator)


def fill(page, prompt="import os", tokens="12"):
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("New tokens").fill(tokens)


def test_text_comes_coloured_by_the_loop_that_its_tokens_stood_from(open_page, server):
    page = open_page()
    expect(page.get_by_role("heading", level=1)).to_have_text("tiny")
    expect(page.locator("#policy-state")).to_have_text("in force: verify")
    fill(page)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#summary")).to_contain_text("end: length")
    choice = server.complete(prompt="import os", max_tokens=12, temperature=0, seed=0).json["choices"][0]
    assert page.locator("#output").text_content() == choice["text"]
    loops = {int(loop) for loop in page.locator("#output span").evaluate_all("all => all.map(one => one.dataset.loop)")}
    assert loops and loops <= set(choice["rrt"]["agreed_loops"])
    for loop in loops:
        colours = page.locator(f"#output .loop-{loop}").evaluate_all(
            "all => all.map(one => getComputedStyle(one).color)"
        )
        assert set(colours) == {page.locator(f".bar.loop-{loop}").evaluate("one => getComputedStyle(one).color")}
    mean = sum(loop + 1 for loop in choice["rrt"]["agreed_loops"]) / 12
    expect(page.locator("#summary")).to_contain_text("12 tokens in ")
    expect(page.locator("#summary")).to_contain_text(f"{mean:.2f} loops a token")
    # The live figures.
    expect(page.locator("#histogram .bar")).to_have_count(2)
    expect(page.locator("#rate")).not_to_have_text("0.0")
    cache = server.service.worker.decoder.cache
    # Pages of the text are kept.
    expect(page.locator("#pages")).to_have_text(
        f"{cache.num_used_pages} of {cache.num_used_pages + cache.num_free_pages}"
    )
    assert page.locator("#histogram .fill").evaluate_all("all => Math.max(...all.map(one => one.offsetWidth))") > 10


def test_a_chat_and_an_error_are_shown(open_page):
    page = open_page()
    fill(page, "hello")
    page.get_by_label("Answer as a chat").check()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#summary")).to_contain_text("12 tokens")
    page.get_by_label("New tokens").fill("9999")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("9999 new ones need")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_a_models_text_is_never_html(open_page):
    page = open_page()
    text = "<img src=x onerror=document.title='bad'><script>document.title='bad'</script>&amp;"
    piece = {"text": text, "finish_reason": "length", "rrt": {"exit_loops": [1], "agreed_loops": [0]}}
    body = f"data: {json.dumps({'choices': [piece]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    fill(page)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#output")).to_have_text(text)
    assert page.locator("#output img, #output script").count() == 0 and page.title() == "tiny"


def test_stop_ends_the_request_at_the_server(open_page, server):
    page = open_page()
    fill(page, tokens="400")
    with held_engine(server) as gate:
        page.get_by_role("button", name="Generate").click()
        wait_until(lambda: server.service.worker.num_open == 1)
        page.get_by_role("button", name="Stop").click()
        wait_until(lambda: server.service.worker.num_open == 0)
        gate.set()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_all_is_done_by_keyboard_alone(open_page, server):
    page = open_page()
    expect(page.locator("#policy-state")).to_have_text("in force: verify")
    press, focused = page.keyboard.press, "document.activeElement.id || document.activeElement.textContent.trim()"
    order = []
    for _ in range(12):
        press("Tab")
        order.append(page.evaluate(focused))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", order
        if order[-1] == "API key":
            break
    assert order == [
        "prompt", "max-tokens", "temperature", "seed", "chat", "send", "output", "policy", "Apply", "API key"
    ]  # fmt: skip
    page.locator("#prompt").focus()
    page.keyboard.type("import os")
    press("Control+Enter")
    expect(page.locator("#summary")).to_contain_text("end:")
    page.locator("#policy").focus()
    page.keyboard.type("static")
    expect(page.get_by_label("Value")).to_have_value("0")
    press("Tab")
    press("Enter")
    expect(page.locator("#policy-state")).to_have_text("in force: static:0")
    assert server.get("/rrt/stats").json["policy"] == "static:0"
    page.locator("#policy").focus()
    page.keyboard.type("verify")
    expect(page.get_by_label("Value")).to_be_hidden()
    press("Tab")
    press("Space")
    expect(page.locator("#policy-state")).to_have_text("in force: verify")


def test_a_policy_that_the_model_has_not_is_told(open_page):
    page = open_page()
    expect(page.locator("#policy-state")).to_have_text("in force: verify")
    page.get_by_label("Policy").select_option("static")
    page.get_by_label("Value").fill("7")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("#policy-state")).to_have_text("static exit: found loop 7; expected one in [0, 2)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1400])
def test_light_and_dark_narrow_and_wide(open_page, scheme, width):
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    fill(page, "x" * 300, "30")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#summary")).to_contain_text("end:")
    expect(page.locator("#histogram .bar")).to_have_count(2)
    # Even with names longer than the page is wide.
    page.locator("#model").evaluate("one => (one.textContent = 'm'.repeat(300))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 15 and min(contrasts.values()) >= 4.5, contrasts
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    side_by_side = page.evaluate(
        "document.querySelector('aside').getBoundingClientRect().top < document.querySelector('#output').offsetTop"
    )
    assert side_by_side == (width > 768)


def test_every_control_has_a_name(open_page):
    page = open_page()
    names = page.locator("input, select, textarea, button").evaluate_all(
        "all => all.map(one => one.tagName === 'BUTTON' ? one.textContent.trim() : one.labels[0]?.textContent.trim())"
    )
    assert len(names) == 11 and all(names)


def test_the_key_is_asked_for_and_sent(chromium, checkpoint):
    with serving(checkpoint, api_key="secret") as served:
        page = chromium.new_page()
        page.goto(served.url)
        expect(page.locator("#state")).to_contain_text("API key: found none")
        page.get_by_text("API key", exact=True).click()
        page.get_by_label("Key, if the server asks for one").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_text("2 loops")
        fill(page)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#summary")).to_contain_text("12 tokens")
        page.close()
