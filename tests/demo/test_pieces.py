"""The parts of the demo that are worked out by hand: links, stories, figures, folders."""

import base64
import json
import zlib

import numpy as np
import pytest
from PIL import Image

import blockcache
from blockcache.demo import browse, media, panels, plots, settings, shelf, story
from blockcache.demo.settings import Limits, Settings, from_query, to_query
from blockcache.demo.watch import Side, StepTime
from blockcache.errors import BlockCacheError, PlanError
from blockcache.plan import Every, Recipe, Rule, Site, Taylor
from blockcache.tuning.quality import Scores

HOSTILE = "<img src=x onerror=alert(1)>${alert(1)}{{7*7}}"


# ---- links --------------------------------------------------------------------------------------


def parsed(query):
    from urllib.parse import parse_qsl

    return dict(parse_qsl(query))


def test_a_link_restores_the_settings():
    asked = Settings("tiny-image", HOSTILE + " & 100 %", 7, 12, 64, 32, None, 1.5, "recipe", "fora")
    found, plan = from_query(parsed(to_query(asked)))
    assert settings.checked(found, Limits()) == asked
    assert plan is None


def test_a_plan_travels_in_the_link(build_tiny):
    plan = blockcache.plan_for(build_tiny("flux").pipe, "fast", steps=50)
    asked = Settings("tiny-image", "a star", way="plan", what="mine")
    query = to_query(asked, plan)
    assert len(query) < 2000
    found, travelled = from_query(parsed(query))
    assert travelled == plan and found["what"] == "mine"


@pytest.mark.parametrize(
    "packed",
    [
        "no plan",
        "AAAA",
        base64.urlsafe_b64encode(zlib.compress(b"{}")).decode(),
        base64.urlsafe_b64encode(zlib.compress(b"[" * 100_000)).decode(),
        # Half a kilobyte that would become half a gigabyte.
        base64.urlsafe_b64encode(zlib.compress(b" " * 2**24)).decode(),
    ],
)
def test_what_is_no_plan_in_a_link_is_refused(packed):
    with pytest.raises(PlanError):
        from_query({"plan": packed})


def test_knobs():
    assert shelf.read_knobs("interval=3, site=stack, table=((0.1, 2), (0.2, 3))") == {
        "interval": 3,
        "site": "stack",
        "table": ((0.1, 2), (0.2, 3)),
    }
    with pytest.raises(PlanError, match="name=value"):
        shelf.read_knobs("3")


def test_every_recipe_on_offer_can_be_made():
    for name in shelf.usable_recipes():
        asked = Settings("m", "p", way="recipe", what=name)
        assert shelf.choose(asked, [])[0] == name
        assert shelf.about(name)


# ---- what happened ------------------------------------------------------------------------------


def test_a_prediction_needs_two_computed_steps():
    computed = np.array([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    rule = Rule(Site("span", 0, 1), Every(2), Taylor(1))
    kinds = story._kinds(computed, Recipe((rule,)))
    reused, predicted = story.REUSED, story.PREDICTED
    assert kinds.tolist() == [[0, reused, 0, predicted, predicted], [0] * 5]
    copying = Rule(Site("span", 0, 1), Every(2))
    assert story._kinds(computed, Recipe((copying,)))[0].tolist() == [0, reused, 0, reused, reused]


def test_a_gate_that_adds_up_starts_again_when_it_computes():
    gate = blockcache.Recipe
    rule = blockcache.recipes.easy_cache().rules[0]
    gate = rule.policy
    measured = ((1, 0.02), (2, 0.02), (3, 0.02), (4, 0.01))
    seen = story._seen_by(gate, measured, [True, False, False, True, False])
    expected = [0.02, 0.04, 0.06, 0.01] if gate.accumulate else [0.02, 0.02, 0.02, 0.01]
    assert [value for _, value in seen] == pytest.approx(expected)


def side(denoiser_s):
    steps = tuple(StepTime(s + 0.01, s) for s in denoiser_s)
    return Side(np.zeros((8, 8, 3)), 1.0, 0.0, 0.0, steps, (), (None,) * len(steps))


def test_a_machine_that_changed_its_pace_is_told():
    """A busy moment in the uncached run once gave a speed-up of 27."""
    computed = [True, True, True, False, True]
    plain = side([0.5, 0.5, 0.5, 0.5, 0.5])
    assert story._pace(plain, side([0.5, 0.6, 0.4, 0.0, 0.5]), computed) == ()
    (faster,) = story._pace(plain, side([0.1, 0.1, 0.2, 0.5, 0.1]), computed)
    assert faster.startswith("The machine was 5.0 times faster in the cached run")
    (slower,) = story._pace(plain, side([1.0, 1.0, 1.0, 0.0, 1.0]), computed)
    assert "2.0 times slower" in slower
    assert story._pace(plain, side([0.1, 0.1, 0.1, 0.1, 0.1]), [True, False] * 2) == ()


def test_the_front():
    points = [(3.0, 50.0), (1.0, 20.0), (2.0, 40.0), (2.5, 35.0), (1.0, 25.0)]
    assert plots.pareto(points) == [4, 2, 0]
    assert plots.pareto([]) == []


def test_the_front_is_named():
    dots = [
        plots.Dot("1", 1.0, 20.0, "tip", "fast", is_front=True),
        plots.Dot("2", 2.0, 30.0, "tip", "x" * 60, is_front=True),
        plots.Dot("3", 3.0, 25.0, "tip", "beaten"),
    ]
    html = plots.plane(dots, 4.0)
    assert ">fast</text>" in html and f">{'x' * 25}…</text>" in html
    assert "beaten" not in html


def test_the_idea_is_drawn_with_the_steps_of_the_preset():
    """Two grids of 6 x 30; of the second one a third of the columns."""
    drawn = panels.welcome()
    assert drawn.count('class="bc-computed"/>') == 6 * (30 + 10)
    assert drawn.count('class="bc-reused"/>') == 6 * 20


def test_ticks_are_round():
    assert plots._ticks(0, 9.6, 5) == [0, 2, 4, 6, 8]
    assert plots._ticks(0, 0.13, 5) == [0, 0.05, 0.1]


def test_words_for_decibels():
    assert panels.likeness(Scores(100.0, 1.0, None)) == "The pictures are identical."
    far = Scores(19.0, 0.5, None)
    assert panels.likeness(far) == "It has become another picture."
    assert panels.likeness(far, is_video=True) == "It has become another video."


# ---- pictures -----------------------------------------------------------------------------------


def test_the_gain_makes_the_difference_fill_the_range():
    reference = np.full((32, 32, 3), 0.5, np.float32)
    apart, gain = media.difference(reference + 0.1, reference)
    assert gain == 8 and apart == pytest.approx(0.8, abs=1e-5)
    assert media.difference(reference, reference)[0].max() == 0


@pytest.mark.parametrize("text", ["short", "a long name " * 20, "zażółć 猫"])
def test_labels_stay_in_their_half(text):
    grey = np.full((40, 64, 3), 0.5, np.float32)
    plain = np.asarray(media.shown(grey))
    assert plain.shape == (480, 768, 3)
    half = plain.shape[1] // 2
    left = np.asarray(media.shown(grey, media.Label(text)))
    right = np.asarray(media.shown(grey, media.Label(text, "right")))
    assert (left != plain)[:, :half].any() and (left == plain)[:, half:].all()
    assert (right != plain)[:, half:].any() and (right == plain)[:, :half].all()
    alone = np.asarray(media.shown(grey, media.Label(text, is_alone=True)))
    assert (alone != plain).any(2).sum() > (left != plain).any(2).sum()
    assert (alone == plain)[:, -8:].all()


# ---- folders ------------------------------------------------------------------------------------


def row(number, **changes):
    base = {"id": f"item{number}", "row": number, "prompt": f"prompt {number}", "seed": number}
    base |= {"status": "done", "file": f"items/item{number}.png", "settings_hash": "x"}
    base |= {"finished": number, "plan": "fast", "seconds": 1.0 + number, "reuse": 0.75}
    return {**base, **changes}


@pytest.fixture
def folder(tmp_path):
    """A folder like those of `generate`, and a secret beside it."""
    place = tmp_path / "run"
    for name in ("items", "uncached"):
        (place / name).mkdir(parents=True)
    for number in range(3):
        grey = Image.new("RGB", (16, 16), (40 * number, 80, 80))
        grey.save(place / "items" / f"item{number}.png")
        grey.save(place / "uncached" / f"item{number}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    rows = [
        row(0, baseline_file="uncached/item0.png", baseline_s=3.0, psnr_db=100.0, ssim=1.0),
        row(1, baseline_file="uncached/item1.png", baseline_s=3.0, psnr_db=30.0, ssim=0.9),
        row(2, prompt=HOSTILE),
        row(3, file="../secret.png"),
        row(4, file=str(tmp_path / "secret.png")),
        row(5, file="manifest.jsonl"),
        row(6, file=None, status="failed", error="out of memory"),
        row(0, prompt="the later line counts", finished=99),
    ]
    (place / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"half')
    return place


def test_a_folder_of_generate(folder):
    found = browse.read(folder)
    assert [item.name for item in found.items] == [f"item{number}" for number in range(7)]
    assert found.items[0].prompt == "the later line counts"
    assert found.items[1].speedup == 1.5 and found.items[1].computed == 0.25
    assert [item.name for item in found.ordered("worst first")][0] == "item1"
    assert [item.name for item in found.ordered("fastest first")][0] == "item0"
    assert found.items[6].error == "out of memory"


def test_a_part_is_newer_than_what_is_merged_whatever_the_clocks_say(folder):
    """Another machine's clock, an hour behind, brought the old picture back."""
    (folder / "parts").mkdir()
    later = row(1, prompt="made anew", finished=-3600)
    (folder / "parts" / "rank-0000-other-1.jsonl").write_text(json.dumps(later) + "\n")
    prompts = [item.prompt for item in browse.read(folder).items]
    assert prompts[:3] == ["the later line counts", "made anew", HOSTILE] and len(prompts) == 7


def test_a_manifest_cannot_name_files_elsewhere(folder):
    """Paths upwards, absolute ones and what is no picture get nothing."""
    items = browse.read(folder).items
    assert [item.file for item in items[3:6]] == [None] * 3
    assert items[2].file == (folder / "items" / "item2.png").resolve()


def test_cards_show_text_as_text(folder):
    html = browse.grid(browse.read(folder).items, 0)
    assert "<img src=x" not in html and "&lt;img src=x onerror=alert(1)&gt;" in html


def test_what_cannot_be_browsed(tmp_path, folder):
    with pytest.raises(BlockCacheError, match="found nothing, expected a folder"):
        browse.folders_in(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BlockCacheError, match="nothing to browse"):
        browse.folders_in(empty)
    assert browse.folders_in(tmp_path) == [folder]
    (empty / "compare.json").write_text("[]")
    with pytest.raises(BlockCacheError, match="cannot read"):
        browse.read(empty)


# ---- escaping -----------------------------------------------------------------------------------


def test_figures_show_text_as_text():
    dot = plots.Dot("1", 1.0, 30.0, HOSTILE)
    assert "<img" not in plots.plane([dot], 2.0) and "&lt;img" in plots.plane([dot], 2.0)
    for html in (
        panels.alert(HOSTILE),
        panels.remark(HOSTILE),
        panels.verdict(2.0, HOSTILE),
        panels.said([HOSTILE]),
        panels.header(HOSTILE),
    ):
        assert "<img" not in html and "&lt;img" in html
