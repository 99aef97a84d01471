"""Uses the page as its readers do, in headless Chromium; prints as JSON what there was to see."""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from playwright.sync_api import Page, sync_playwright

PATIENCE = 120_000  # milliseconds
MARKUP = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script> What is that?"
# A chapter of the Python reference that every Python has.
LONG = f"{topics['customization'][:2600]}\n\nWhat is this text about?"
# Collects the lengths of the last reply as it grows, what the first layer is said to hold meanwhile, and
# what the browser keeps the page from.
WATCHING = """
window.lengths = []; window.violations = []; window.plans = [];
document.addEventListener("securitypolicyviolation", (each) => violations.push(each.violatedDirective));
new MutationObserver(() => {
  const reply = [...document.querySelectorAll("#log .assistant")].at(-1);
  if (reply) lengths.push(reply.textContent.length);
  const plan = document.querySelector("#pyramid g:has(.away) title");
  if (plan) plans.push(plan.textContent);
}).observe(document, { childList: true, subtree: true, characterData: true });
"""
GROUND = "getComputedStyle(document.body).backgroundColor"
WIDTHS = "rows => rows.map(each => parseFloat(each.getAttribute('width')))"
LINES = "lines => lines.map(each => [each.closest('figure').dataset.chart, each.getAttribute('d')])"
DRAWN = "() => document.querySelector('[data-chart=queue] .line')?.getAttribute('d').split('L').length > 5"


def send(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def ask(page: Page, text: str) -> str:
    """Sends a message; returns the whole reply."""
    send(page, text)
    page.wait_for_selector("#stop:not([hidden])")
    page.wait_for_selector("#send:not([hidden])")
    return page.locator("#log .assistant").last.inner_text()


def talk(page: Page) -> dict[str, Any]:
    """A reply to a long message, and one to a message that looks like a page."""
    policies = page.evaluate("fetch('v1/cluster').then(each => each.json()).then(each => each.policies)")
    offered = page.locator("#policy option").all_inner_texts()
    page.fill("#max-tokens", "48")
    page.select_option("#policy", "pyramid/evict")
    page.fill("#kv-keep", "0.45")
    reply = ask(page, LONG)
    told = {
        "policies": policies,
        "offered": offered,
        "reply": reply,
        "lengths": page.evaluate("lengths"),
        "plans": page.evaluate("plans"),
        "foot": page.locator("#pyramid title").first.text_content(),
        "rows": page.locator("#pyramid g").count(),
        "device": page.eval_on_selector_all("#pyramid .device", WIDTHS),
        "receipt": page.inner_text("#receipt").split("\n"),
    }
    ask(page, MARKUP)
    return told | {
        "said": page.locator("#log .user").last.inner_text(),
        "elements": page.locator("#log :not(p)").count(),
        "title": page.title(),
        "reused": page.inner_text("#receipt").split("\n")[7],
    }


def look(page: Page, out: Path) -> dict[str, Any]:
    """The charts, and the page in light, in the dark, and where it is narrow."""
    page.wait_for_function(DRAWN)
    told = {"lines": page.eval_on_selector_all("figure .line", LINES), "light": page.evaluate(GROUND)}
    page.screenshot(path=out / "light.png")
    page.emulate_media(color_scheme="dark")
    told["dark"] = page.evaluate(GROUND)
    page.screenshot(path=out / "dark.png")
    size = page.viewport_size
    page.set_viewport_size({"width": 390, "height": 800})
    told["overflow"] = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    page.screenshot(path=out / "narrow.png", full_page=True)
    page.set_viewport_size(size)
    page.emulate_media(color_scheme="light")
    return told


def refuse(page: Page) -> dict[str, Any]:
    """What the page says of a request that is refused, and of one that is stopped."""
    page.select_option("#policy", "full")
    send(page, "Is that allowed?")
    problem = page.wait_for_selector("#log .problem").inner_text()
    told = {"problem": problem, "again": page.input_value("#message")}
    page.select_option("#policy", "")
    page.fill("#kv-keep", "")
    page.fill("#max-tokens", "4000")
    send(page, "Count from one to a thousand.")
    page.wait_for_selector("#log .assistant.coming:not(:empty)")
    page.click("#stop")
    told["note"] = page.wait_for_selector("#log .note").inner_text()
    page.wait_for_selector("[data-chart=queue] .key:has-text('running 0')")
    return told


def outlive(page: Page) -> dict[str, Any]:
    """The router goes, and comes back."""
    before = page.inner_text("#log")
    print("restart", flush=True)
    page.wait_for_selector("#link.bad")
    told = {"away": page.inner_text("#link")}
    page.wait_for_selector("#link.good")
    told["kept"] = page.inner_text("#log") == before
    page.fill("#max-tokens", "16")
    told["second"] = ask(page, "What is a dog?")
    with page.expect_response(lambda answer: answer.request.method == "DELETE") as deleted:
        page.click("#renew")
    return told | {"ended": deleted.value.status, "left": page.inner_text("#log")}


def chat(page: Page, out: Path) -> dict[str, Any]:
    """All that can be done without a token; "restart" asks for a router to be killed."""
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.wait_for_selector("#link.good")
    told = talk(page) | look(page, out)
    # Refusals and broken connections are the browser's own to complain of.
    told["errors"] = list(errors)
    told |= refuse(page) | outlive(page)
    violations = page.evaluate("violations")
    page.goto(page.url + "docs")
    page.click("text=POST /v1/chat/completions")
    told["documented"] = page.locator("details[open] td code").all_inner_texts()
    page.screenshot(path=out / "docs.png")
    return told | {"violations": violations + page.evaluate("violations")}


def token(page: Page, out: Path) -> dict[str, Any]:
    """A token that is asked for, mistaken, given, and kept."""
    page.fill("#token", "guess")
    page.press("#token", "Enter")
    problem = page.wait_for_selector("#token-problem:has-text('not known')").inner_text()
    page.fill("#token", "a-token")
    page.press("#token", "Enter")
    page.wait_for_selector("#link.good")
    told = {"problem": problem, "asks": page.is_visible("#token-form")}
    page.reload()
    page.wait_for_selector("#link.good")
    return told | {"asks_again": page.is_visible("#token-form")}


def main() -> None:
    browser, out, what, url = sys.argv[1:]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser)
        page = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        page.add_init_script(WATCHING)
        page.goto(url)
        told = {"chat": chat, "token": token}[what](page, Path(out))
        chromium.close()
    print(json.dumps(told))


main()
