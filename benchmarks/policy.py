"""The embedded diffusion policy under caches and with fewer steps: `python -m benchmarks.policy`.

Closed-loop success of every way to sample, from the same starts, and the wall time of one chunk of
actions. Uncached; every sub-layer at the same evenly spaced steps; BAC (2506.13456) with the
schedule of the first self-attention for all, with one for each, and with bubbling, at several
numbers of updates. The rivals: fewer steps of the same sampler and of two others, also as many DDPM
steps as fit in BAC's time. Calibration, episodes and training use different random numbers. Writes
`benchmarks/results/policy.json`.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

import blockcache
from benchmarks.presets import commit
from blockcache import Recipe
from blockcache.methods.bac import bac
from blockcache.pipelines.embedded.policy import task
from blockcache.pipelines.embedded.policy.pipeline import (
    PolicyPipeline,
    load_pipeline,
    read,
    roll_out,
    written,
)
from blockcache.pipelines.options import quiet_hosts
from blockcache.plan import MaskTable, Rule, Site
from blockcache.plan.spec import to_json
from blockcache.plan.trace import Trace
from blockcache.tuning import environment

RESULTS = Path(__file__).resolve().parent / "results" / "policy.json"
STEPS = 100
UPDATES = (5, 10, 20)
KINDS = ("attn", "cross", "mlp")
START_SEED, NOISE_SEED, CALIBRATION_SEED = 1_000_001, 1_000_002, 1_000_003


@dataclass
class Arm:
    """One way to sample. recipe: what is enabled, if anything. steps: sampler steps."""

    name: str
    steps: int = STEPS
    recipe: Recipe | None = None
    sampler: type = DDPMScheduler
    computed: float = 1.0
    """Share of sub-layer calls that are computed, of those the uncached run makes."""
    success: int = 0
    episodes: int = 0
    mean_steps: float = 0.0
    drift: float | None = None
    """Root mean square difference of the actions from the uncached ones with the same noise."""
    chunk_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    """CPU and wall time of a chunk, one entry per turn."""

    def pipeline(self, pipe: PolicyPipeline) -> PolicyPipeline:
        """The policy with this arm's sampler and cache; shares its weights with all others."""
        scheduler = self.sampler.from_config(pipe.scheduler.config)
        made: Any = PolicyPipeline(pipe.transformer, scheduler)
        made.set_progress_bar_config(disable=True)
        blockcache.disable(made)
        if self.recipe is not None:
            blockcache.enable(made, self.recipe)
        loaded: PolicyPipeline = made
        return loaded

    def sampling(self, pipe: PolicyPipeline, seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """From observations to actions, with its own noise."""
        made, noise = self.pipeline(pipe), torch.Generator().manual_seed(seed)

        def chunk(seen: torch.Tensor) -> torch.Tensor:
            actions: torch.Tensor = made(
                observation=seen, num_inference_steps=self.steps, generator=noise
            ).actions
            return actions

        return chunk


def calibration(pipe: PolicyPipeline, runs: int) -> Trace:
    """A trace of uncached runs in situations from the midst of demonstrations."""
    generator = torch.Generator().manual_seed(CALIBRATION_SEED)
    states = task.demonstrate(runs, generator).states
    when = torch.randint(1, 24, (runs,), generator=generator)
    frames = torch.stack([states[when - 1, range(runs)], states[when, range(runs)]], 1)
    return blockcache.trace(pipe, written(frames), scopes=KINDS, num_inference_steps=STEPS)


def alike(steps: Sequence[int]) -> Recipe:
    """Every sub-layer computed at the same steps."""
    table = MaskTable((tuple(steps),), STEPS)
    return Recipe(tuple(Rule(Site(kind), table, payload="output") for kind in KINDS))


def first_row(recipe: Recipe) -> Sequence[int]:
    """The steps of the first self-attention."""
    policy = recipe.rules[0].policy
    return policy.computed[0] if isinstance(policy, MaskTable) else ()


def computed_share(recipe: Recipe, layers: int) -> float:
    """Share of a recipe's sub-layer calls that are computed."""
    tables = [rule.policy.computed for rule in recipe.rules if isinstance(rule.policy, MaskTable)]
    rows = [row for table in tables for row in (table if len(table) > 1 else table * layers)]
    return sum(map(len, rows)) / (STEPS * len(rows))


def cached_arms(trace: Trace, layers: int) -> list[Arm]:
    """Uniform caching and BAC at every number of updates."""
    arms = []
    for n in UPDATES:
        each, bubbled = bac(trace, n, 0), bac(trace, n, 3)
        arms += [
            Arm(f"uniform, {n} updates", recipe=alike(range(0, STEPS, STEPS // n))),
            Arm(f"BAC, {n} updates, one schedule", recipe=alike(first_row(each))),
            Arm(f"BAC, {n} updates, no bubbling", recipe=each),
            Arm(f"BAC, {n} updates, bubbling to 3", recipe=bubbled),
        ]
    for arm in arms:
        if arm.recipe is not None:
            arm.computed = computed_share(arm.recipe, layers)
    return arms


def rival_arms() -> list[Arm]:
    """Fewer steps."""
    samplers = {
        "DDPM": DDPMScheduler,
        "DDIM": DDIMScheduler,
        "DPM-Solver++": DPMSolverMultistepScheduler,
    }
    return [
        Arm(f"{name}, {steps} steps", steps=steps, sampler=kind, computed=steps / STEPS)
        for name, kind in samplers.items()
        for steps in UPDATES
    ]


def same_time_arms(arms: Sequence[Arm]) -> list[Arm]:
    """As many DDPM steps as take the time that full BAC takes."""
    made = []
    step_ms = min(arms[0].chunk_ms) / STEPS
    for arm in arms:
        if arm.name.startswith("BAC") and arm.name.endswith("3"):
            steps = round(min(arm.chunk_ms) / step_ms)
            name = f"DDPM, {steps} steps (the time of {arm.name})"
            made.append(Arm(name, steps=steps, computed=steps / STEPS))
    return made


def measure_time(arms: Sequence[Arm], pipe: PolicyPipeline, repeats: int) -> None:
    """Milliseconds of one chunk for one robot, the arms in turns.

    One thread that never waits: its CPU time is the wall time of a machine that does nothing else,
    and what the table shows. The quickest turn counts.
    """
    seen = read(written(task.draw(1, torch.Generator().manual_seed(START_SEED))[:, None]))
    for turn in range(repeats + 1):
        for arm in arms:
            chunk = arm.sampling(pipe, NOISE_SEED)
            began, wall = time.process_time(), time.perf_counter()
            chunk(seen)
            # The first turn warms up.
            if turn:
                arm.chunk_ms.append(1e3 * (time.process_time() - began))
                arm.wall_ms.append(1e3 * (time.perf_counter() - wall))


def measure_success(arm: Arm, pipe: PolicyPipeline, episodes: int) -> None:
    """Closed-loop episodes, every arm from the same starts."""
    start = task.draw(episodes, torch.Generator().manual_seed(START_SEED))
    made = roll_out(arm.sampling(pipe, NOISE_SEED), start)
    arm.success, arm.episodes = int(made.success.sum()), episodes
    arm.mean_steps = float(made.steps.float().mean())


def measure_drift(arms: Sequence[Arm], pipe: PolicyPipeline) -> None:
    """How far the actions of cached arms are from the uncached ones, same noise."""
    start = task.draw(64, torch.Generator().manual_seed(START_SEED + 1))
    seen = read(written(start[:, None]))
    true = Arm("uncached").sampling(pipe, NOISE_SEED)(seen)
    for arm in arms:
        if arm.recipe is not None:
            found = arm.sampling(pipe, NOISE_SEED)(seen)
            arm.drift = float((found - true).square().mean().sqrt())


def interval(success: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    centre = (success + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(success * (n - success) / n + z * z / 4)
    return centre - half, centre + half


HEAD = ("", "computed", "ms per chunk", "speed-up", "success %", "95 % interval", "steps", "drift")


def table(arms: Sequence[Arm]) -> str:
    """The markdown table."""
    base = min(arms[0].chunk_ms)
    lines = [" | ".join(HEAD), " | ".join(["---"] + ["--:"] * (len(HEAD) - 1))]
    for arm in arms:
        low, high = interval(arm.success, arm.episodes)
        ms = min(arm.chunk_ms)
        cells = (
            arm.name,
            f"{arm.computed:.0%}",
            f"{ms:.0f}",
            f"{base / ms:.2f}x",
            f"{100 * arm.success / arm.episodes:.1f}",
            f"{100 * low:.1f} - {100 * high:.1f}",
            f"{arm.mean_steps:.1f}",
            "-" if arm.drift is None else f"{arm.drift:.3f}",
        )
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--episodes", type=click.IntRange(1), default=200, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=9, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=8, show_default=True, help="Calibration.")
def main(file: Path, episodes: int, repeats: int, runs: int) -> None:
    """Measure every arm, print the table and write it as JSON."""
    torch.set_num_threads(1)
    quiet_hosts()
    pipe = load_pipeline()
    trace = calibration(pipe, runs)
    layers = len(pipe.transformer.transformer_blocks)
    arms = [Arm("uncached, DDPM 100 steps"), *cached_arms(trace, layers), *rival_arms()]
    measure_time(arms, pipe, repeats)
    timed = same_time_arms(arms)
    measure_time(timed, pipe, repeats)
    arms += timed
    measure_drift(arms, pipe)
    for arm in arms:
        measure_success(arm, pipe, episodes)
        click.echo(f"{arm.name}: {arm.success} of {arm.episodes}", err=True)
    machine = environment.machine("cpu")
    versions = environment.versions()
    title = (
        f"{episodes} episodes of the embedded policy; CPU ms per chunk of 16 actions, one robot; "
        f"{runs} calibration runs; {machine['cpu']}, 1 thread, float32; torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}; commit {commit()}"
    )
    text = "\n".join([table(arms), "", f"*{title}*"])
    click.echo(text)
    found = [
        {**vars(arm), "recipe": to_json(arm.recipe), "sampler": arm.sampler.__name__}
        for arm in arms
    ]
    data = {"commit": commit(), "versions": versions, "machine": machine}
    data |= {"episodes": episodes, "arms": found, "markdown": text}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
