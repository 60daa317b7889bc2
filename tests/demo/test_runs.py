"""The demo without its page: what is compared, kept, queued, stopped and refused."""

import asyncio
import csv
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import blockcache
from blockcache import Plan
from blockcache.demo import desk, media, panels, shelf
from blockcache.demo.desk import Job
from blockcache.demo.runs import Workshop
from blockcache.demo.shelf import Tuned
from blockcache.demo.visits import Visits
from blockcache.engine.hooks import attachment_of
from blockcache.errors import BlockCacheError
from demo_toys import ASKED, PROMPT, STEPS, finished


@pytest.fixture
def visit(shop):
    return shop.visits.open()


def pixels(visit, pair, kind):
    with Image.open(visit.folder / pair.id / pair.shot.files[kind]) as image:
        return np.asarray(image)


# ---- comparing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"what": "fast"}, "fast"),
        (
            {"way": "recipe", "what": "taylor_seer", "knobs": "interval=3, site=stack"},
            blockcache.recipes.taylor_seer(interval=3, site="stack"),
        ),
    ],
)
def test_the_figures_are_the_librarys_own(shop, visit, compare, changes, what):
    pair = compare(visit, **changes)
    studio = shop.studio("tiny-image")
    call = studio.model.call | {"num_inference_steps": STEPS}
    own = blockcache.compare(studio.pipe, what, [PROMPT], [0], repeats=1, **call)
    assert pair.scores == own.accelerated.scores[0]
    assert pair.computed == own.computed_fraction
    assert pair.cache_bytes == own.cache_bytes
    assert pair.plan == own.plan
    assert Plan.load(visit.folder / pair.id / pair.plan_file) == own.plan
    plain = np.rint(own.baseline.pictures[0] * 255).astype(np.uint8)
    assert (pixels(visit, pair, "uncached_as_is") == plain).all()


def test_the_uncached_run_is_kept_by_its_settings(visit, compare, gate):
    first = compare(visit, prompt="a blue ring", what="fast")
    assert first.is_fresh
    before = gate.calls
    # It skips blocks, not the denoiser: one call for each step, whatever is skipped inside.
    how = {"way": "recipe", "what": "taylor_seer", "knobs": "interval=3, site=stack"}
    blocks = {"prompt": "a blue ring", **how}
    again = compare(visit, **blocks)
    assert gate.calls - before == STEPS and 0 < again.computed < 1
    assert not again.is_fresh and again.baseline_s == first.baseline_s
    other = compare(visit, **blocks, seed=1)
    assert other.is_fresh and gate.calls - before == 3 * STEPS
    anew = compare(visit, **blocks, is_fresh=True)
    assert anew.is_fresh and gate.calls - before == 5 * STEPS
    assert anew.scores == again.scores


def test_kept_runs_make_room(shop, visit, compare, monkeypatch):
    monkeypatch.setattr(shop._kept, "_most_bytes", 1)
    assert compare(visit, prompt="a green star").is_fresh
    assert not compare(visit, prompt="a green star").is_fresh
    compare(visit, prompt="a black star")
    assert compare(visit, prompt="a green star").is_fresh


def test_what_the_engine_says_is_passed_on(visit, compare):
    pair = compare(visit, way="recipe", what="first_block", knobs="threshold=0.0001")
    # A busy machine may be remarked on as well.
    remark = pair.story.remarks[0]
    assert "reused nothing" in remark and "would have reused about 30 %" in remark
    assert pair.scores.is_identical and pair.shot.is_same
    assert media.read(visit.folder / pair.id / pair.shot.files["difference"]).max() == 0


def test_a_plan_file_gives_the_same_picture_again(visit, compare):
    pair = compare(visit, what="fast")
    kept = visit.keep_plan(Tuned("mine", Plan.load(visit.folder / pair.id / pair.plan_file)))
    again = compare(visit, way="plan", what=kept.name)
    assert again.name == "mine" and again.scores == pair.scores
    assert (pixels(visit, again, "cached_as_is") == pixels(visit, pair, "cached_as_is")).all()


def test_previews_come_while_it_runs(shop, visit, gate):
    # Perhaps two calls to warm up, then the steps of the uncached run.
    gate.hold(after=6)
    job = shop.compare(visit, {**ASKED, "seed": 41})
    gate.wait()
    assert job.progress.doing == "uncached" and job.progress.total == STEPS
    assert panels.status(job, 0).count("Run 1 of 2: uncached, step ") == 2
    assert 0 < job.progress.done < STEPS
    assert job.progress.preview.startswith("data:image/png;base64,")
    gate.open()
    assert finished(job).state == "done"


# ---- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True])
def test_stop_within_a_step_leaves_everything_clean(shop, visit, compare, gate, accelerated):
    asked = {"prompt": "a pink heart", "what": "balanced"}
    expected = compare(visit, **asked)
    denoiser = shop.studio("tiny-image").pipe.transformer
    hooks = len(denoiser._forward_pre_hooks), len(denoiser._forward_hooks)
    gate.hold(after=3)
    job = shop.compare(visit, {**ASKED, **asked}, is_fresh=not accelerated)
    gate.wait()
    job.stop()
    held = gate.calls
    gate.open()
    assert finished(job).state == "stopped" and job.result is None
    assert gate.calls == held, "no other call of the denoiser after Stop"
    assert attachment_of(denoiser) is None
    assert (len(denoiser._forward_pre_hooks), len(denoiser._forward_hooks)) == hooks
    again = compare(visit, is_fresh=True, **asked)
    assert again.scores == expected.scores
    for kind in ("uncached_as_is", "cached_as_is"):
        assert (pixels(visit, again, kind) == pixels(visit, expected, kind)).all()


def test_a_run_that_nobody_looks_at_ends(shop, visit, gate, monkeypatch):
    gate.hold(after=2)
    job = shop.compare(visit, ASKED, is_fresh=True)
    gate.wait()
    monkeypatch.setattr(desk, "ABANDONED_S", 0.05)
    time.sleep(0.1)
    gate.open()
    while not job.is_over:
        time.sleep(0.01)
    assert job.state == "stopped"


def test_a_run_that_takes_too_long_ends_and_says_so():
    job = Job("compare", lambda job: time.sleep(0.05) or job.check(), minutes=1e-6)
    job.run()
    assert job.state == "failed" and "the limit here" in job.error


def test_an_unexpected_error_is_told_and_the_next_job_runs():
    place = desk.Desk()
    bad = Job("compare", lambda job: 1 / 0, minutes=1)
    good = Job("compare", lambda job: "fine", minutes=1)
    place.submit(bad)
    place.submit(good)
    assert finished(good).result == "fine"
    assert bad.error == "failed: ZeroDivisionError: division by zero"
    place.close()


# ---- waiting ------------------------------------------------------------------------------------


def test_one_at_a_time_in_the_order_they_came():
    place, order, go = desk.Desk(), [], threading.Event()

    def work(number):
        def run(job):
            assert go.wait(10)
            order.append(number)

        return run

    jobs = [Job("compare", work(number), minutes=1) for number in range(4)]
    for job in jobs:
        place.submit(job)
    while jobs[0].state == "waiting":
        time.sleep(0.001)
    assert [place.before(job) for job in jobs] == [0, 1, 2, 3]
    jobs[1].stop()
    assert [place.before(job) for job in jobs[2:]] == [1, 2]
    go.set()
    assert [finished(job).state for job in jobs] == ["done", "stopped", "done", "done"]
    assert order == [0, 2, 3]
    place.close()


def test_the_queue_has_an_end(monkeypatch):
    monkeypatch.setattr(desk, "MOST_WAITING", 1)
    place, go = desk.Desk(), threading.Event()
    first, second, third = (Job("compare", lambda job: go.wait(10), minutes=1) for _ in range(3))
    place.submit(first)
    while first.state == "waiting":
        time.sleep(0.001)
    place.submit(second)
    with pytest.raises(BlockCacheError, match="1 others wait already"):
        place.submit(third)
    go.set()
    finished(second)
    place.close()


def test_who_stopped_or_left_takes_no_place_in_the_queue(monkeypatch):
    monkeypatch.setattr(desk, "MOST_WAITING", 1)
    place, go = desk.Desk(), threading.Event()
    jobs = [Job("compare", lambda job: go.wait(10), minutes=1) for _ in range(4)]
    running, stopped, left, last = jobs
    place.submit(running)
    while running.state == "waiting":
        time.sleep(0.001)
    place.submit(stopped)
    stopped.stop()
    place.submit(left)
    left._seen -= desk.ABANDONED_S + 1
    place.submit(last)
    assert place.before(last) == 1
    go.set()
    finished(last)
    assert [job.state for job in jobs] == ["done", "stopped", "stopped", "done"]
    place.close()


def test_who_stops_while_waiting_may_ask_again_at_once(shop, visit, gate):
    gate.hold(after=1)
    other = shop.compare(shop.visits.open(), ASKED, is_fresh=True)
    gate.wait()
    job = shop.compare(visit, ASKED)
    assert visit.is_busy
    job.stop()
    assert job.state == "stopped" and not visit.is_busy
    again = shop.compare(visit, ASKED)
    assert shop.desk.before(again) == 1
    gate.open()
    assert [finished(one).state for one in (other, again)] == ["done", "done"]
    assert job.state == "stopped" and job.result is None


def test_a_visitor_has_one_run_at_a_time(shop, visit, gate):
    gate.hold(after=1)
    job = shop.compare(visit, ASKED, is_fresh=True)
    gate.wait()
    with pytest.raises(BlockCacheError, match="still under way"):
        shop.compare(visit, ASKED)
    job.stop()
    gate.open()
    finished(job)


# ---- refusing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "x" * 100_000}, "the prompt may have 1,000 characters, found 100,000"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"steps": -5}, "steps must lie between 1 and 200, found -5"),
        ({"steps": 10**9}, "steps must lie between 1 and 200, found 1e+09"),
        ({"steps": 2.5}, "steps must be a whole number, found 2.5"),
        ({"steps": float("nan")}, "steps must lie between"),
        ({"steps": [1]}, "steps must be a number"),
        ({"height": 100_000}, "height must lie between 16 and 1024"),
        ({"seed": -1}, "seed must lie between"),
        ({"guidance": "many"}, "guidance must be a number, found 'many'"),
        ({"way": "magic"}, "the way must be one of preset, target, recipe, plan"),
        ({"model": "someone/else"}, "the model 'someone/else' is not offered here"),
        ({"model": "/etc"}, "the model '/etc' is not offered here"),
    ],
)
def test_what_is_refused_at_once(shop, visit, changes, words):
    with pytest.raises(BlockCacheError) as caught:
        shop.compare(visit, {**ASKED, **changes})
    assert words in str(caught.value)
    assert not visit.is_busy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"what": "fastest"}, "unknown preset 'fastest' (known: quality, balanced, fast)"),
        ({"way": "recipe", "what": "nope"}, "unknown recipe 'nope'"),
        ({"way": "recipe", "what": "dp_cache"}, "recipe 'dp_cache' is calibrated"),
        ({"way": "recipe", "what": "fora", "knobs": "speed=3"}, "unexpected keyword"),
        ({"way": "recipe", "what": "fora", "knobs": "__import__('os')"}, "name=value"),
        ({"way": "recipe", "what": "fora", "knobs": "interval=open('x')"}, "name=value"),
        ({"way": "plan", "what": "../../secret"}, "no plan '../../secret' here"),
        ({"way": "target", "what": "near"}, "the quality must be a number of dB, found 'near'"),
        ({"height": 65}, "64"),
    ],
)
def test_what_the_library_refuses_is_told_in_its_words(shop, visit, changes, words):
    job = finished(shop.compare(visit, {**ASKED, **changes}))
    if job.state == "done":
        # Some pipelines round sizes; then the picture says so.
        assert job.result.shot.size == (64, 64)
        return
    assert job.state == "failed" and words in job.error


def test_any_model_only_where_that_is_allowed(tmp_path):
    shop = Workshop(["tiny-image"], tmp_path / "v", any_model=True)
    assert shop.allowed("someone/else") == "someone/else"
    shop.close()


# ---- tuned plans --------------------------------------------------------------------------------


def plan_like(pair, psnr_db, speed):
    reached = {"psnr_db_median": psnr_db, "speedup": speed}
    return Plan(pair.plan.recipe, pair.plan.fingerprint, pair.plan.total, reached)


def test_a_quality_picks_the_fastest_plan_that_reached_it(shop, compare):
    visit = shop.visits.open()
    pair = compare(visit)
    # Faster than any that come with the model.
    for name, psnr_db, speed in (("near", 85, 50), ("middle", 60, 60), ("far", 50, 70)):
        visit.keep_plan(Tuned(name, plan_like(pair, psnr_db, speed)))
    assert compare(visit, way="target", what=50).name == "far"
    assert compare(visit, way="target", what=51).name == "middle"
    assert compare(visit, way="target", what=85).name == "near"
    too_much = finished(shop.compare(visit, {**ASKED, "way": "target", "what": 86}))
    assert "no tuned plan for tiny-image reaches 86 dB; the nearest is near" in too_much.error


def test_without_tuned_plans_the_way_to_one_is_told():
    with pytest.raises(BlockCacheError, match="no plan has been tuned for m yet: open Tune"):
        shelf.pick([], 30.0, "m")


def test_plans_that_come_with_a_model_are_offered(shop, compare):
    """The embedded model has some; each promises what its name asks for."""
    plans = shop.plans_for(shop.visits.open(), "tiny-image")
    assert len(plans) >= 3
    for tuned in plans:
        assert tuned.psnr_db >= tuned.plan.reached["target"] and tuned.speed > 1
    fastest = max(plans, key=lambda tuned: tuned.speed)
    visit = shop.visits.open()
    assert compare(visit, way="target", what=20, steps=fastest.plan.total).name == fastest.name


def test_plans_for_other_models_are_not_offered(shop, compare, build_tiny):
    visit = shop.visits.open()
    other = build_tiny("sd3").pipe
    visit.keep_plan(Tuned("other", blockcache.plan_for(other, "fast", steps=4)))
    assert shop.plans_for(visit, "tiny-image") == list(shop.studio("tiny-image").plans)


@pytest.mark.slow
def test_tuning_gives_a_plan_that_can_be_taken(shop, compare):
    visit = shop.visits.open()
    prompts = [PROMPT, "a blue ring", "a green star"]
    job = shop.tune(visit, ASKED, prompts, {"psnr": 20.0}, minutes=5)
    assert finished(job).state == "done", job.error
    tuned = job.result
    assert tuned.name == "tuned 20 dB" and visit.last_tuned is tuned
    assert tuned.plan.reached["target"] == 20 and tuned.plan.total == STEPS
    assert Plan.load(visit.folder / visit.tuned_file) == tuned.plan
    pair = compare(visit, way="plan", what=tuned.name)
    assert pair.computed < 1


@pytest.mark.slow
def test_a_stopped_tuning_gives_the_best_so_far_or_nothing(shop, gate):
    visit = shop.visits.open()
    gate.hold(after=3)
    job = shop.tune(visit, ASKED, [PROMPT, "a blue ring"], {"psnr": 20.0}, minutes=5)
    gate.wait()
    job.stop()
    held = gate.calls
    gate.open()
    # Nothing had been found in the first run.
    assert finished(job).state == "stopped" and visit.last_tuned is None
    assert gate.calls == held
    job = shop.tune(visit, ASKED, [PROMPT, "a blue ring"], {"psnr": 20.0}, minutes=5)
    while not job.is_over and not job.progress.doing.startswith("searching"):
        job.look()
        time.sleep(0.001)
    job.stop()
    assert finished(job).state == "done"
    assert "NOT MET" in visit.last_tuned.plan.note
    assert attachment_of(shop.studio("tiny-image").pipe.transformer) is None


@pytest.mark.parametrize(
    ("prompts", "minutes", "words"),
    [
        ([], 1, "no prompts"),
        (["x"] * 65, 1, "at most 64 prompts"),
        (["x" * 1001], 1, "at most 64 prompts of 1,000 characters"),
        (["x"], 1000, "minutes must lie between 0 and 10"),
    ],
)
def test_what_a_tuning_refuses(shop, visit, prompts, minutes, words):
    with pytest.raises(BlockCacheError, match=words):
        shop.tune(visit, ASKED, prompts, {"psnr": 30.0}, minutes)


# ---- visits -------------------------------------------------------------------------------------


def test_visits_are_known_by_their_token_alone(tmp_path):
    visits = Visits(tmp_path / "visits")
    one, two = visits.open(), visits.open()
    assert visits.open(one.token) is one
    assert visits.open("../" + one.token) is not one and visits.open(None) is not one
    assert one.folder != two.folder
    # A link to a picture, which may be passed on, does not open the visit.
    assert one.token not in str(one.folder)
    visits.close()
    assert not (tmp_path / "visits").exists()


@pytest.fixture
def page(shop, tmp_path):
    """The page without a server, with a folder to browse."""
    pytest.importorskip("gradio", reason="the demo needs gradio")
    from blockcache.demo.ui import Page

    return Page(shop, [tmp_path])


@pytest.mark.parametrize(
    ("handler", "more"),
    [
        ("_open", ({},)),
        ("_stop", ()),
        ("_bring_back", (SimpleNamespace(id="gone"),)),
        ("_apply", ()),
        ("_choose_way", ("recipe", 35.0, "tiny-image")),
        ("_take_plan", (None,)),
        ("_show_item", (0, SimpleNamespace(id=0))),
    ],
)
def test_a_page_whose_visit_was_forgotten_learns_of_its_new_one(shop, page, handler, more):
    token = getattr(page, handler)("forgotten", *more)[page.token]
    assert token != "forgotten" and shop.visits.open(token).token == token


def test_every_event_that_may_open_a_visit_tells_the_browser(page):
    asking = [event for event in page.blocks.fns.values() if page.token in event.inputs]
    assert asking
    assert [event.fn for event in asking if page.token not in event.outputs] == []


def test_a_page_whose_visit_was_forgotten_can_stop_its_run(shop, page, gate):
    """Every press opened another visit; Stop looked for the run in one of its own."""
    asked = [*page._settings.values(), *page._whats.values(), page.fresh]
    values = {part: part.value for part in asked} | {page.steps: STEPS, page.fresh: True}

    async def generate_and_stop():
        token = "forgotten"
        async for updates in page._generate({**values, page.token: token}):
            token, said = updates.get(page.token, token), updates.get(page.status, "")
            if said:
                page._stop(token)
                gate.open()
        return token, said

    gate.hold(after=1)
    # In a thread of its own: the browser's tests leave a loop running in this one.
    with ThreadPoolExecutor(1) as thread:
        token, said = thread.submit(lambda: asyncio.run(generate_and_stop())).result()
    assert "Stopped. Nothing was kept of it." in said
    assert shop.visits.open(token).job.state == "stopped"


def test_the_table_is_no_formula(shop, compare):
    visit = shop.visits.open()
    compare(visit, prompt='=HYPERLINK("http://x")')
    with (visit.folder / visit.write_csv()).open(encoding="utf-8-sig") as file:
        (row,) = csv.DictReader(file)
    assert row["prompt"] == '\'=HYPERLINK("http://x")'
    assert float(row["psnr_db"]) == pytest.approx(visit.pairs[0].scores.psnr_db, abs=1e-3)
    assert float(row["speedup"]) == pytest.approx(visit.pairs[0].speedup, abs=1e-3)


# ---- video --------------------------------------------------------------------------------------


def test_a_video_becomes_players_and_one_side_by_side(video_shop):
    assert video_shop.defaults(video_shop.names[0]).is_video
    visit = video_shop.visits.open()
    asked = {"prompt": "a small red robot", "steps": 4, "way": "recipe", "what": "every"}
    job = finished(video_shop.compare(visit, asked))
    assert job.state == "done", job.error
    pair = job.result
    assert pair.shot.is_video and pair.scores.worst_frame_db is not None
    left = media.read(visit.folder / pair.id / pair.shot.files["uncached"])
    both = media.read(visit.folder / pair.id / pair.shot.files["both"])
    assert left.ndim == both.ndim == 4 and len(left) == len(both)
    assert both.shape[2] >= 2 * left.shape[2]
    poster = media.read(visit.folder / pair.id / pair.shot.files["uncached_poster"])
    # The first frame, but for what the film's compression changed.
    assert poster.shape == left[0].shape and abs(poster - left[0]).mean() < 0.03
    assert len(pair.story.maps) >= 1 and pair.story.step_kinds[0] == 0
