"""Runs, steps and branches: found without being told, on toys whose answers are known by hand."""

import logging
import threading
from types import SimpleNamespace

import pytest
import torch

import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.engine.tracker import Tracker
from blockcache.plan import Every, Taylor
from toys import (
    Denoiser,
    Scheduler,
    SilentScheduler,
    branches,
    calls,
    column,
    drive,
    enable,
    static,
)

STACK = Site("stack")
# Computed at 0, 1 and 5, residuals 26, 41, 101.
EXPECTED = [26, 42, 43, 44, 45, 106, 107, 108, 109, 110]


def usual(model):
    return enable(model, static(STACK, 0, 1, 5))


def test_every_run_starts_anew():
    model = Denoiser()
    scheduler = usual(model)
    for _ in range(3):
        scheduler.set_timesteps(10)
        assert drive(model, scheduler, range(10)) == EXPECTED
        assert calls(model) == [3] * 4


def test_a_loop_that_does_not_set_its_timesteps_anew():
    """The same schedule walked again: the step index moves back up."""
    model = Denoiser()
    scheduler = usual(model)
    for _ in range(2):
        assert drive(model, scheduler, range(10)) == EXPECTED
    assert calls(model) == [6] * 4


def test_a_run_given_up_in_the_middle_leaves_nothing_behind():
    model = Denoiser()
    scheduler = usual(model)
    drive(model, scheduler, [1000.0] * 3)
    scheduler.set_timesteps(10)
    assert drive(model, scheduler, range(10)) == EXPECTED
    drive(model, scheduler, [1000.0] * 3)
    assert drive(model, scheduler, range(10)) == EXPECTED


def test_another_number_of_steps_from_run_to_run():
    model = Denoiser()
    scheduler = Scheduler(10)
    recipe = Recipe((Rule(STACK, Every(3)),))
    blockcache.enable(model, recipe, scheduler=scheduler)
    for steps, expected in [(10, 4), (7, 3), (20, 7), (1, 1)]:
        scheduler.set_timesteps(steps)
        drive(model, scheduler, range(steps))
        assert calls(model) == [expected] * 4


def test_a_scheduler_without_a_step_index():
    model = Denoiser()
    scheduler = SilentScheduler(10)
    blockcache.enable(model, Recipe((static(STACK, 0, 1, 5),)), scheduler=scheduler)
    assert drive(model, scheduler, range(10)) == EXPECTED
    scheduler.timesteps = scheduler.timesteps.clone()
    assert drive(model, scheduler, range(10)) == EXPECTED
    assert calls(model) == [6] * 4


def test_a_scheduler_without_a_step_index_walked_twice():
    """No new timesteps and no index: the timestep moving back up tells the new run."""
    model = Denoiser()
    scheduler = SilentScheduler(10)
    blockcache.enable(model, Recipe((static(STACK, 0, 1, 5),)), scheduler=scheduler)
    for _ in range(2):
        assert drive(model, scheduler, range(10)) == EXPECTED
    assert calls(model) == [6] * 4


def test_a_run_that_starts_late_is_a_run_of_what_is_left():
    """Image-to-image at strength 0.6: `begin_index` 4 of 10, six steps are left."""
    model = Denoiser()
    scheduler = enable(model, static(STACK, 0, 1, total=6))
    scheduler.begin_index = 4
    outputs = []
    with torch.no_grad():
        for i in range(4, 10):
            # As diffusers does: the index is None until the first `scheduler.step`.
            scheduler.step_index = None if i == 4 else i
            outputs.append(model(column(i), scheduler.timesteps[i]).item())
    # Residuals 15 * 4 + 26 and 15 * 5 + 26.
    assert outputs == [90, 106, *(i + 101 for i in (6, 7, 8, 9))]
    assert branches(model)[0]["steps"] == 6
    assert calls(model) == [2] * 4


def test_a_late_start_without_a_step_index_is_found_by_the_timestep():
    scheduler = SilentScheduler(10)
    tracker = Tracker()
    moments = [tracker.locate(scheduler, scheduler.timesteps[i]) for i in range(7, 10)]
    assert [m.step.index for m in moments] == [0, 1, 2]
    assert [m.step.total for m in moments] == [3, 3, 3]
    assert [m.is_new_run for m in moments] == [True, False, False]


def test_the_tracker_by_hand():
    scheduler = Scheduler(3)
    tracker = Tracker()
    seen = []
    for index in (None, None, 1, 1, 1, 2, 2):
        scheduler.step_index = index
        moment = tracker.locate(scheduler, None)
        seen.append((moment.is_new_run, moment.step.index, moment.call))
    assert seen == [
        (True, 0, 0),
        (False, 0, 1),
        (False, 1, 0),
        (False, 1, 1),
        (False, 1, 2),
        (False, 2, 0),
        (False, 2, 1),
    ]
    assert [step.sigma for step in tracker.steps] == pytest.approx([1.0, 2 / 3, 1 / 3])
    scheduler.set_timesteps(3)
    assert tracker.locate(scheduler, None).is_new_run


def test_schedulers_that_repeat_a_timestep_and_count():
    """PNDM's Runge-Kutta start visits timesteps twice; its `counter` tells the steps apart."""
    timesteps = torch.tensor([900.0, 800.0, 800.0, 700.0])
    scheduler = SimpleNamespace(timesteps=timesteps, counter=0)
    tracker = Tracker()
    indices = []
    for counter, timestep in enumerate(timesteps):
        scheduler.counter = counter
        indices.append(tracker.locate(scheduler, timestep).step.index)
    assert indices == [0, 1, 2, 3]


def test_noise_levels_are_timesteps_where_there_are_no_sigmas():
    scheduler = SilentScheduler(4)
    tracker = Tracker()
    tracker.locate(scheduler, scheduler.timesteps[0])
    assert [step.sigma for step in tracker.steps] == [1000.0, 750.0, 500.0, 250.0]


# Where the scheduler is found.


def test_without_a_scheduler_everything_is_computed_and_it_is_said_once(caplog):
    model, twin = Denoiser(), Denoiser()
    blockcache.enable(model, Recipe((static(STACK, 0),)))
    with torch.no_grad():
        outputs = [model(column(i), torch.tensor(1000.0 - i)).item() for i in range(10)]
    assert outputs == drive(twin, Scheduler(), range(10))
    assert calls(model) == [10] * 4
    said = [r for r in caplog.records if "no scheduler is in sight" in r.getMessage()]
    assert len(said) == 1
    assert "scheduler=" in said[0].getMessage()
    assert "no run yet" in str(blockcache.summary(model))


def test_the_given_scheduler_wins_over_a_pipeline_in_the_callers_variables():
    """A script's own `pipe` further up the stack was taken for the caller: its step index never
    moves, so nothing was reused."""
    model = Denoiser()
    scheduler = usual(model)
    pipe = SimpleNamespace(transformer=model, scheduler=Scheduler(10))
    assert drive(model, scheduler, range(10)) == EXPECTED
    assert pipe.scheduler.step_index is None


def test_a_pipeline_is_found_on_the_call_stack():
    class Pipeline:
        def __init__(self, transformer):
            self.transformer, self.scheduler = transformer, Scheduler(10)

        def __call__(self, inputs):
            self.scheduler.set_timesteps(10)
            return drive(self.transformer, self.scheduler, inputs)

    model = Denoiser()
    first, second = Pipeline(model), Pipeline(model)
    blockcache.enable(first, Recipe((static(STACK, 0, 1, 5),)))
    assert first(range(10)) == EXPECTED
    # The second shares the denoiser and never heard of us.
    assert second(range(10)) == EXPECTED
    assert calls(model) == [6] * 4


def test_two_pipelines_whose_calls_alternate_are_right():
    """Each call belongs to another scheduler than the one before: always a new run, computed."""
    model = Denoiser()
    blockcache.enable(model, Recipe((static(STACK, 0),)))

    class Pipeline:
        def __init__(self):
            self.transformer, self.scheduler = model, Scheduler(4)

        def step(self, i, x):
            self.scheduler.step_index = i
            with torch.no_grad():
                return model(column(x), self.scheduler.timesteps[i]).item()

    first, second = Pipeline(), Pipeline()
    outputs = [(first.step(i, i), second.step(i, 100 + i)) for i in range(4)]
    assert outputs == [(16 * i + 26, 16 * (100 + i) + 26) for i in range(4)]
    assert calls(model) == [8] * 4


def test_a_scheduler_that_never_steps_costs_no_memory_and_is_said(caplog):
    """Each call looked like one more branch of step 0 and kept its own payload."""
    model = Denoiser()
    scheduler = usual(model)
    scheduler.step_index = None
    with torch.no_grad():
        outputs = [model(column(i), scheduler.timesteps[0]).item() for i in range(40)]
    assert outputs == [16 * i + 26 for i in range(40)]
    assert calls(model) == [40] * 4
    assert len(branches(model)) <= 16
    said = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len([r for r in said if "scheduler" in r.getMessage()]) == 1


@pytest.mark.parametrize(
    "wrong", ["euler", 7, SimpleNamespace(step_index=0)], ids=["text", "number", "no timesteps"]
)
def test_what_is_no_scheduler_is_refused_at_once(wrong):
    """It was an AttributeError out of the middle of the denoiser's forward."""
    model = Denoiser()
    with pytest.raises(blockcache.BlockCacheError, match="scheduler"):
        blockcache.enable(model, "balanced", scheduler=wrong)
    assert model._compiled_call_impl is None


def test_a_scheduler_that_has_no_timesteps_yet():
    model = Denoiser()
    scheduler = Scheduler(10)
    scheduler.timesteps = None
    blockcache.enable(model, Recipe((static(STACK, 0, 1, 5),)), scheduler=scheduler)
    with torch.no_grad():
        assert model(column(1)).item() == 42
    scheduler.set_timesteps(10)
    assert drive(model, scheduler, range(10)) == EXPECTED


# Branches.


def two_calls(model, scheduler, conditioning, steps=6):
    """Two calls a step: x = step, and x = 100 + step."""
    outputs = ([], [])
    with torch.no_grad():
        for i in range(steps):
            scheduler.step_index = i
            for j, x in enumerate((i, 100 + i)):
                out = model(column(x), scheduler.timesteps[i], conditioning(i, j))
                outputs[j].append(out.item())
    return outputs


# Computed at 0 and 3; residuals 26, 71 and 1526, 1571.
TWO = (
    [26, 27, 28, 74, 75, 76],
    [1626, 1627, 1628, 1674, 1675, 1676],
)
KEPT = (torch.zeros(1, 3), torch.ones(1, 3))
LENGTHS = (torch.zeros(1, 3), torch.ones(1, 5))


@pytest.mark.parametrize(
    "conditioning",
    [
        lambda i, j: KEPT[j],
        lambda i, j: torch.full((1, 3), float(j)),
        lambda i, j: LENGTHS[j],
        lambda i, j: None,
    ],
    ids=["kept tensors", "new tensors each step", "other lengths", "none"],
)
def test_two_calls_a_step_are_two_branches(conditioning):
    """Other lengths: noticing the second branch once dropped the payload of the first."""
    model = Denoiser()
    scheduler = enable(model, static(STACK, 0, 3, total=6), steps=6)
    assert two_calls(model, scheduler, conditioning) == TWO
    assert calls(model) == [4] * 4
    assert [(b["computed"], b["reused"]) for b in branches(model)] == [(2, 4)] * 2


def test_the_order_of_the_calls_may_change_where_tensors_are_kept():
    model = Denoiser()
    scheduler = enable(model, static(STACK, 0, total=4), steps=4)
    outputs = []
    with torch.no_grad():
        for i in range(4):
            scheduler.step_index = i
            order = (0, 1) if i % 2 == 0 else (1, 0)
            pair = {
                j: model(column(100 * j + i), scheduler.timesteps[i], KEPT[j]).item() for j in order
            }
            outputs.append((pair[0], pair[1]))
    assert outputs == [(26 + i, 1626 + i) for i in range(4)]


def test_a_branch_may_be_left_out_in_some_steps():
    """Guidance only in an interval: the unconditional call is missing at steps 1 and 2."""
    model = Denoiser()
    scheduler = enable(model, static(STACK, 0, total=5), steps=5)
    outputs = []
    with torch.no_grad():
        for i in range(5):
            scheduler.step_index = i
            for j in (0, 1) if i not in (1, 2) else (1,):
                outputs.append(model(column(100 * j + i), scheduler.timesteps[i], KEPT[j]).item())
    assert outputs == [26, 1626, 1627, 1628, 29, 1629, 30, 1630]


def test_a_branch_left_out_where_it_would_be_computed_does_not_fall_back_on_an_older_payload():
    """Steps 2, 3 and 4 are computed, so only 4 would be kept; step 0 is not what 5 may take."""
    model = Denoiser()
    scheduler = enable(model, static(STACK, 0, 2, 3, 4, total=6), steps=6)
    outputs = []
    with torch.no_grad():
        for i in range(6):
            scheduler.step_index = i
            model(column(100 + i), scheduler.timesteps[i], KEPT[0])
            if i != 4:
                outputs.append(model(column(i), scheduler.timesteps[i], KEPT[1]).item())
    assert outputs == [26, 27, 58, 74, 106]


@pytest.mark.parametrize("has_two_branches", [False, True])
def test_a_text_exchanged_within_a_run_is_not_served_with_the_old_ones_payload(has_two_branches):
    """As `callback_on_step_end` may do; whether the old tensor still lives makes no difference."""
    model = Denoiser()
    scheduler = enable(model, static(STACK, 0, total=6), steps=6)
    outputs, texts = [], [torch.zeros(1, 3), torch.ones(1, 3)]
    with torch.no_grad():
        for i in range(6):
            scheduler.step_index = i
            if i == 3:
                texts[0] = texts[0] + 2
            for j in range(1 + has_two_branches):
                x = column(100 * j + i)
                outputs.append((j, model(x, scheduler.timesteps[i], texts[j]).item()))
    assert [out for j, out in outputs if j == 0] == [26, 27, 28, 74, 75, 76]
    assert [out for j, out in outputs if j == 1] == has_two_branches * list(range(1626, 1632))


def test_another_size_within_a_run_is_another_branch():
    """A pipeline of two stages: nothing of the first size is added to the second."""
    model = Denoiser()
    scheduler = enable(model, static(STACK, 0, total=6), steps=6)
    shapes = [(1, 1, 1)] * 3 + [(1, 4, 1)] * 3
    outputs = []
    with torch.no_grad():
        for i, shape in enumerate(shapes):
            scheduler.step_index = i
            outputs.append(model(torch.full(shape, float(i)), scheduler.timesteps[i]))
    assert [o.flatten()[0].item() for o in outputs] == [26, 27, 28, 74, 75, 76]
    assert outputs[5].shape == (1, 4, 1)
    assert calls(model) == [2] * 4


def test_another_dtype_within_a_run_is_another_branch():
    model = Denoiser()
    scheduler = enable(model, static(STACK, 0, total=4), steps=4)
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    outputs = []
    with torch.no_grad():
        for i, dtype in enumerate(dtypes):
            scheduler.step_index = i
            outputs.append(model(column(i).to(dtype), scheduler.timesteps[i]))
    assert [o.item() for o in outputs] == [26, 27, 58, 59]
    assert [o.dtype for o in outputs] == dtypes


def test_threads_do_not_share_state():
    """One denoiser, two threads, each with its own pipeline and schedule."""
    model = Denoiser()
    blockcache.enable(model, Recipe((static(STACK, 0, 1, 5),)))
    barrier = threading.Barrier(2, timeout=10)
    results = {}

    class Pipeline:
        def __init__(self):
            self.transformer, self.scheduler = model, Scheduler(10)

        def __call__(self, name, start):
            outputs = drive(
                model, self.scheduler, range(start, start + 10), before=lambda i: barrier.wait()
            )
            results[name] = outputs

    threads = [threading.Thread(target=Pipeline(), args=(s, s)) for s in (0, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert results[0] == EXPECTED
    # Residuals 15 * 50 + 26, + 15, + 60.
    residual = {0: 776, 1: 791, 2: 791, 3: 791, 4: 791}
    assert results[50] == [50 + i + residual.get(i, 851) for i in range(10)]
    assert calls(model) == [6] * 4


def test_gradients_bypass_the_cache_and_are_right(caplog):
    model, twin = Denoiser(), Denoiser()
    scheduler = usual(model)
    x = column(3).requires_grad_()
    scheduler.step_index = 0
    for i in range(2):
        scheduler.step_index = i
        (gradient,) = torch.autograd.grad(model(x, scheduler.timesteps[i]), x)
        assert gradient.item() == 16
    assert calls(model) == [2] * 4
    assert "gradients are enabled" in caplog.text
    # And a run afterwards is an ordinary one.
    assert drive(model, scheduler, range(10)) == EXPECTED
    del twin


def test_inference_mode_then_no_grad():
    model = Denoiser()
    scheduler = enable(model, static(STACK, 0, total=4, predictor=Taylor(1)), steps=4)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        scheduler.set_timesteps(4)
        with mode():
            outputs = []
            for i in range(4):
                scheduler.step_index = i
                outputs.append(model(column(i), scheduler.timesteps[i]).item())
        assert outputs == [26, 27, 28, 29]


# Interrupted runs.


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", ["block", "loop"])
def test_an_exception_in_the_middle_leaves_nothing_behind(error, place):
    model = Denoiser()
    scheduler = usual(model)
    block = model.blocks[2]
    plain = type(block).forward

    def failing(self, hidden_states):
        if scheduler.step_index == 5:
            raise error("stop")
        return plain(self, hidden_states)

    def before(i):
        if place == "loop" and i == 5:
            raise error("stop")

    if place == "block":
        block.forward = failing.__get__(block)
    with pytest.raises(error):
        drive(model, scheduler, [1000.0 + i for i in range(10)], before)
    block.__dict__.pop("forward", None)
    calls(model)
    # The block itself works as ever, outside of any run.
    with torch.no_grad():
        assert block(column(1)).item() == 5
    calls(model)
    assert drive(model, scheduler, range(10)) == EXPECTED
    assert calls(model) == [3] * 4


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_interrupted_forward_direct_calls_are_plain(error):
    """torch calls no hook for a KeyboardInterrupt: the forward seemed to be still under way."""

    class Raising:
        def __radd__(self, other):
            raise error

        __add__ = __radd__

    model = Denoiser()
    scheduler = enable(model, static(STACK, 0, total=4), steps=4)
    drive(model, scheduler, range(1))
    scheduler.step_index = 1
    model.hint = Raising()
    with torch.no_grad(), pytest.raises(error):
        model(column(1))
    model.hint = None
    with torch.no_grad():
        assert model.blocks[1](column(1)).item() == 4
        assert model.forward(column(1)).item() == 42


def test_two_denoisers_called_in_every_step(caplog):
    """Guidance by a second model: each has its run, neither ends the other's."""

    class Pipeline:
        def __init__(self):
            self.transformer, self.transformer_2 = Denoiser(), Denoiser()
            self.scheduler = Scheduler(8)

        def __call__(self):
            outputs = []
            with torch.no_grad():
                for i in range(8):
                    self.scheduler.step_index = i
                    first = self.transformer(column(i)).item()
                    outputs.append((first, self.transformer_2(column(100 + i)).item()))
            return outputs

    pipe = Pipeline()
    blockcache.enable(pipe, Recipe((static(STACK, 0, 3, total=8),)))
    expected = [(26 + i, 1626 + i) for i in range(3)] + [(71 + i, 1671 + i) for i in range(3, 8)]
    for _ in range(2):
        pipe.scheduler.set_timesteps(8)
        assert pipe() == expected
        assert calls(pipe.transformer) == calls(pipe.transformer_2) == [2] * 4
    assert caplog.text == ""


def test_disabled_in_the_middle_of_a_run():
    model = Denoiser()
    scheduler = enable(model, static(STACK, 0))

    def before(i):
        if i == 5:
            blockcache.disable(model)

    outputs = drive(model, scheduler, range(10), before)
    assert outputs == [26, 27, 28, 29, 30] + [16 * x + 26 for x in range(5, 10)]
    assert calls(model) == [6] * 4


def test_enabled_in_the_middle_of_a_run():
    """The rest of the run is a run: it begins with a computed step."""
    model = Denoiser()
    scheduler = Scheduler()

    def before(i):
        if i == 5:
            recipe = Recipe((static(STACK, 0, 2, total=5),))
            blockcache.enable(model, recipe, scheduler=scheduler)

    outputs = drive(model, scheduler, range(10), before)
    assert outputs == [*(16 * x + 26 for x in range(6)), 107, 138, 139, 140]
