"""End to end at real sizes, with random weights: what a call of the whole denoiser gains.

Part of `python -m benchmarks.gpu`; needs diffusers. Random weights say nothing about quality and
everything about time. Large models keep their width and lose layers, so that they fit; the share
of attention in a layer stays what it is. Each gain is held against what the skipped work predicts:

* caching: a run of n steps of which c are computed should take c / n of the uncached time;
* sparse: attention of density d should take d of the dense attention's time, measured beside it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from click import echo
from torch import nn

import blockcache
from blockcache.kernels.dense_attention import dense_attention
from blockcache.plan import MaskTable, Recipe, Rule, Site, Sparse, Taylor
from blockcache.sparse import by_name

STEPS, COMPUTED = 8, (0, 1, 2, 5)
DENSITY = 0.15
LEAST = {"caching": 0.97, "sparse": 0.90}
"""Of the predicted gain: what is aimed at."""


@dataclass(frozen=True)
class Case:
    """A denoiser at a size.

    kind: class name in diffusers. config: its settings. latents: shape. tokens, heads, head_dim:
    of its self-attention, layers: how many of them.
    """

    name: str
    kind: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    tokens: int
    heads: int
    layers: int
    head_dim: int = 128
    text: int = 512
    text_dim: int = 4096
    is_video: bool = True


CASES = (
    Case(
        "Wan 1.3B, 480p, 81 frames", "WanTransformer3DModel",
        {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
        (1, 16, 21, 60, 104), 32_760, 12, 30,
    ),
    Case(
        "Wan 14B, 720p, 81 frames, 4 layers", "WanTransformer3DModel",
        {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 4},
        (1, 16, 21, 90, 160), 75_600, 40, 4,
    ),
    Case(
        "HunyuanVideo, 720p, 129 frames, 2 + 4 layers", "HunyuanVideoTransformer3DModel",
        {"num_layers": 2, "num_single_layers": 4, "num_refiner_layers": 1},
        (1, 16, 33, 90, 160), 118_800, 24, 6, text=256,
    ),
    Case(
        "FLUX, 1024 x 1024", "FluxTransformer2DModel", {"guidance_embeds": False},
        (1, 4096, 64), 4608, 24, 57, is_video=False,
    ),
)  # fmt: skip


def rows(
    repeats: int, device: str = "cuda", cases: tuple[Case, ...] = CASES
) -> list[dict[str, Any]]:
    """Caching on every case, sparse attention and both on the videos."""
    found = []
    for case in cases:
        try:
            found += _rows_of(case, repeats, device)
        except torch.cuda.OutOfMemoryError:
            echo(f"{case.name}: does not fit here")
    return found


def _rows_of(case: Case, repeats: int, device: str) -> list[dict[str, Any]]:
    model, inputs = built(case, device)
    run = Loop(model, inputs, device)
    attention_s = case.layers * _attention_s(case, repeats, device)
    rule = Rule(Site("stack"), MaskTable((COMPUTED,), STEPS), Taylor(1))
    sparse = Sparse(by_name("cubes", density=DENSITY), dense_steps=0, dense_layers=0)
    ways = {"caching": Recipe((rule,))}
    if case.is_video:
        ways |= {"sparse": Recipe(sparse=sparse), "both": Recipe((rule,), sparse=sparse)}
    found = []
    for kind, recipe in ways.items():
        pairs, summary = run.against(recipe, repeats)
        dense_s = statistics.median(plain for plain, _ in pairs)
        gain = statistics.median(plain / fast for plain, fast in pairs)
        share = len(COMPUTED) / STEPS if recipe.rules else 1.0
        density = (summary.get("attention") or {}).get("density") or 1.0
        saved = STEPS * attention_s * (1 - density)
        predicted = dense_s / (share * max(dense_s - saved, 1e-9))
        row = {
            "what": "end to end", "case": case.name, "kind": kind, "dense_s": dense_s,
            "attention_share": STEPS * attention_s / dense_s, "density": density,
            "speedup": gain, "predicted": predicted, "of_predicted": gain / predicted,
        }  # fmt: skip
        if kind in LEAST:
            row["target"] = LEAST[kind]
            row["meets_target"] = row["of_predicted"] >= LEAST[kind]
        found.append(row)
        echo(
            f"{case.name}, {kind}: {gain:.2f}x, {row['of_predicted']:.1%} of what the skipped "
            f"work predicts"
        )
    del run, model
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


class Loop:
    """A denoiser called in an Euler loop, as a pipeline calls it."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], device: str) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.model, self.inputs, self.device = model, inputs, device
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def seconds(self) -> float:
        """Of one run."""
        self.scheduler.set_timesteps(STEPS, device=self.device)
        latents = self.inputs["hidden_states"]
        _wait(self.device)
        started = time.perf_counter()
        for timestep in self.scheduler.timesteps:
            given = self.inputs | {"hidden_states": latents, "timestep": timestep.expand(1)}
            output = self.model(**given, return_dict=False)[0]
            latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
        _wait(self.device)
        return time.perf_counter() - started

    def against(
        self, recipe: Recipe, repeats: int
    ) -> tuple[list[tuple[float, float]], dict[str, Any]]:
        """Seconds without and with a recipe, in turns, and the last summary."""
        pairs, summary = [], {}
        for number in range(repeats + 1):
            plain = self.seconds()
            blockcache.enable(self.model, recipe, scheduler=self.scheduler)
            fast = self.seconds()
            summary = blockcache.summary(self.model).as_dict()
            blockcache.disable(self.model)
            if number:
                pairs.append((plain, fast))
        return pairs, summary


def built(case: Case, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser with random weights, and what it is called with besides the timestep."""
    import diffusers

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = getattr(diffusers, case.kind).from_config(case.config).to(dtype).eval()
        text = torch.randn(1, case.text, case.text_dim, dtype=dtype)
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(case.latents, dtype=dtype),
            "encoder_hidden_states": text,
        }
        if case.kind != "WanTransformer3DModel":
            width = model.config.get("pooled_projection_dim", 768)
            inputs["pooled_projections"] = torch.randn(1, width, dtype=dtype)
        if case.kind == "HunyuanVideoTransformer3DModel":
            inputs["encoder_attention_mask"] = torch.ones(1, case.text, dtype=dtype)
            inputs["guidance"] = torch.full((1,), 6000.0, dtype=dtype)
        if case.kind == "FluxTransformer2DModel":
            side = int(case.latents[1] ** 0.5)
            along = torch.arange(side, dtype=dtype)
            places = torch.cartesian_prod(torch.zeros(1, dtype=dtype), along, along)
            inputs |= {
                "img_ids": places,
                "txt_ids": torch.zeros(case.text, 3, dtype=dtype),
            }
    return model, inputs


def _attention_s(case: Case, repeats: int, device: str) -> float:
    """Seconds of one dense self-attention, by the fastest of torch and our own loop."""
    shape = (1, case.tokens, case.heads, case.head_dim)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    swapped = [t.transpose(1, 2) for t in (q, k, v)]
    calls: list[Callable[[], object]] = [
        lambda: torch.nn.functional.scaled_dot_product_attention(*swapped),
        lambda: dense_attention(q, k, v),
    ]
    return min(_seconds(call, repeats, device) for call in calls)


def _seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    call()
    times = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
