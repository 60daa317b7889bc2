"""What blockcache itself costs: `python -m benchmarks.cost`.

A Flux-like transformer, 256 wide, one CPU thread, in a bare loop.
Each figure is a ratio of two ways to do the same step, measured side by side in one run:

* nothing reused: a plan that computes everything, and a gate that never fires, over the plain
  model;
* all reused: a step that skips the whole stack, over the parts that must run in any case: the same
  model with its blocks taken out and a stored residual added in their place.
"""

import json
import logging
import statistics
import time
from pathlib import Path

import click
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn

import blockcache
from blockcache.plan import Every, Gate, MaskTable, Recipe, Rule, Site
from blockcache.tuning import environment

RESULTS = Path(__file__).resolve().parent / "results" / "cost.json"

WIDTH, TEXT, STEPS = 256, 16, 12


def transformer() -> FluxTransformer2DModel:
    """A Flux transformer of 2 double and 6 single blocks with random weights."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    return model.eval()


def inputs(tokens: int) -> dict[str, torch.Tensor]:
    """Inputs of one denoiser call."""
    side = int(tokens**0.5)
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(side) * 1.0, torch.arange(side) * 1.0)
    return {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, WIDTH),
        "pooled_projections": torch.randn(1, 64),
        "img_ids": grid,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def step_seconds(
    model: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler, tokens: int
) -> list[float]:
    """Seconds of each denoiser call of one run."""
    scheduler.set_timesteps(STEPS)
    given, seconds = inputs(tokens), []
    for t in scheduler.timesteps:
        begin = time.perf_counter()
        out = model(timestep=t[None] / 1000, return_dict=False, **given)[0]
        seconds.append(time.perf_counter() - begin)
        given["hidden_states"] = scheduler.step(out, t, given["hidden_states"]).prev_sample
    return seconds


class _Nothing(nn.Module):
    """Stands where a Flux block stood and hands its inputs on."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return encoder_hidden_states, hidden_states


class _Residual(nn.Module):
    """Stands where the last block stood and adds a stored residual to both streams."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.image, self.text = torch.randn(1, tokens, WIDTH), torch.randn(1, TEXT, WIDTH)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return encoder_hidden_states + self.text, hidden_states + self.image


def without_blocks(model: FluxTransformer2DModel, tokens: int) -> FluxTransformer2DModel:
    """The model with its blocks taken out: what every reused step still has to do."""
    bare = transformer()
    bare.load_state_dict(model.state_dict())
    bare.transformer_blocks = nn.ModuleList(_Nothing() for _ in model.transformer_blocks)
    singles = len(model.single_transformer_blocks)
    bare.single_transformer_blocks = nn.ModuleList(
        [*(_Nothing() for _ in range(singles - 1)), _Residual(tokens)]
    )
    return bare


@torch.no_grad()
def measure(repeats: int) -> dict[str, float]:
    """Ratios, each the median over `repeats` interleaved runs."""
    plain, enabled = transformer(), transformer()
    scheduler = FlowMatchEulerDiscreteScheduler()
    reuse_all = Recipe((Rule(Site("stack"), MaskTable(((0,),), STEPS)),), name="all")
    never = Recipe((Rule(Site("stack"), Every(1)),), name="never")
    closed = Recipe((Rule(Site("span", 1), Gate(0.0)),), name="closed gate")
    cases = (
        ("nothing reused, 256 tokens", never, plain, 256),
        ("gate never fires, 256 tokens", closed, plain, 256),
        ("all reused, 256 tokens", reuse_all, without_blocks(plain, 256), 256),
        ("all reused, 1024 tokens", reuse_all, without_blocks(plain, 1024), 1024),
    )
    pairs: dict[str, list[float]] = {name: [] for name, *_ in cases}
    for _ in range(repeats):
        for name, recipe, reference, tokens in cases:
            with blockcache.enabled(enabled, recipe, scheduler=scheduler):
                ours, theirs = [], []
                for _ in range(3):
                    theirs += step_seconds(reference, scheduler, tokens)[1:]
                    ours += step_seconds(enabled, scheduler, tokens)[1:]
            # The quietest steps: anything else that runs on the machine only ever adds time.
            pairs[name].append(min(ours) / min(theirs))
    return {name: statistics.median(ratios) for name, ratios in pairs.items()}


LIMITS = {"nothing": 1.01, "gate": 1.02, "all": 1.05}


def markdown(ratios: dict[str, float]) -> str:
    """The table for the README."""
    rows = [f"| {n} | {r:.3f} | {LIMITS[n.split()[0]]:.2f} |" for n, r in ratios.items()]
    size = f"Flux-like, {WIDTH} wide, 8 blocks, one CPU thread"
    head = f"| {size} | ratio | limit |\n|---|--:|--:|"
    return "\n".join((head, *rows))


@click.command()
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
@click.option("--repeats", default=7, show_default=True)
def main(file: Path, repeats: int) -> None:
    """Print the cost table and write it as JSON."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    ratios = measure(repeats)
    click.echo(markdown(ratios))
    data = {"versions": environment.versions(), "machine": environment.machine("cpu")}
    data |= {"ratios": ratios, "markdown": markdown(ratios)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
