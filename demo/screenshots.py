"""Screenshots of every tab, wide and narrow, light and dark: for looking at, and for the README.

python -m blockcache.demo.screenshots --out outputs/screenshots [--browse DIR] [--model ...]

Needs Playwright and a Chromium; the one of the system is taken where there is one.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from blockcache.demo.app import serve
from blockcache.demo.browse import folders_in
from blockcache.demo.runs import Workshop

WIDTHS = (1280, 400)
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_TIMEOUT_MS = 600_000
_RUNS = ("fast", "quality", "balanced")
"""The last one is what the page then shows."""


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium.

    Raises:
        ImportError: Playwright is not installed.
        playwright.sync_api.Error: there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    # CHROMIUM names another one; without any, Playwright's own is looked for.
    named = os.environ.get("CHROMIUM")
    path = named or next(filter(None, map(shutil.which, _BROWSERS)), None)
    with sync_playwright() as playwright:
        # As root Chromium runs without its sandbox only.
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        opened = playwright.chromium.launch(executable_path=path, args=sandbox)
        try:
            yield opened
        finally:
            opened.close()


@click.command()
@click.option("--model", default="tiny-image", show_default=True)
@click.option("--browse", type=click.Path(path_type=Path), help="A folder for the tab Browse.")
@click.option("--prompt", help="The model's first example if nothing is said.")
@click.option("--steps", type=int, help="Sampler steps.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs/screenshots"), show_default=True
)
def main(model: str, browse: Path | None, prompt: str | None, steps: int | None, out: Path) -> None:
    """Run the page on a model and photograph it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        shop = Workshop([model], place / "visits")
        shop.studio(model)
        page, address = serve(shop, folders_in(browse) if browse else [], place)
        try:
            with browser() as chromium:
                _photograph(chromium, address, prompt, steps, out)
        finally:
            page.close()
            shop.close()


def _photograph(
    chromium: Any, address: str, prompt: str | None, steps: int | None, out: Path
) -> None:
    context = chromium.new_context(viewport={"width": WIDTHS[0], "height": 900})
    page = context.new_page()
    page.set_default_timeout(_TIMEOUT_MS)
    page.goto(address)
    page.locator("#bc-go:enabled").wait_for()
    _shoot(page, out / "opened-1280-light.png")
    if prompt is not None:
        page.get_by_label("Prompt", exact=True).fill(prompt)
    if steps is not None:
        page.get_by_label("Steps").fill(str(steps))
    began = time.perf_counter()
    for number, word in enumerate(_RUNS):
        page.get_by_label(word, exact=True).check()
        page.locator("#bc-go").click()
        if number == 0:
            page.locator(".bc-status img").first.wait_for()
            _shoot(page, out / "running-1280-light.png")
        page.locator(f'[data-query*="what={word}"]').wait_for()
        if number == 0:
            click.echo(f"first pair after {time.perf_counter() - began:.1f} s")
        page.locator("#bc-go:enabled").wait_for()
    for scheme in ("light", "dark"):
        for width in WIDTHS:
            _shoot_tabs(page, width, scheme, out)
    context.close()


def _shoot_tabs(page: Any, width: int, scheme: str, out: Path) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate(f"document.body.classList.toggle('dark', {str(scheme == 'dark').lower()})")
    # On a narrow page Gradio moves tabs that have no room into a menu.
    for name in ("Compare", "Why", "Explore", "Tune", "Browse"):
        tab = page.get_by_role("tab", name=name, exact=True)
        if not tab.count():
            continue
        tab.first.evaluate("element => element.click()")
        if name == "Browse" and page.locator(".bc-tile").count():
            page.locator(".bc-tile").first.click()
            page.locator("#bc-opened figure, #bc-opened img").first.wait_for()
        _shoot(page, out / f"{name.lower()}-{width}-{scheme}.png")


def _shoot(page: Any, path: Path) -> None:
    # What the mouse happens to point at would look different.
    page.mouse.move(1, 1)
    page.wait_for_timeout(700)
    page.screenshot(path=path, full_page=True)
    click.echo(path)


if __name__ == "__main__":
    main()
