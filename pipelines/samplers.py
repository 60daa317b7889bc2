"""The rivals of caching: fewer steps, on other noise levels, with another sampler.

With an Euler sampler, copying the denoiser's output over several steps *is* taking one larger step,
so every comparison has to carry what fewer steps alone would have given in the same time.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from blockcache.tuning.compare import Arm, Trial

# UniPC takes logarithms of 1 - sigma.
_HIGHEST_FLOW_SIGMA = 1 - 1e-6
_MULTISTEP = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")


def rivals(trial: Trial) -> tuple[Arm, ...]:
    """Fewer steps: as many as fit in the accelerated time, and on the plan's own noise levels.

    Each with the pipeline's own sampler and with UniPC of order 2 (2302.04867), the second-order
    multistep solver that diffusers has for noise-predicting and flow-matching models alike.
    """
    steps = steps_in_time(trial)
    chosen = chosen_steps(trial.computed)
    return (
        Arm("fewer steps", steps),
        _same_sampler_on_plan(trial, chosen),
        _unipc(trial, steps),
        _unipc_on_plan(trial, chosen),
    )


def steps_in_time(trial: Trial) -> int:
    """The number of steps whose wall time comes nearest to the accelerated run's.

    A run costs a fixed part (text encoder, decoder) and a part per step; a second timing tells
    the two apart.
    """
    guess = max(1, round(trial.steps * trial.accelerated_s / trial.baseline_s))
    if guess >= trial.steps:
        return trial.steps
    # Timed in turns, the quietest of each: a busy moment would pass for a fixed cost.
    pairs = [[trial.seconds(Arm("", n)) for n in (guess, trial.steps)] for _ in range(2)]
    few, full = (min(column) for column in zip(*pairs, strict=True))
    per_step = (full - few) / (trial.steps - guess)
    if per_step <= 0:
        return guess
    fixed = full - per_step * trial.steps
    fitting: int = round((trial.accelerated_s - fixed) / per_step)
    return min(trial.steps, max(1, fitting))


def chosen_steps(computed: Sequence[float]) -> tuple[int, ...]:
    """The steps a plan computes, from the share of blocks computed in each.

    A plan that reuses only part of the blocks has no such steps of its own; then it is as many as
    its blocks would fill, those with most of them computed.
    """
    count = max(1, round(sum(computed)))
    ranked = sorted(range(len(computed)), key=lambda i: (i != 0, -computed[i], i))
    return tuple(sorted(ranked[:count]))


def _same_sampler_on_plan(trial: Trial, chosen: Sequence[int]) -> Arm:
    name = "plan's sigmas"
    objection = _no_levels(trial)
    if trial.sigmas is None or objection:
        return Arm(name, len(chosen), objection=objection)
    own = trial.pipe.scheduler
    like = type(own).from_config(_settings(own, type(own)))
    return Arm(name, len(chosen), _pinned(trial, like, trial.sigmas, chosen))


def _unipc(trial: Trial, steps: int) -> Arm:
    objection = _no_unipc(trial)
    if objection:
        return Arm("UniPC", steps, objection=objection)
    like = unipc(trial.pipe.scheduler)
    return Arm("UniPC", steps, lambda: swapped(trial.pipe, like))


def _unipc_on_plan(trial: Trial, chosen: Sequence[int]) -> Arm:
    name = "UniPC, plan's sigmas"
    objection = _no_unipc(trial) or _no_levels(trial)
    if trial.sigmas is None or objection:
        return Arm(name, len(chosen), objection=objection)
    own = trial.pipe.scheduler
    sigmas = trial.sigmas.clamp(max=_HIGHEST_FLOW_SIGMA) if is_flow(own) else trial.sigmas
    return Arm(name, len(chosen), _pinned(trial, unipc(own), sigmas, chosen))


def _no_levels(trial: Trial) -> str:
    """Why the plan's noise levels cannot be given to a sampler, or an empty string."""
    if trial.sigmas is None:
        return f"{type(trial.pipe.scheduler).__name__} has no list of sigmas to choose from"
    if len(trial.computed) != trial.steps:
        return "the denoiser is not called once per branch in every step"
    return ""


def _no_unipc(trial: Trial) -> str:
    scheduler = trial.pipe.scheduler
    if type(scheduler).__name__ in _MULTISTEP:
        return f"{type(scheduler).__name__} is a second-order multistep solver already"
    if getattr(scheduler.config, "invert_sigmas", False):
        return "UniPC has no inverted sigmas"
    if "snr_shift_scale" in scheduler.config:
        return f"UniPC does not know the noise schedule of {type(scheduler).__name__}"
    return ""


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is for flow matching, where sigma runs from 1 to 0."""
    config = scheduler.config
    is_named = "FlowMatch" in type(scheduler).__name__
    return is_named or bool(config.get("use_flow_sigmas", False))


def unipc(scheduler: Any) -> Any:
    """UniPC of order 2 for the same model and noise levels as `scheduler`."""
    from diffusers import UniPCMultistepScheduler

    settings = _settings(scheduler, UniPCMultistepScheduler)
    if is_flow(scheduler):
        settings |= {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "flow_shift": scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0)),
        }
    made = UniPCMultistepScheduler.from_config({**settings, "solver_order": 2})
    if not is_flow(scheduler):
        return made
    plain = made.set_timesteps

    @functools.wraps(plain)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        # UniPC rounds timesteps to integers, which a flow model was not trained on.
        exact = made.sigmas[:-1] * made.config.num_train_timesteps
        made.timesteps = exact.to(made.timesteps.device)

    made.set_timesteps = set_timesteps
    return made


def _settings(scheduler: Any, kind: type) -> dict[str, Any]:
    """Those settings of `scheduler` that samplers of class `kind` know."""
    known = inspect.signature(kind).parameters
    return {key: value for key, value in scheduler.config.items() if key in known}


@contextmanager
def swapped(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Run `pipe` with another scheduler inside a `with` block; its own is put back in any case."""
    own = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = own


def _pinned(
    trial: Trial, scheduler: Any, sigmas: torch.Tensor, chosen: Sequence[int]
) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which `scheduler`, ours to change, visits the `chosen` ones of `sigmas`."""
    levels = torch.cat([sigmas[list(chosen)], sigmas[-1:]])
    timesteps = trial.timesteps[list(chosen)]
    plain = scheduler.set_timesteps

    @functools.wraps(plain)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        scheduler.timesteps = timesteps.to(scheduler.timesteps.device, copy=True)
        scheduler.sigmas = levels.to(scheduler.sigmas.device, scheduler.sigmas.dtype, copy=True)
        scheduler.num_inference_steps = len(timesteps)

    scheduler.set_timesteps = set_timesteps
    return lambda: swapped(trial.pipe, scheduler)
