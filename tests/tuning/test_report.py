import base64
import re
import statistics

import numpy as np
import pytest
from PIL import Image

from blockcache import api
from blockcache.engine.hooks import attachment_of
from blockcache.errors import BlockCacheError, PlanMismatchError
from blockcache.plan import MaskTable, Plan, Recipe, Rule, Site, Taylor
from blockcache.tuning import quality, report
from blockcache.tuning.stage import Stage

pytest.importorskip("matplotlib")

PROMPTS = ["a small red robot", "a blue robot <walks> over the snow"]
MASK = (0, 1, 3)


def call_of(tiny, steps=6):
    kwargs = {k: v for k, v in tiny.kwargs.items() if k not in ("prompt", "class_labels")}
    return {**kwargs, "num_inference_steps": steps}


@pytest.fixture
def flux(build_tiny):
    return build_tiny("flux", layers=2)


def plan_of(tiny, note=""):
    recipe = Recipe((Rule(Site(), MaskTable((MASK,), 6), Taylor(1)),), name="by hand")
    made = api.plan_for(tiny.pipe, recipe, steps=6)
    return Plan(made.recipe, made.fingerprint, made.total, {}, note)


def test_the_page_is_complete_and_opens_offline(flux, tmp_path):
    plan = plan_of(flux, "tuned for <nothing>")
    page = report.report(flux.pipe, plan, PROMPTS, out=tmp_path, **call_of(flux))
    assert attachment_of(flux.denoiser) is None
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", text) and "<script" not in text
    inside = [base64.b64decode(x) for x in re.findall(r"base64,([^\"]+)\"", text)]
    files = [tmp_path / f"{name}.png" for name in report._FIGURES]
    assert inside == [file.read_bytes() for file in files]
    for file in files:
        pixels = np.asarray(Image.open(file).convert("L"))
        assert min(pixels.shape) > 100 and pixels.std() > 5
    # What users wrote is text, not markup.
    assert "tuned for &lt;nothing&gt;" in text and "<walks>" not in text
    assert "by hand on FluxTransformer2DModel" in text


def test_the_figures_are_those_of_the_runs(flux, tmp_path):
    plan, stage = plan_of(flux), Stage(flux.pipe, call_of(flux))
    items = [(PROMPTS[0], 0), (PROMPTS[1], 1)]
    found = report._find(stage, plan, items, None, None)
    for pair, item in zip(found.pairs, items, strict=True):
        plain = stage.full(item)
        with api.enabled(flux.pipe, plan):
            cached = stage.full(item)
        assert pair.psnr_db == pytest.approx(quality.psnr(cached.picture, plain.picture))
        last = -20 * np.log10(quality.relative_l2(cached.latents, plain.latents))
        assert pair.true_db[-1] == pytest.approx(last) and len(pair.true_db) == 6
        # Nothing is reused in the first two steps: 120 dB stands for identical.
        assert (pair.true_db[:2] == 120).all() and (pair.true_db[2:] < 120).all()
    assert found.worst_first[0].psnr_db == min(pair.psnr_db for pair in found.pairs)
    assert found.computed.any(0).tolist() == [i in MASK for i in range(6)]
    assert found.summary["cache_bytes"] > 0


def test_the_estimate_is_the_teacher_forced_error(flux):
    found = report._find(
        Stage(flux.pipe, call_of(flux)), plan_of(flux), [(PROMPTS[0], 0)], None, None
    )
    estimated, site = report._estimated_db(found), found.trace.at("stack")
    assert np.isnan(estimated[list(MASK)]).all()
    y = site.sample[0].astype(np.float64)
    assert y.shape[1] == site.numel
    # Step 5 from steps 3 and 1: two ahead of a gap of two.
    error = ((y[5] - (2 * y[3] - y[1])) ** 2).mean() / (y[5] ** 2).mean()
    assert estimated[5] == pytest.approx(-10 * np.log10(error), abs=1e-3)


def test_candidates_of_a_tuning_are_drawn(flux, tmp_path):
    rows = [
        {"key": m, "mask": m, "what": "latents", "recipe": f"tuned {m}", "db": db, "seconds": s}
        for m, db, s in (("a", 30.0, 0.1), ("a", 40.0, 0.3), ("b", 20.0, 0.1))
    ]
    import json

    file = tmp_path / "runs.jsonl"
    lines = "\n".join(map(json.dumps, rows))
    file.write_bytes(lines.encode() + b"\n\xff\xfe torn by a power cut")
    traced = report._find(
        Stage(flux.pipe, call_of(flux)), plan_of(flux), [(PROMPTS[0], 0)], file, None
    )
    ((label, speed, decibels),) = traced.candidates
    assert label == "tuned a" and decibels == 35
    run_s = traced.trace.milliseconds["run"] / 1e3
    assert speed == pytest.approx(run_s / statistics.median([0.1, 0.3]))


def test_a_folder_without_a_tuning_is_said_before_anything_is_run(flux, tmp_path, monkeypatch):
    monkeypatch.setattr(Stage, "full", None)
    monkeypatch.setattr(Stage, "latents", None)
    with pytest.raises(BlockCacheError, match="runs.jsonl is missing"):
        out = tmp_path / "out"
        report.report(flux.pipe, plan_of(flux), PROMPTS, out=out, work=tmp_path, **call_of(flux))


def test_a_plan_for_another_model_is_refused(flux, build_tiny, tmp_path):
    other = build_tiny("flux", layers=3)
    with pytest.raises(PlanMismatchError):
        report.report(other.pipe, plan_of(flux), PROMPTS, out=tmp_path, **call_of(other))
    assert not list(tmp_path.iterdir())
