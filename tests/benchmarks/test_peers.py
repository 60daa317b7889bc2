"""The race itself: that everybody really runs, side by side, and that nothing measured is lost."""

import contextlib
import itertools
import json
import time

import numpy as np
import pytest
import torch

from benchmarks.peers import diffusers_caches, ours, pages
from benchmarks.peers.figures import figures
from benchmarks.peers.ground import FEWER, OURS, PEERS, Contender, Ground, Impossible, own
from benchmarks.peers.track import BETWEEN, Log, OutOfTime, Track, has_effect, psnr_db, summaries
from blockcache.pipelines import models
from blockcache.tuning.stage import Render

STEPS = 12


@pytest.fixture(scope="module")
def ground():
    model = models.find("tiny-image")
    return Ground(model, models.load(model, torch.device("cpu")), STEPS, {}, prompts=2)


def pick(contenders, family, setting=""):
    return next(c for c in contenders if family in c.family and setting in c.setting)


# A pipeline for everybody.


def test_no_prompt_and_no_seed_of_the_race_is_used_for_anything_else(ground):
    others = {*ground.tuning, *ground.sweep, *ground.calibration}
    assert not {prompt for prompt, _ in ground.race} & {prompt for prompt, _ in others}
    assert not {seed for _, seed in ground.race} & {seed for _, seed in others}
    assert len(ground.race) == 2


def test_ones_own_pipeline_shares_weights_and_nothing_else(ground):
    first, second = ground.fresh(), ground.fresh()
    assert type(first) is not type(second)
    assert type(first).__name__ == "FluxPipeline"
    assert first.transformer is not second.transformer
    assert first.scheduler is not second.scheduler
    blocks = zip(first.transformer.modules(), second.transformer.modules(), strict=True)
    assert all(a is not b for a, b in blocks)
    pairs = zip(first.transformer.parameters(), second.transformer.parameters(), strict=True)
    assert all(a is b for a, b in pairs)


def test_a_copy_of_a_pipeline_gives_the_same_picture(ground):
    item = ground.sweep[0]
    expected = ground.plain.render(item).picture
    assert np.array_equal(ground.lane(own(ground.fresh())).render(item).picture, expected)


# Every contender does what its name says.

DIFFUSERS = [
    ("FirstBlockCache", "threshold 0.3"),
    ("TaylorSeer", "attention, interval 3"),
    ("TaylorSeer", "blocks, interval 3, order 1"),
    ("TaylorSeer", "lite, interval 3, order 1, warm-up 3"),
    ("MagCache", "threshold 0.5, streak 3"),
    ("SeaCache", "threshold 0.8, order 1"),
    ("FasterCache", "attention, interval 3, below 999"),
    ("Pyramid", "self 3, cross 3, timesteps 0 to 999"),
]
CACHE_DIT = [
    ("DBCache", "F1 B0 W4 R0.5"),
    ("DBCache + TaylorSeer", "F1 B0 W4 R0.5, TaylorSeer 1"),
    ("DBCache + FoCa", "R0.5"),
    ("DBCache + DMD", "R0.5"),
    ("step masks", "mask fast"),
    ("step masks", "geometric mask"),
    ("DBPrune", "R0.3"),
]


def reuses(ground, contender):
    """Share of the multiplications, and whether the picture differs."""
    item = ground.sweep[0]
    full = ground.plain.multiplications(item)
    lane = contender.enter(ground)
    share = lane.multiplications(item) / full
    changed = not np.array_equal(lane.render(item).picture, ground.plain.render(item).picture)
    return share, changed


@pytest.mark.parametrize(("family", "setting"), DIFFUSERS)
def test_caches_of_diffusers_reuse(ground, family, setting):
    share, changed = reuses(ground, pick(diffusers_caches.contenders(STEPS), family, setting))
    assert 0 < share < 0.9
    assert changed


@pytest.mark.parametrize(("family", "setting"), CACHE_DIT)
def test_caches_of_cache_dit_reuse(ground, family, setting):
    pytest.importorskip("cache_dit")
    from benchmarks.peers import cache_dit_caches

    share, changed = reuses(ground, pick(cache_dit_caches.contenders(STEPS), family, setting))
    assert 0 < share < 0.9
    assert changed


def test_two_settings_of_cache_dit_side_by_side_are_two_settings(ground):
    """On one class the second one would be ignored in silence."""
    pytest.importorskip("cache_dit")
    from benchmarks.peers import cache_dit_caches

    every, item = list(cache_dit_caches.contenders(STEPS)), ground.sweep[0]
    careful = pick(every, "DBCache", "F1 B0 W8 R0.06").enter(ground)
    daring = pick(every, "DBCache", "F1 B0 W4 R0.5").enter(ground)
    counts = [lane.multiplications(item) for lane in (careful, daring, careful)]
    assert counts[0] > counts[1]
    assert counts[2] == counts[0]
    assert ground.plain.multiplications(item) >= counts[0]


def test_sea_cache_as_shipped_never_fires_on_flux(ground):
    """Its row says so; the other settings are told the step by us."""
    share, changed = reuses(ground, pick(diffusers_caches.contenders(STEPS), "SeaCache", "shipped"))
    assert share == 1
    assert not changed


def test_a_peer_that_the_model_has_no_use_for_says_why(ground):
    guided = pick(diffusers_caches.contenders(STEPS), "FasterCache", "guidance")
    with pytest.raises(Impossible, match="unconditional branch"):
        guided.enter(ground)


def test_names_are_unique_so_that_measurements_are(ground):
    from benchmarks.peers import cache_dit_caches

    every = [
        *diffusers_caches.contenders(50),
        *cache_dit_caches.contenders(50),
        *ours.contenders(ground, {}),
    ]
    names = [contender.key for contender in every]
    assert len(set(names)) == len(names)


def test_fewer_steps_compute_their_share_and_presets_theirs(ground):
    every = list(ours.contenders(ground, {}))
    share, changed = reuses(ground, pick(every, "same sampler", "6 steps"))
    assert share == 0.5
    assert changed
    share, changed = reuses(ground, pick(every, "preset", "balanced"))
    # 4 of 12 steps; in the others the model is not called.
    assert share == pytest.approx(4 / 12)
    assert changed


def test_fewer_steps_on_the_steps_that_a_preset_computes(ground):
    every = list(ours.contenders(ground, {}))
    for sampler in ("same sampler", "UniPC"):
        found = pick(every, f"{sampler} on a plan's sigmas", "of balanced")
        lane = found.enter(ground)
        assert lane.steps == 4
        with lane.within():
            lane.stage.render(ground.sweep[0], lane.steps)
            visited = lane.stage.pipe.scheduler.timesteps
        assert len(visited) == 4
        assert {round(float(t)) for t in visited} <= {round(float(t)) for t in ground.levels[1]}


def test_plan_files_race_under_their_names(ground, tmp_path):
    import blockcache

    plan = blockcache.plan_for(ground.fresh(), "fast", STEPS, ground.levels[0])
    plan.save(tmp_path / "mine.json")
    every = list(ours.contenders(ground, ours.read(tmp_path)))
    tuned = pick(every, "tuned", "mine")
    assert tuned.side == OURS
    lane, preset = tuned.enter(ground), pick(every, "preset", "fast").enter(ground)
    item = ground.sweep[0]
    assert np.array_equal(lane.render(item).picture, preset.render(item).picture)
    # Another plan of that name is another contender.
    blockcache.plan_for(ground.fresh(), "quality", STEPS).save(tmp_path / "mine.json")
    assert pick(ours.contenders(ground, ours.read(tmp_path)), "tuned", "mine").key != tuned.key


# The track, with contenders whose seconds and decibels are known.


class FakeLane:
    """Renders in `seconds` a picture that is `db` off."""

    def __init__(self, seconds, db, calls=None):
        self.seconds, self.db, self.calls = seconds, db, calls

    def render(self, item):
        if self.calls is not None:
            self.calls.append(item)
        error = 0.0 if self.db is None else 10 ** (-self.db / 20)
        return Render(np.full((16, 16, 3), 0.25 + error, np.float32), None, self.seconds)

    def multiplications(self, item):
        return int(100 * self.seconds)


class FakeGround:
    sweep = [("s", 1), ("t", 2)]
    race = [("a", 3), ("b", 4), ("c", 5)]

    def __init__(self, uncached_s=1.0):
        self.plain = FakeLane(uncached_s, None)


def fake(side, family, setting, seconds, db, calls=None):
    return Contender(side, family, setting, lambda ground: FakeLane(seconds, db, calls))


def track(tmp_path, deadline=float("inf"), uncached_s=1.0):
    log = Log(tmp_path / "log.jsonl", {"model": "fake"})
    return Track(FakeGround(uncached_s), log, deadline, lambda line: None)


def test_speed_is_the_ratio_to_the_uncached_runs_beside_it(tmp_path):
    racing = track(tmp_path)
    found = [fake(OURS, "x", f"{i}", 0.25, 40) for i in range(BETWEEN + 1)]
    racing.race(found, rounds=2)
    rows = summaries(found, racing.log, "race")
    assert [row["speedup"] for row in rows] == [4.0] * len(found)
    assert all(row["prompts"] == 3 and row["computed"] == 0.25 for row in rows)
    assert rows[0]["psnr_db"]["worst"] == pytest.approx(40, abs=1e-3)
    assert all(has_effect(row) for row in rows)
    assert racing.floor_db == 100.0


def test_the_psnr_of_a_video_is_the_mean_over_its_frames():
    video = np.zeros((2, 8, 8, 3), np.float32)
    off = video + np.array([0.1, 0.01], np.float32)[:, None, None, None]
    assert psnr_db(off, video) == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert psnr_db(off[0], video[0]) == pytest.approx(20, abs=1e-3)


def test_a_sweep_keeps_the_best_of_each_method(tmp_path):
    racing = track(tmp_path)
    settings = [
        fake(PEERS, "cache", "bad and slow", 0.9, 20),
        fake(PEERS, "cache", "good", 0.5, 46),
        fake(PEERS, "cache", "no effect", 0.98, None),
        fake(PEERS, "other", "only one", 0.8, 33),
    ]
    kept = racing.sweep(settings, keep=1)
    assert [contender.setting for contender in kept] == ["good", "only one"]
    rows = summaries(settings, racing.log, "sweep")
    assert [row["setting"] for row in rows if not has_effect(row)] == ["no effect"]


def test_a_run_that_was_cut_goes_on_and_repeats_nothing(tmp_path):
    calls = []
    found = [fake(OURS, "x", f"{i}", 0.25, 40, calls) for i in range(BETWEEN)]
    racing = track(tmp_path)
    racing._run("race", found, FakeGround.race[:2], 1)
    assert len(calls) == 2 * BETWEEN
    again = track(tmp_path)
    again.race(found, rounds=1)
    assert len(calls) == 3 * BETWEEN
    assert [row["prompts"] for row in summaries(found, again.log, "race")] == [3] * BETWEEN


def test_after_the_last_minute_nothing_is_started(tmp_path):
    calls = []
    with pytest.raises(OutOfTime):
        track(tmp_path, deadline=time.monotonic() - 1).race([fake(OURS, "x", "", 1, 40, calls)], 1)
    assert calls == []


def test_rows_are_over_the_prompts_that_all_have_rendered(tmp_path):
    racing = track(tmp_path)
    first, second = fake(OURS, "x", "1", 0.5, 40), fake(OURS, "x", "2", 0.5, 30)
    racing._run("race", [first], FakeGround.race, 1)
    racing._run("race", [second], FakeGround.race[:1], 1)
    rows = summaries([first, second], racing.log, "race")
    assert [row["prompts"] for row in rows] == [1, 1]


def test_a_contender_that_fails_is_a_row_with_the_reason(tmp_path):
    def refuse(ground):
        raise Impossible("needs guidance")

    def crash(ground):
        raise IndexError("tuple index out of range\nand more")

    racing = track(tmp_path)
    found = [Contender(PEERS, "a", "1", refuse), Contender(PEERS, "b", "2", crash)]
    assert racing.sweep([*found, fake(PEERS, "c", "3", 0.5, 40)], keep=2)[0].family == "c"
    rows = summaries(found, racing.log, "race")
    assert [row["objection"] for row in rows] == [
        "needs guidance",
        "IndexError: tuple index out of range",
    ]


def test_a_log_of_other_circumstances_is_refused(tmp_path):
    Log(tmp_path / "log.jsonl", {"steps": 50})
    with pytest.raises(Impossible, match="delete it"):
        Log(tmp_path / "log.jsonl", {"steps": 28})


def test_a_cut_line_is_dropped(tmp_path):
    file = tmp_path / "log.jsonl"
    log = Log(file, {"steps": 50})
    log.add({"phase": "race", "key": "x"})
    file.write_text(file.read_text() + '{"phase": "ra')
    assert list(Log(file, {"steps": 50}).of("race")) == [{"phase": "race", "key": "x"}]


# The pages.


@pytest.fixture
def race(tmp_path):
    racing = track(tmp_path)
    found = [
        fake(PEERS, "cache", "a", 0.5, 40),
        fake(FEWER, "UniPC", "12 steps", 0.25, 45),
        fake(OURS, "tuned", "psnr-40", 0.25, 42),
        Contender(PEERS, "broken", "b", lambda ground: 1 / 0),
    ]
    racing.race(found, 1)
    rows = summaries(found, racing.log, "race")
    silent = {"family": "silent", "setting": "c", "psnr_db": {"median": 100, "worst": 100}}
    return {
        "model": "fake",
        "steps": 50,
        "prompts": 3,
        "commit": "0",
        "versions": {"torch": "2"},
        "machine": {"cpu": "any", "threads": "1"},
        "swept": {"cache": 1},
        "rows": rows,
        "without_effect": [silent],
        "figures": figures(rows),
    }


def test_the_readme_table_has_wins_and_losses(race):
    text = pages.compact({"fake-50": race})
    assert (
        "| speed at 40 dB median | **4.00x (tuned)** | **4.00x (UniPC)** | 2.00x (cache) |" in text
    )
    assert "| median prompt at 3x | 42.0 dB (tuned) | **45.0 dB (UniPC)** | not that fast |" in text
    met = sum(aim["met"] for aim in race["figures"]["aims"])
    assert f"{met} of {len(race['figures']['aims'])} aims met" in text


def test_the_page_has_every_row_and_every_reason(race, tmp_path, monkeypatch):
    file = tmp_path / "peers.json"
    monkeypatch.setattr(pages, "RESULTS", file)
    assert "python -m benchmarks.peers" in pages.every_row()
    file.write_text(json.dumps({"races": {"fake-50": race}}))
    text = pages.every_row()
    for line in (
        "| blockcache | tuned | psnr-40 | 4.00x | 42.0 | 42.0 | 25% |",
        "| fewer steps | UniPC | 12 steps | 4.00x | **45.0** | **45.0** | 25% |",
        "| peer caches | cache | a | 2.00x | 40.0 | 40.0 | 50% |",
        "- broken (b): ZeroDivisionError: division by zero",
        "- silent (c): the pictures are the uncached ones, bit for bit",
        "| psnr-40 | 4.00x | 42.0 / 42.0 | 1.00x (uncached) | 0.25 |",
        "UniPC: 12 steps (4.00x, 45.0 dB)",
    ):
        assert line in text


def test_the_plot_is_drawn(race, tmp_path):
    pytest.importorskip("matplotlib")
    pages.draw([race], tmp_path / "peers.png")
    from PIL import Image

    assert Image.open(tmp_path / "peers.png").size[0] > 800


def test_the_command_runs_and_goes_on(tmp_path):
    from click.testing import CliRunner

    from benchmarks.peers.__main__ import main

    pytest.importorskip("matplotlib")
    options = {
        "--steps": 8,
        "--prompts": 1,
        "--sweep": 1,
        "--keep": 1,
        "--plans": tmp_path / "plans",
        "--work": tmp_path / "work",
        "--json": tmp_path / "peers.json",
        "--plot": tmp_path / "peers.png",
        "--only": "Pyramid",
    }
    arguments = [*map(str, itertools.chain(*options.items())), "--only", "preset", "--no-tune"]
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        found = CliRunner().invoke(main, [*arguments, "--minutes", "0"], catch_exceptions=False)
        assert "out of time" in found.output
        found = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert found.exit_code == 0
    race = json.loads((tmp_path / "peers.json").read_text())["races"]["tiny-image-8"]
    sides = [row["side"] for row in race["rows"]]
    assert sides.count(OURS) == 3
    assert sides.count(PEERS) == 1
    assert all(row["prompts"] == 1 and 0 < row["computed"] <= 1 for row in race["rows"])
