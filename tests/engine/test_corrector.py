"""Corrected outputs on a real sampler: the walk ends where the uncached one ends."""

import copy
import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.engine.tracker import Tracker
from blockcache.plan import Corrector, MaskTable, Taylor
from toys import Block

STEPS = 12
MASK = (0, 1, 4, 7, 11)


class Curve(nn.Module):
    """Puts out a parabola of the step, whatever it gets; another one for each text."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(1.0), Block(2.0)])
        self.step = 0

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        bend = 0.1 if encoder_hidden_states is None else float(encoder_hidden_states)
        value = 1.0 - 0.3 * self.step + bend * self.step**2
        return torch.full_like(hidden_states, value)


def rule(corrector, mask=MASK):
    table = MaskTable((mask,), STEPS)
    return Rule(Site("model"), table, Taylor(1), payload="output", corrector=corrector)


def walked(model, scheduler, texts=(None,), begin=0, disturb=None):
    """Final latents of an Euler walk from zero, the outputs for several texts added up."""
    scheduler.set_timesteps(STEPS)
    if begin:
        scheduler.set_begin_index(begin)
    latents = torch.zeros(1, 1, 4)
    for i, timestep in enumerate(scheduler.timesteps[begin:], begin):
        model.step = i
        with torch.set_grad_enabled(i == disturb):
            outputs = [model(latents, timestep, text) for text in texts]
        latents = scheduler.step(sum(outputs), timestep, latents).prev_sample.detach()
    return latents


def both(scheduler, corrector, **how):
    """Cached and uncached."""
    model, plain = Curve(), Curve()
    blockcache.enable(model, Recipe((rule(corrector),)), scheduler=scheduler)
    cached = walked(model, scheduler, **how)
    assert model.blocks[0].calls < plain.blocks[0].calls + STEPS
    return cached, walked(plain, copy.deepcopy(scheduler), **how)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("texts", [(None,), (torch.tensor(0.1), torch.tensor(-0.2))])
def test_flow_matching_ends_where_it_should(shift, texts):
    """Only so if what is kept are the true outputs and not the corrected ones."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    cached, plain = both(scheduler, Corrector(2), texts=texts)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4)
    bare, _ = both(scheduler, None, texts=texts)
    assert (bare - plain).abs().max() > 0.01


def test_noise_prediction_ends_where_it_should():
    cached, plain = both(EulerDiscreteScheduler(), Corrector(2))
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-3)


def test_a_run_that_begins_late():
    scheduler = FlowMatchEulerDiscreteScheduler()
    model, plain = Curve(), Curve()
    table = MaskTable(((0, 1, 4, 7),), 8)
    late = Rule(Site("model"), table, Taylor(1), payload="output", corrector=Corrector())
    blockcache.enable(model, Recipe((late,)), scheduler=scheduler)
    cached = walked(model, scheduler, begin=4)
    expected = walked(plain, copy.deepcopy(scheduler), begin=4)
    torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        EulerAncestralDiscreteScheduler(),
        EulerDiscreteScheduler(prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_samplers_leave_it_out_and_say_so(scheduler, caplog):
    caplog.set_level(logging.INFO, "blockcache")
    results = []
    for corrector in (Corrector(), None):
        torch.manual_seed(0)
        results.append(both(scheduler, corrector)[0])
    assert torch.equal(*results)
    said = [r.message for r in caplog.records if "the corrector is left out" in r.message]
    assert len(said) == 1 and type(scheduler).__name__ in said[0]


def test_a_step_past_the_cache_is_not_corrected():
    """Gradients bypass step 5: of the gap before step 7 not all was predicted."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    model = Curve()
    blockcache.enable(model, Recipe((rule(Corrector()),)), scheduler=scheduler)
    seen = []
    model.register_forward_hook(lambda m, args, output: seen.append(float(output.mean())))
    walked(model, scheduler, disturb=5)
    assert 7 not in [i for i, y in enumerate(seen) if y != pytest.approx(1 - 0.3 * i + 0.1 * i**2)]


def test_strides_of_samplers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    tracker = Tracker()
    tracker.locate(scheduler, scheduler.timesteps[0])
    levels = scheduler.sigmas.double().tolist()
    falls = [b - a for a, b in zip(levels, levels[1:], strict=False)]
    assert [step.stride for step in tracker.steps] == falls
    assert sum(falls) == pytest.approx(-1.0)
