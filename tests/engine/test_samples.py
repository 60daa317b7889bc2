"""Gates that decide for every sample: each gets what it gets alone in a batch of one."""

import math

import pytest
import torch

import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.plan import Cooldown, Gate, MaxStreak, Taylor, Warmup
from toys import Denoiser, Scheduler, branches, column, enable

REST = Site("span", 1)


def by_sample(threshold, site=REST, guards=(), **settings):
    return Rule(site, Gate(threshold, batch="sample", **settings), guards=guards)


def run(recipe, rows, model=None, e=None):
    """Outputs `[steps][samples]` of a batch whose samples visit `rows`."""
    model = model or Denoiser()
    scheduler = Scheduler(len(rows[0]))
    blockcache.enable(model, recipe, scheduler=scheduler)
    outputs = []
    with torch.no_grad():
        for i, xs in enumerate(zip(*rows, strict=True)):
            scheduler.step_index = i
            x = torch.tensor(xs, dtype=torch.float32).view(-1, 1, 1)
            outputs.append(model(x, scheduler.timesteps[i], e).flatten().tolist())
    return outputs


def test_by_hand():
    """Probe residual x + 1, threshold .1. Sample 0 stands still, sample 1 moves in step 2: from
    2 to 2.5 is .25."""
    model = Denoiser()
    recipe = Recipe((by_sample(0.1),))
    outputs = run(recipe, [[1, 1.125, 1.125, 1.125], [1, 1, 1.5, 1.5]], model)
    # Plain 16 x + 26. Reused from a: 2 x + 1 + 14 a + 25.
    assert outputs == [[42, 42], [42.25, 42], [42.25, 50], [42.25, 50]]
    (branch,) = branches(model)
    assert branch["decided"] == {"first step": 1, "reuse": 2, "per sample": 1}
    assert "".join(str(row[-1]) for row in branch["map"]) == "1010"


@pytest.mark.parametrize("reference", ["computed", "previous"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("guards", [(), (Warmup(2), MaxStreak(2), Cooldown(1))], ids=["", "guards"])
@pytest.mark.parametrize("signal", ["first_block", "probe"])
def test_each_sample_as_if_alone(reference, accumulate, guards, signal):
    """Random walks of very different speeds: no two decide alike. Bit for bit."""
    generator = torch.Generator().manual_seed(7)
    speeds = (0.0, 0.01, 0.1, 1.0, 3.0)
    rows = [
        (5 + torch.randn(12, generator=generator).cumsum(0) * speed).tolist() for speed in speeds
    ]
    rule = by_sample(0.15, guards=guards, reference=reference, accumulate=accumulate, signal=signal)
    recipe = Recipe((rule,))
    together = run(recipe, rows)
    alone = [run(recipe, [row]) for row in rows]
    for number in range(len(rows)):
        assert [step[number] for step in together] == [step[0] for step in alone[number]]


def test_payloads_of_reused_samples_stay_bit_for_bit():
    """A reused sample's payload was taken anew from input + payload: rounded in every step."""
    model, other = Denoiser(), Denoiser()
    generator = torch.Generator().manual_seed(1)
    still = 0.1 + 1e-3 * torch.rand(20, generator=generator)
    moving = torch.arange(20.0) ** 2
    recipe = Recipe((by_sample(0.05),))
    together = run(recipe, [still.tolist(), moving.tolist()], model)
    alone = run(recipe, [still.tolist()], other)
    assert [step[0] for step in together] == [step[0] for step in alone]
    assert branches(model)[0]["decided"]["per sample"] == 19
    assert branches(other)[0]["decided"]["reuse"] == 19


def test_a_streak_is_each_samples_own():
    """The other sample's computing set the streak back for both."""
    rows = [[1.0] * 9, [2.0**i for i in range(9)]]
    recipe = Recipe((by_sample(0.1, guards=(MaxStreak(2),), reference="computed"),))
    model = Denoiser()
    outputs = run(recipe, [[1 + i / 128 for i in range(9)], rows[1]], model)
    xs = [1 + i / 128 for i in range(9)]
    anchors = [xs[i - i % 3] for i in range(9)]
    expected = [2 * x + 1 + 14 * a + 25 for x, a in zip(xs, anchors, strict=True)]
    assert [step[0] for step in outputs] == expected
    assert [step[1] for step in outputs] == [16 * x + 26 for x in rows[1]]


def test_nan_in_one_sample_is_its_own():
    rows = [[1, 1, 1, 1], [1, math.nan, 1, 1]]
    outputs = run(Recipe((by_sample(10.0),)), rows)
    assert [step[0] for step in outputs] == [42] * 4
    assert math.isnan(outputs[1][1])
    # Computed, and the reference in step 2 is not a number: computed again; then reused.
    assert [outputs[0][1], outputs[2][1], outputs[3][1]] == [42, 42, 42]


def test_zero_reuses_nothing():
    model = Denoiser()
    outputs = run(Recipe((by_sample(0.0),)), [[1, 1, 1], [2, 2, 2]], model)
    assert outputs == [[42, 58]] * 3
    assert branches(model)[0]["reused"] == 0


@pytest.mark.parametrize("how", ["joint", "leader", "independent"])
def test_guidance_as_two_calls(how):
    """The second branch takes the first one's decisions, sample by sample."""
    recipe = Recipe((by_sample(0.1),), how)
    model, scheduler = Denoiser(), Scheduler(4)
    blockcache.enable(model, recipe, scheduler=scheduler)
    first = [[1, 1, 1, 1], [1, 1, 1.5, 1.5]]
    second = [[3, 4, 4, 4], [5, 5, 5, 7]]
    conditioning = (torch.zeros(1), torch.ones(1))
    outputs = ([], [])
    with torch.no_grad():
        for i in range(4):
            scheduler.step_index = i
            for j, rows in enumerate((first, second)):
                x = torch.tensor([float(row[i]) for row in rows]).view(-1, 1, 1)
                out = model(x, scheduler.timesteps[i], conditioning[j])
                outputs[j].append(out.flatten().tolist())

    def value(x, a):
        return 2 * x + 1 + 14 * a + 25

    assert outputs[0] == [[42, 42], [42, 42], [42, 50], [42, 50]]
    # Following: sample 1 computed in step 2. Alone: 0 from 4 to 5 (.25) in step 1, 1 in step 3.
    anchors = [[3, 5], [4, 5], [4, 5], [4, 7]] if how == "independent" else [[3, 5]] * 4
    wanted = [
        [value(row[i], a) for row, a in zip(second, anchors[i], strict=True)] for i in range(4)
    ]
    assert outputs[1] == wanted


def test_one_read_a_step(monkeypatch):
    reads = []
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "nonzero"):
        original = getattr(torch.Tensor, name)

        def counting(self, *args, _name=name, _original=original, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    model, scheduler = Denoiser(), Scheduler(6)
    blockcache.enable(model, Recipe((by_sample(0.1),)), scheduler=scheduler)
    with torch.no_grad():
        for i in range(5):
            scheduler.step_index = i
            reads.clear()
            model(torch.tensor([1.0, 2.0**i]).view(2, 1, 1))
            if i:
                assert reads == ["tolist"]
    assert branches(model)[0]["decided"]["per sample"] == 4


def test_another_batch_size_in_the_next_run_and_in_the_middle():
    recipe = Recipe((by_sample(0.1),))
    model = Denoiser()
    scheduler = Scheduler(6)
    blockcache.enable(model, recipe, scheduler=scheduler)
    with torch.no_grad():
        for i in range(6):
            scheduler.step_index = i
            n = 2 if i < 3 else 1
            x = torch.tensor([1.0, 2.0**i][:n]).view(n, 1, 1)
            out = model(x).flatten().tolist()
            # x = 1 is reused from 1; the other sample is always computed.
            assert out == [42, 16 * 2.0**i + 26][:n]
    both, one = branches(model)
    assert (both["steps"], one["steps"]) == (3, 3)


def test_real_blocks(shared):
    """Two prompts in one batch, the second one's noise larger: as if alone, up to the host's own
    difference between batch sizes."""
    flux = shared("flux")
    recipe = Recipe((by_sample(0.05, guards=(Warmup(1),)),))
    model = flux.denoiser
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 4, 32, generator=generator)
    pooled = torch.randn(2, 32, generator=generator)
    noise = torch.randn(6, 2, 16, 16, generator=generator)
    noise[1:, 0] *= 0.02
    latents = noise.cumsum(0)

    def outputs(rows):
        scheduler = Scheduler(6)
        blockcache.enable(model, recipe, scheduler=scheduler)
        found = []
        with torch.no_grad():
            for i in range(6):
                scheduler.step_index = i
                out = model(
                    hidden_states=latents[i, rows],
                    encoder_hidden_states=text[rows],
                    pooled_projections=pooled[rows],
                    timestep=torch.full((len(rows),), 0.5),
                    img_ids=torch.zeros(16, 3),
                    txt_ids=torch.zeros(4, 3),
                    guidance=torch.full((len(rows),), 3.5),
                    return_dict=False,
                )[0]
                found.append(out)
        return torch.stack(found), branches(model)[0]["decided"]

    together, decided = outputs([0, 1])
    assert decided["per sample"] >= 3
    for i in range(2):
        alone, _ = outputs([i])
        assert (together[:, i] - alone[:, 0]).abs().max() <= 1e-5 * alone.abs().max()
    blockcache.disable(model)


def test_what_cannot_be_decided_by_sample():
    with pytest.raises(blockcache.PlanError, match="predictor Copy"):
        Rule(REST, Gate(0.1, batch="sample"), Taylor(1))
    with pytest.raises(blockcache.PlanError, match="blocks as the site"):
        Rule(Site("model"), Gate(0.1, "latent", batch="sample"))


def test_the_mean_and_any_of_a_batch():
    """One sample of two changes by .25, the other not: any .25, mean (0 + .5) / (2 + 2) = .125."""
    for batch, expected in (("any", "11"), ("mean", "10")):
        model = Denoiser()
        scheduler = enable(model, Rule(REST, Gate(0.2, batch=batch)), steps=2)
        with torch.no_grad():
            for i, second in enumerate((1.0, 1.5)):
                scheduler.step_index = i
                model(torch.cat([column(1.0), column(second)]))
        assert "".join(str(row[-1]) for row in branches(model)[0]["map"]) == expected
