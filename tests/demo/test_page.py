"""The page in a real browser, on the embedded image model.

Needs Playwright and a Chromium (Debian: `apt-get install chromium`); skipped without either.
"""

import json
import re
import urllib.error
import urllib.request
from urllib.parse import quote

import pytest

import blockcache
from blockcache.demo import browse
from blockcache.demo.app import serve
from blockcache.demo.runs import Workshop
from blockcache.pipelines import compare as writer
from demo_toys import PROMPT, STEPS

pytest.importorskip("gradio", reason="the demo needs gradio")
pytest.importorskip("playwright", reason="tests of the page need Playwright")

pytestmark = pytest.mark.slow

# What reaches beyond the window, outside of what has its own scroll bar.
BEYOND = """() => [...document.querySelectorAll("main *")]
  .filter((e) => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 1)
  .filter((e) => !e.closest(".bc-scroll"))
  .map((e) => e.outerHTML.slice(0, 120))"""
# A picture is visible before it is loaded.
LOADED_WIDTH = "element => element.decode().then(() => element.naturalWidth)"
HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script> ${window.hacked=1}"


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium."""
    from playwright.sync_api import Error

    from blockcache.demo.screenshots import browser

    try:
        with browser() as opened:
            yield opened
    except Error as error:
        if "launch" not in str(error) and "xecutable" not in str(error):
            raise
        pytest.skip("no Chromium to drive; Debian: apt-get install chromium")


@pytest.fixture(scope="session")
def folder(shop, tmp_path_factory):
    """What `blockcache compare` writes, of two prompts."""
    studio = shop.studio("tiny-image")
    call = studio.model.call | {"num_inference_steps": 4}
    found = blockcache.compare(studio.pipe, "fast", [PROMPT, HOSTILE], repeats=1, **call)
    place = tmp_path_factory.mktemp("browse") / "compared"
    writer.write(found, place)
    return place


@pytest.fixture(scope="session")
def address(shop, folder, tmp_path_factory):
    """The page, served from this process."""
    out = tmp_path_factory.getbasetemp() / "served"
    page, local = serve(shop, browse.folders_in(folder), shop.visits.open().folder.parents[1])
    yield local
    page.close()
    assert not out.exists()


@pytest.fixture(scope="session")
def seats(chromium):
    """Where visitors sit: one has nothing of the other's, and what was fetched once is kept."""
    contexts = [chromium.new_context() for _ in range(2)]
    yield contexts
    for context in contexts:
        context.close()


def watched(page, at, wrong):
    """The page, which notes in `wrong` whatever goes wrong on it."""
    page.set_default_timeout(120_000)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    page.on("request", lambda asked: _is_foreign(asked.url, at) and wrong.append(asked.url))
    return page


@pytest.fixture
def visitor(seats, address):
    """`visitor("?seed=3", width=400)`: a page of a new visitor, which complains of every error."""
    pages, wrong = [], []

    def open_page(query="", width=1280, at=address, color_scheme="light"):
        page = seats[len(pages)].new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=color_scheme)
        watched(page, at, wrong).goto(at + query)
        return page

    open_page.wrong = wrong
    yield open_page
    for page in pages:
        # The next one in this seat is somebody else.
        page.evaluate("localStorage.clear()")
        page.close()
    assert wrong == []


@pytest.fixture(scope="module")
def made(chromium, address):
    """A page on which somebody has compared a hostile prompt; to be looked at, not changed."""
    wrong = []
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = watched(context.new_page(), address, wrong)
    page.goto(address)
    generate(page, prompt=HOSTILE)
    yield page
    context.close()
    assert wrong == []


def _is_foreign(url, address):
    return not url.startswith((address, "data:", "blob:"))


def ready(page):
    """The page when it can be used."""
    page.locator("#bc-go:enabled").wait_for()
    return page


def generate(page, preset="balanced", steps=STEPS, prompt=PROMPT):
    """Fill the form in, press the button, and wait for the pair."""
    ready(page)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Steps").fill(str(steps))
    page.get_by_label(preset, exact=True).check()
    press(page, f'[data-query*="what={preset}"]')


def press(page, expected=".bc-result"):
    page.locator("#bc-go").click()
    page.locator(f"#bc-result {expected}").wait_for()
    ready(page)


def figure(page, name, within="#bc-result"):
    """A number of the line of numbers."""
    cell = page.locator(f"{within} dl > div", has=page.get_by_text(name, exact=True))
    return float(re.match(r"[\d.]+", cell.locator("dd").inner_text())[0])


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def of_library(shop, what, steps=STEPS, prompt=PROMPT, seed=0):
    studio = shop.studio("tiny-image")
    call = studio.model.call | {"num_inference_steps": steps}
    found = blockcache.compare(studio.pipe, what, [prompt], [seed], repeats=1, **call)
    return found.accelerated.scores[0]


# ---- comparing ----------------------------------------------------------------------------------


def test_generate_both_and_move_the_border(shop, visitor):
    page = visitor()
    generate(page)
    assert figure(page, "PSNR") == pytest.approx(of_library(shop, "balanced").psnr_db, abs=0.051)
    times = page.locator("#bc-result dl small").first.inner_text()
    before, after = map(float, re.fullmatch(r"([\d.]+) s to ([\d.]+) s", times).groups())
    assert before > 0 and after > 0
    images = page.locator(".bc-slider img")
    assert images.count() == 2
    for image, start in zip(images.all(), ("Uncached: ", "With balanced: "), strict=True):
        assert image.get_attribute("alt") == start + PROMPT
        assert image.evaluate(LOADED_WIDTH) == 768
    border = page.get_by_label("Border between the uncached picture")
    border.focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    assert border.input_value() == "40"
    clip = images.nth(1).evaluate("element => getComputedStyle(element).clipPath")
    assert clip.endswith("40%)")
    box = page.locator(".bc-slider").bounding_box()
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    assert float(border.input_value()) == pytest.approx(80, abs=2)


def test_why_tells_the_numbers_on_hovering(made):
    page = made
    tab(page, "Why")
    cells = page.locator('svg[aria-label^="Step by block"] rect')
    assert cells.count() == 14 * STEPS
    cells.first.hover()
    tip = page.locator("#bc-tip")
    assert tip.inner_text() == "step 0, block 0: computed"
    page.locator('svg[aria-label^="Time by part"] rect').nth(1).hover()
    assert re.fullmatch(r"uncached, denoiser, computed steps: [\d.]+ s \(\d+%\)", tip.inner_text())
    page.get_by_text("All numbers by step").click()
    assert page.locator(".bc-numbers-by-step tbody tr").count() == STEPS


def test_explore_brings_an_old_pair_back(visitor):
    page = visitor()
    generate(page, "balanced")
    first = figure(page, "PSNR")
    generate(page, "fast")
    second = figure(page, "PSNR")
    assert first > second
    tab(page, "Explore")
    dots = page.locator("g[data-run]")
    assert dots.count() == 2 and page.locator(".bc-runs tbody tr").count() == 2
    # By keyboard: the dot that is not the current one.
    page.locator("g[data-run]:not(.bc-current)").focus()
    page.keyboard.press("Enter")
    page.locator('#bc-result [data-query*="what=balanced"]').wait_for()
    assert figure(page, "PSNR") == first
    assert page.get_by_label("balanced", exact=True).is_checked()
    tab(page, "Explore")
    page.locator(".bc-runs button", has_text="Show").first.click()
    page.locator('#bc-result [data-query*="what=fast"]').wait_for()
    assert figure(page, "PSNR") == second
    tab(page, "Explore")
    with page.expect_download() as waiting:
        page.get_by_text("Table as CSV").click()
    lines = waiting.value.path().read_text(encoding="utf-8-sig").splitlines()
    assert len(lines) == 3 and lines[0].startswith("plan,settings,model")


def test_a_plan_is_downloaded_and_applied(visitor, tmp_path):
    page = visitor()
    generate(page, "fast")
    expected = figure(page, "PSNR")
    with page.expect_download() as waiting:
        page.locator(".bc-result a", has_text="Plan").click()
    file = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(file)
    assert file.name == "fast-plan.json"
    other = ready(visitor())
    other.get_by_label("Prompt", exact=True).fill(PROMPT)
    other.get_by_label("Steps").fill(str(STEPS))
    other.get_by_text("Plan file", exact=True).click()
    other.locator("#bc-upload").wait_for()
    other.locator('input[type="file"]').set_input_files(file)
    other.wait_for_function("document.querySelector('#bc-plan input')?.value.includes('fast')")
    press(other, '[data-query*="way=plan"]')
    assert figure(other, "PSNR") == expected
    bad = tmp_path / "bad.json"
    bad.write_text('{"a": 1}')
    other.locator('input[type="file"]').set_input_files(bad)
    alert = other.locator("#bc-status [role=alert]")
    assert alert.inner_text() == (
        "bad.json: not a blockcache plan: the key 'blockcache_plan' is missing"
    )


def test_the_link_restores_the_settings(visitor):
    page = visitor()
    generate(page, "quality", steps=5, prompt="a blue ring & <b>")
    page.wait_for_url("**what=quality**")
    again = ready(visitor(page.url.partition("/?")[2].join(["?", ""])))
    assert again.get_by_label("Prompt", exact=True).input_value() == "a blue ring & <b>"
    assert again.get_by_label("Steps").input_value() == "5"
    assert again.get_by_label("quality", exact=True).is_checked()


# ---- in mid-run ---------------------------------------------------------------------------------


def test_stop_and_generate_again(shop, visitor, gate):
    page = visitor()
    ready(page)
    page.get_by_label("Prompt", exact=True).fill("a green star")
    page.get_by_label("Steps").fill(str(STEPS))
    gate.hold(after=4)
    page.locator("#bc-go").click()
    gate.wait()
    page.get_by_role("status").get_by_text("step").wait_for()
    assert not page.locator("#bc-go").is_enabled()
    page.locator("#bc-stop").click()
    shop_visit = next(v for v in shop.visits._visits.values() if v.is_busy)
    while not shop_visit.job.is_stopped:
        page.wait_for_timeout(10)
    held = gate.calls
    gate.open()
    page.get_by_text("Stopped. Nothing was kept of it.").wait_for()
    assert gate.calls == held
    generate(page, "balanced", prompt="a green star")
    expected = of_library(shop, "balanced", prompt="a green star")
    assert figure(page, "PSNR") == pytest.approx(expected.psnr_db, abs=0.051)
    assert figure(page, "SSIM") == pytest.approx(expected.ssim, abs=6e-5)


def test_a_reload_in_mid_run_goes_on_watching(visitor, gate):
    page = visitor()
    generate(page, "fast")
    gate.hold(after=3)
    page.get_by_label("quality", exact=True).check()
    page.locator("#bc-go").click()
    gate.wait()
    page.reload()
    page.get_by_role("status").get_by_text("step").wait_for()
    # What was there before the reload is there again.
    page.locator('#bc-result [data-query*="what=fast"]').wait_for()
    gate.open()
    page.locator('#bc-result [data-query*="what=quality"]').wait_for()
    tab(page, "Explore")
    assert page.locator("g[data-run]").count() == 2
    # Gradio's own remarks on requests that the reload has cut off.
    cut_off = ("AbortError", "Connection errored out")
    visitor.wrong[:] = [w for w in visitor.wrong if not any(part in w for part in cut_off)]


def test_two_visitors_wait_for_each_other(visitor, gate):
    first, second = ready(visitor()), ready(visitor())
    for page in (first, second):
        page.get_by_label("Steps").fill(str(STEPS))
    gate.hold(after=3)
    first.locator("#bc-go").click()
    gate.wait()
    second.locator("#bc-go").click()
    second.get_by_text("In the queue: 1 run is before yours").wait_for()
    gate.open()
    addresses = []
    for page in (first, second):
        page.locator("#bc-result .bc-result").wait_for()
        addresses.append(page.locator(".bc-slider img").first.get_attribute("src"))
        tab(page, "Explore")
        assert page.locator("g[data-run]").count() == 1
    # .../visit/run/picture.png
    ours, theirs = (address.split("/")[-3] for address in addresses)
    assert re.fullmatch("[0-9a-f]{32}", ours) and ours != theirs


# ---- hostile ------------------------------------------------------------------------------------


def test_html_in_a_prompt_is_text(made):
    page = made
    for name in ("Why", "Explore", "Compare"):
        tab(page, name)
        page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert "<img src=x onerror=window.hacked=1>" in page.locator(".bc-said").first.inner_text()
    assert page.locator('img[src="x"]').count() == 0


def send(address, shop_page_values, fn_index):
    body = {"data": shop_page_values, "fn_index": fn_index, "session_hash": "abcdefgh123"}
    request = urllib.request.Request(
        f"{address}gradio_api/queue/join",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200
    events = urllib.request.urlopen(
        f"{address}gradio_api/queue/data?session_hash=abcdefgh123", timeout=60
    )
    said = ""
    with events:
        for line in events:
            said += line.decode()
            if "process_completed" in said:
                return said
    return said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Prompt": "x" * 100_000}, "the prompt may have 1,000 characters, found 100,000"),
        ({"Steps": -5}, "steps must lie between 1 and 200, found -5"),
        ({"Steps": 10**7}, "steps must lie between 1 and 200, found 1e+07"),
        ({"Choose the plan by": "magic"}, "magic"),
    ],
)
def test_what_no_form_would_send_is_refused(address, changes, words):
    """Past the page's own limits: straight to the server."""
    with urllib.request.urlopen(f"{address}config", timeout=30) as answer:
        config = json.load(answer)
    parts = {part["id"]: part for part in config["components"]}
    go = next(i for i, part in parts.items() if part["props"].get("elem_id") == "bc-go")
    event = next(d for d in config["dependencies"] if [go, "click"] in d["targets"])
    values = []
    for number in event["inputs"]:
        props = parts[number]["props"]
        values.append(changes.get(props.get("label"), props.get("value")))
    assert words in send(address, values, event["id"])


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "pyproject.toml",
        "blockcache/__init__.py",
        "demo/app.py",
        "{visits}/../../../../../../etc/passwd",
        "{visits}",
        "http://127.0.0.1:{port}/config",
        "http:/127.0.0.1:{port}/config",
        "file:///etc/passwd",
    ],
)
def test_only_the_folder_of_the_visits_is_served(shop, address, path):
    visits = shop.visits.open().folder.parent
    port = address.rstrip("/").rpartition(":")[2]
    wanted = path.format(visits=visits, port=port)
    for route in ("gradio_api/file=", "file="):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}{route}{wanted}", timeout=30)
        assert refused.value.code in (403, 404, 405)


def test_what_lies_in_a_visit_is_served_and_nothing_else(shop, address, tmp_path):
    visit = shop.visits.open()
    (visit.folder / "a.png").write_bytes(b"picture")
    (tmp_path / "secret").write_text("secret")
    (visit.folder / "link.png").symlink_to(tmp_path / "secret")
    route = f"{address}gradio_api/file="
    with urllib.request.urlopen(route + quote(str(visit.folder / "a.png"))) as answer:
        assert answer.read() == b"picture"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(route + quote(str(visit.folder / "link.png")))


# ---- other modes --------------------------------------------------------------------------------


def test_browse_a_folder(visitor, folder):
    page = visitor()
    tab(page, "Browse")
    tiles = page.locator(".bc-tile")
    tiles.first.wait_for()
    assert tiles.count() == 2
    assert page.evaluate("window.hacked") is None
    tiles.first.click()
    images = page.locator("#bc-opened .bc-slider img")
    images.first.wait_for()
    assert images.first.get_attribute("alt") == f"Uncached: {PROMPT}"
    assert images.first.evaluate(LOADED_WIDTH) == 768
    row = json.loads((folder / "compare.json").read_text())["items"][0]
    assert figure(page, "PSNR", "#bc-opened") == pytest.approx(row["psnr_db"], abs=0.051)
    assert figure(page, "Computed", "#bc-opened") == pytest.approx(
        100 * row["computed_fraction"], 1
    )


def test_browsing_alone_needs_no_model(chromium, folder, tmp_path):
    shop = Workshop([], tmp_path / "visits")
    page, local = serve(shop, [folder], tmp_path)
    context = chromium.new_context()
    try:
        browser_page = context.new_page()
        browser_page.goto(local)
        browser_page.locator(".bc-tile").first.wait_for()
        assert browser_page.get_by_role("tab").all_inner_texts() == ["Browse"]
        assert "no model" in browser_page.locator(".bc-mode").inner_text()
    finally:
        context.close()
        page.close()
        shop.close()


def test_videos_play_together(visitor, video_shop):
    served, local = serve(video_shop, [], video_shop.visits.open().folder.parents[1])
    try:
        page = ready(visitor(at=local))
        page.get_by_label("Prompt", exact=True).fill("a small red robot")
        page.get_by_label("Steps").fill("3")
        press(page, ".bc-players")
        videos = page.locator(".bc-screens video")
        assert videos.count() == 2
        for video in videos.all():
            poster = "v => fetch(v.poster).then(r => r.headers.get('content-type'))"
            assert video.evaluate(poster) == "image/png"
            video.evaluate("v => v.readyState >= 1 || new Promise(r => v.onloadedmetadata = r)")
            assert video.evaluate("v => v.duration") > 0
        page.get_by_role("button", name="Play both").click()
        page.wait_for_function(
            "[...document.querySelectorAll('.bc-screens video')].every(v => v.currentTime > 0)"
        )
        page.get_by_role("button", name="Pause both").click()
        page.get_by_label("Position in both videos").evaluate(
            "e => { e.value = 0; e.dispatchEvent(new Event('input', { bubbles: true })); }"
        )
        times = [video.evaluate("v => v.currentTime") for video in videos.all()]
        assert times == [0, 0]
        page.get_by_text("Both in one video").click()
        both = page.locator(".bc-players details video")
        assert both.get_attribute("src").endswith("side-by-side.mp4")
    finally:
        served.close()


def test_it_fits_a_narrow_screen(visitor, made):
    page = visitor(width=400, color_scheme="dark")
    generate(page, "fast")
    dark = "document.body.classList.contains('dark')"
    assert page.evaluate(dark) and not made.evaluate(dark)
    for _ in ("dark", "light"):
        for name in ("Compare", "Why", "Explore", "Tune"):
            page.get_by_role("tab", name=name, exact=True).first.evaluate("e => e.click()")
            page.wait_for_timeout(100)
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
            # What does not fit is neither scrolled to nor seen.
            assert page.evaluate(BEYOND) == [], name
        page.evaluate("document.body.classList.remove('dark')")


def test_everything_has_a_name(made):
    """Every field, button and picture says what it is to those who do not see it."""
    page = made
    nameless = """() => [...document.querySelectorAll("input, textarea, button, img, video")]
      .filter((e) => e.offsetParent && e.type !== "file")
      .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.alt
        || e.title || e.innerText?.trim() || e.closest("label")
        || e.getAttribute("aria-labelledby")))
      .map((e) => e.outerHTML.slice(0, 120))"""
    for name in ("Compare", "Why", "Explore", "Tune"):
        tab(page, name)
        page.wait_for_timeout(100)
        assert page.evaluate(nameless) == [], name
