"""The embedded policy as a diffusers pipeline, and how it is run in the simulator."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from blockcache.pipelines.embedded.policy import task
from blockcache.pipelines.embedded.policy.model import PolicyTransformer

FOLDER = Path(__file__).parent / "weights"
EXECUTED = 8
"""Actions of a chunk that are carried out before the next chunk is asked for."""


@dataclass
class PolicyOutput(BaseOutput):
    """actions: `[B, horizon, 2]`, displacements of the agent in units of `task.SPEED`."""

    actions: Any


class PolicyPipeline(DiffusionPipeline):
    """Draws chunks of actions for what was observed.

    transformer: a `PolicyTransformer`. scheduler: a diffusers scheduler for predicted noise.
    """

    def __init__(self, transformer: PolicyTransformer, scheduler: Any) -> None:
        super().__init__()
        register: Any = self.register_modules
        register(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        observation: torch.Tensor | None = None,
        num_inference_steps: int = 100,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> PolicyOutput | tuple[Any]:
        """One chunk for each observation.

        prompt: situations in words, see `written`; instead of an observation, so that this
            pipeline is called like any other. observation: `[B, frames, 6]`, oldest frame first,
            see `task.observe`.
        num_inference_steps: sampler steps; the model was trained with 100. output_type: "pt",
            "latent" (the same) or "np". callback_on_step_end: called as
            `(pipeline, i, t, {"latents": actions})`.

        Raises:
            ValueError: neither prompt nor observation, or both, or a prompt that is no situation.
        """
        if (prompt is None) == (observation is None):
            raise ValueError("give either prompt or observation")
        seen = read(prompt) if observation is None else observation
        config, dtype = self.transformer.config, self.transformer.dtype
        seen = seen.to(self.device, dtype)
        shape = (len(seen), config.horizon, config.action_size)
        actions = randn_tensor(shape, generator, self.device, dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        # Only samplers that draw noise take a generator.
        takes = inspect.signature(self.scheduler.step).parameters
        chance = {"generator": generator} if "generator" in takes else {}
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            scaled = self.scheduler.scale_model_input(actions, t)
            noise = self.transformer(scaled, t, seen, return_dict=False)[0]
            actions = self.scheduler.step(noise, t, actions, **chance).prev_sample
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {"latents": actions})
        made = actions.cpu().numpy() if output_type == "np" else actions
        return PolicyOutput(made) if return_dict else (made,)


def written(frames: torch.Tensor) -> list[str]:
    """Situations in words: x and y of agent, disc and goal, frames parted by a bar, oldest first.

    frames: `[N, frames, 3, 2]`, states as in `task`.
    """
    return [
        " | ".join(" ".join(f"{x:.4f}" for x in state.flatten()) for state in frame)
        for frame in frames
    ]


def read(prompt: str | Sequence[str] | None) -> torch.Tensor:
    """Observations `[B, frames, 6]` of situations in words; one frame alone stands still.

    Raises:
        ValueError: not six numbers in a frame.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    try:
        frames = [[[float(x) for x in f.split()] for f in text.split("|")] for text in texts]
        states = torch.tensor([f * 2 if len(f) == 1 else f for f in frames]).unflatten(2, (3, 2))
        seen: torch.Tensor = task.observe(states.flatten(0, 1)).unflatten(0, (len(texts), -1))
    except (ValueError, RuntimeError, IndexError):
        raise ValueError(
            f"expected situations such as '0.1 -0.8 0 0.2 0.5 0.5' (x and y of agent, disc and "
            f"goal; frames parted by |), found {texts!r:.80}"
        ) from None
    return seen


def load_pipeline(folder: str | Path = FOLDER) -> PolicyPipeline:
    """The trained policy in float32, without a progress bar."""
    pipe: Any = PolicyPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    loaded: PolicyPipeline = pipe
    return loaded


@dataclass(frozen=True)
class Rollout:
    """Closed-loop episodes. success: `[N]`. steps: `[N]`, control steps until success or the limit.

    states: `[T + 1, N, 3, 2]`. chunks: how often the policy was asked.
    """

    success: torch.Tensor
    steps: torch.Tensor
    states: torch.Tensor
    chunks: int


def roll_out(
    chunk: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    limit: int = task.LIMIT,
) -> Rollout:
    """Let a policy act in a batch of episodes; those that succeeded stand still.

    chunk: from observations `[B, 2, 6]` to actions `[B, horizon, 2]`. start: `[N, 3, 2]`.
    """
    states = [start, start]
    steps = torch.full((len(start),), limit)
    running, chunks = torch.arange(len(start)), 0
    for begin in range(0, limit, EXECUTED):
        seen = torch.stack([task.observe(states[-2]), task.observe(states[-1])], 1)[running]
        actions, chunks = chunk(seen), chunks + 1
        for k in range(min(EXECUTED, limit - begin)):
            state = states[-1].clone()
            state[running] = task.act(state[running], actions[:, k])
            states.append(state)
            is_new = task.is_done(state) & (steps == limit)
            steps[is_new] = begin + k + 1
            keep = ~task.is_done(state[running])
            running, actions = running[keep], actions[keep]
        if not len(running):
            break
    done = task.is_done(states[-1])
    return Rollout(done, steps, torch.stack(states[1:]), chunks)
