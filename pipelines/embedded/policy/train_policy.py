"""Trains the embedded diffusion policy and writes its pipeline folder.

    python -m blockcache.pipelines.embedded.policy.train_policy --out DIR

Predicts the noise in chunks of the expert's actions, DDPM with 100 steps and the squared-cosine
schedule as in Diffusion Policy (2303.04137). Demonstrations are made as they are needed, so none is
seen twice; half of them are disturbed, without which the policy does not learn to correct itself.
AdamW, learning rate up over the first hundredth and down along a cosine, an exponential average of
the weights for export. One CPU thread is enough.
"""

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch.nn import functional as F

from blockcache.pipelines.embedded.policy import task
from blockcache.pipelines.embedded.policy.model import PolicyTransformer
from blockcache.pipelines.embedded.policy.pipeline import PolicyPipeline, load_pipeline

logger = logging.getLogger(__name__)

STEPS, HORIZON = 100, 16
DISTURBANCE = 0.5
_DEMONSTRATIONS = 1024
_KEEP = 0.999
_REPORT = 200


def make_scheduler() -> Any:
    """The sampler that the policy is trained for."""
    # By name: diffusers takes what was passed by position for a default and forgets it.
    return DDPMScheduler(
        num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2", clip_sample=True
    )


def windows(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Every chunk of `n` demonstrations up to their success, in random order.

    Half of the demonstrations are disturbed; the actions are the expert's undisturbed ones.
    Observations `[N, 2, 6]` and the actions from there on, `[N, HORIZON, 2]`.
    """
    parts = [_windows(n // 2, generator, noise) for noise in (0.0, DISTURBANCE)]
    observations, actions = (torch.cat(part) for part in zip(*parts, strict=True))
    order = torch.randperm(len(actions), generator=generator)
    return observations[order], actions[order]


def _windows(n: int, generator: torch.Generator, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    states, side = task.demonstrate(n, generator, noise)
    is_running = torch.stack([~task.is_done(state) for state in states[:-1]])
    before = torch.cat([states[:1], states[:-2]])[is_running]
    current = states[:-1][is_running]
    actions = task.intended(current, side.expand_as(is_running)[is_running], HORIZON)
    return torch.stack([task.observe(before), task.observe(current)], 1), actions


def batches(size: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of fresh demonstrations."""
    while True:
        observations, actions = windows(_DEMONSTRATIONS, generator)
        for i in range(0, len(actions) - size + 1, size):
            yield observations[i : i + size], actions[i : i + size]


def loss_of(
    model: PolicyTransformer,
    scheduler: Any,
    observations: torch.Tensor,
    actions: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean square error of the predicted noise at random noise levels."""
    noise = torch.randn(actions.shape, generator=generator)
    t = torch.randint(0, STEPS, (len(actions),), generator=generator)
    noisy = scheduler.add_noise(actions, noise, t)
    return F.mse_loss(model(noisy, t, observations, return_dict=False)[0], noise)


def train(
    model: PolicyTransformer, steps: int, batch: int, lr: float, generator: torch.Generator
) -> tuple[PolicyTransformer, list[float]]:
    """The averaged model, and the mean loss of every 200 steps."""
    scheduler = make_scheduler()
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _factor(i, steps))
    losses: list[float] = []
    recent, began = 0.0, time.monotonic()
    for i, (observations, actions) in zip(range(steps), batches(batch, generator), strict=False):
        loss = loss_of(model, scheduler, observations, actions, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            keep = min(_KEEP, (1 + i) / (10 + i))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        recent += loss.item() / _REPORT
        if (i + 1) % _REPORT == 0:
            losses.append(round(recent, 5))
            rate = (i + 1) * batch / (time.monotonic() - began)
            logger.info("step %d loss %.4f, %.0f chunks/s", i + 1, recent, rate)
            recent = 0.0
    return average.eval(), losses


def _factor(step: int, steps: int) -> float:
    rise = steps // 100 + 1
    return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * step / steps) + 1e-3)


def save(model: Any, losses: list[float], folder: Path) -> None:
    """Write the pipeline folder with weights in float16, and the losses."""
    PolicyPipeline(model.half(), make_scheduler()).save_pretrained(folder)
    # Where the weights of `--init` came from is of this machine only.
    file = folder / "transformer" / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "_name_or_path"}
    file.write_text(json.dumps(config, indent=2) + "\n")
    text = json.dumps({"mean loss of every 200 steps": losses}, indent=1)
    (folder / "train_log.json").write_text(text + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the embedded diffusion policy.")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--init", type=Path, help="pipeline folder to start from")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128, help="chunks per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = load_pipeline(args.init).transformer if args.init else PolicyTransformer()
    save(*train(model.train(), args.steps, args.batch, args.lr, generator), args.out)


if __name__ == "__main__":
    main()
