import json

import numpy as np
import pytest

from blockcache.errors import PlanError, PlanMismatchError
from blockcache.plan import Copy, Fingerprint, Fitted, Taylor, even_steps
from blockcache.plan.spec import from_json, to_json
from blockcache.plan.trace import Place, SiteTrace, Trace

MARK = Fingerprint("Toy", "abc", 4, "Euler", "float32")


def site_trace(values):
    """The tables of payloads `[P, T, D]`, each written out as its definition."""
    y = np.asarray(values, dtype=np.float64)
    prompts, steps, numel = y.shape
    gram, l1 = np.zeros((2, prompts, steps, steps))
    for p in range(prompts):
        for i in range(steps):
            for j in range(steps):
                gram[p, i, j] = np.mean(y[p, i] * y[p, j])
                l1[p, i, j] = np.mean(np.abs(y[p, i] - y[p, j]))
    size = np.abs(y).mean(2)
    return SiteTrace(numel, gram, l1, size, np.ones((prompts, steps)), y.astype(np.float32))


def make_trace(values, **changes):
    site = site_trace(values)
    prompts = len(site.size)
    known = dict(
        sites={Place("stack", 0, "residual", "0"): site},
        fingerprint=MARK,
        prompts=tuple(f"prompt {i}" for i in range(prompts)),
        seeds=tuple(range(prompts)),
        settings={"height": 64},
        chains=(4,),
        latents=np.zeros((prompts, 2, 3), np.float32),
        early=np.zeros((prompts, 4, 2, 3), np.float32),
        milliseconds={"run": 10.0},
        block_ms=(1.0, 1.0, 2.0, 2.0),
    )
    return Trace.of(**{**known, **changes})


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(3, 6, 40)).cumsum(1)


@pytest.mark.parametrize("predictor", [Copy(), Taylor(1), Taylor(2), Taylor(3)])
def test_the_gram_formula_gives_the_errors_measured_directly(values, predictor):
    steps, anchors = even_steps(6), (3, 2, 1, 0)[: predictor.depth]
    weights = predictor.weights(steps[5], [steps[a] for a in anchors])
    guess = sum(w * values[:, a] for w, a in zip(weights, anchors, strict=True))
    direct = ((values[:, 5] - guess) ** 2).mean(1)
    found = site_trace(values).errors(5, anchors, weights)
    np.testing.assert_allclose(found, direct, rtol=1e-9)


def test_tables_of_whole_payloads_are_as_defined(values):
    found, expected = SiteTrace.of(values.reshape(3, 6, 10, 4)), site_trace(values)
    for table in ("gram", "l1", "size", "sample"):
        np.testing.assert_allclose(getattr(found, table), getattr(expected, table), rtol=1e-12)
    before, after = (np.linalg.norm(values[1, t].reshape(10, 4), axis=1) for t in (2, 3))
    np.testing.assert_allclose(found.magnitude[1, 3], np.mean(after / before), rtol=1e-12)
    assert found.numel == 40 and (found.magnitude[:, 0] == 1).all()


def test_best_weights_are_those_of_least_squares(values):
    anchors, at = [3, 1, 0], 5
    site = site_trace(values)
    # Every prompt counts the same: rows are divided by the size of what is to be guessed.
    size = np.sqrt((values[:, at] ** 2).mean(1))[:, None]
    rows = np.concatenate([values[p, anchors].T / size[p] for p in range(3)])
    wanted = np.concatenate([values[p, at] / size[p] for p in range(3)])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(site.best_weights(at, anchors, ridge=0.0), expected, rtol=1e-9)
    errors = site.errors(at, anchors, expected)
    for other in (expected + 0.01, expected - 0.01, [1.0, 0, 0]):
        assert (errors / size[:, 0] ** 2).sum() < (
            site.errors(at, anchors, other) / size[:, 0] ** 2
        ).sum()


def test_a_large_ridge_copies_the_newest_anchor(values):
    found = site_trace(values).best_weights(5, [3, 1], ridge=1e9)
    np.testing.assert_allclose(found, [1.0, 0.0], atol=1e-6)


def test_relative_changes_are_over_the_later_named_step():
    y = np.array([[[1.0, -1.0], [2.0, -2.0], [2.0, 0.0]]])
    site = site_trace(y)
    expected = [[0, 0.5, 1.0], [1.0, 0, 1.0], [1.0, 0.5, 0]]
    np.testing.assert_allclose(site.relative_l1(), expected)
    np.testing.assert_allclose(site.change(), [0, 1.0, 0.5])
    np.testing.assert_allclose(site.cosine()[0], [1.0, 1.0, np.sqrt(0.5)])


def test_what_was_not_measured_says_what_was(values):
    trace = make_trace(values)
    assert trace.at("stack").numel == 40
    with pytest.raises(PlanError, match=r"no output of block 2 .*it has stack \(residual\)"):
        trace.at("block", 2, "output")


def test_each_gives_places_in_calling_order(values):
    site = site_trace(values)
    places = [Place("block", i, "output", b) for i in (10, 2, 0) for b in "01"]
    trace = make_trace(values, sites={place: site for place in places})
    assert [index for index, _ in trace.each("block")] == [0, 2, 10]
    assert trace.branches == ("0", "1")


def test_a_trace_survives_its_files(values, tmp_path):
    trace = make_trace(values, segments=np.arange(36.0).reshape(6, 6))
    trace.save(tmp_path)
    again = Trace.load(tmp_path)
    assert again.about() == trace.about() and again.steps == trace.steps
    assert again.sites.keys() == trace.sites.keys()
    for table in ("gram", "l1", "size", "magnitude", "sample"):
        np.testing.assert_array_equal(
            getattr(again.at("stack"), table), getattr(trace.at("stack"), table)
        )
    np.testing.assert_array_equal(again.segments, trace.segments)


def test_an_unfinished_trace_loads_with_the_finished_prompts(values, tmp_path):
    make_trace(values).save(tmp_path)
    (tmp_path / "001.safetensors").unlink()
    again = Trace.load(tmp_path)
    assert again.prompts == ("prompt 0", "prompt 2") and again.seeds == (0, 2)
    np.testing.assert_array_equal(again.at("stack").gram[1], site_trace(values).gram[2])


def test_bad_folders_are_refused(values, tmp_path):
    with pytest.raises(PlanError, match="cannot read a trace"):
        Trace.load(tmp_path / "nowhere")
    make_trace(values).save(tmp_path)
    (tmp_path / "002.safetensors").write_bytes(b"rubbish")
    with pytest.raises(PlanError, match="delete it and trace again"):
        Trace.load(tmp_path)
    about = json.loads((tmp_path / "trace.json").read_text())
    (tmp_path / "trace.json").write_text(json.dumps({**about, "blockcache_trace": 99}))
    with pytest.raises(PlanError, match="no trace of format 1 .found 99"):
        Trace.load(tmp_path)
    for i in range(3):
        (tmp_path / f"00{i}.safetensors").unlink()
    (tmp_path / "trace.json").write_text(json.dumps(about))
    with pytest.raises(PlanError, match="no finished prompt"):
        Trace.load(tmp_path)


def test_another_model_or_step_count_is_refused(values):
    trace = make_trace(values)
    trace.check(MARK, steps=6)
    with pytest.raises(PlanMismatchError, match="Toy"):
        trace.check(Fingerprint("Other", "abc", 4))
    with pytest.raises(PlanMismatchError, match="trace is of 6 steps, found a run of 28"):
        trace.check(MARK, steps=28)


FITTED = Fitted(((), (0,), (), (2, 0)), ((), (1.1,), (), (1.7, -0.8)))


def test_fitted_weights_are_looked_up_by_step():
    steps = even_steps(4)
    assert FITTED.depth == 2
    assert FITTED.weights(steps[1], [steps[0]]) == (1.1,)
    assert FITTED.weights(steps[3], [steps[2], steps[0]]) == (1.7, -0.8)
    assert from_json(json.loads(json.dumps(to_json(FITTED)))) == FITTED


def test_fitted_weights_for_other_anchors_are_not_used():
    steps, longer = even_steps(4), even_steps(5)
    linear = Taylor(1).weights(steps[3], [steps[2], steps[1]])
    assert FITTED.weights(steps[3], [steps[2], steps[1]]) == linear == (2.0, -1.0)
    assert FITTED.weights(longer[3], [longer[2], longer[0]]) == (1.5, -0.5)
    assert FITTED.weights(steps[2], [steps[0]]) == (1.0,)


def test_impossible_fitted_tables_are_refused():
    with pytest.raises(PlanError, match="as many values"):
        Fitted(((), (0,)), ((), (1.0, 2.0)))
    with pytest.raises(PlanError, match="anchors of step 1 must be earlier"):
        Fitted(((), (1,)), ((), (1.0,)))
    with pytest.raises(PlanError, match="newest first"):
        Fitted(((), (), (0, 1)), ((), (), (1.0, 1.0)))
