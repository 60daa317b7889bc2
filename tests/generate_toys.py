"""A pipeline that costs nothing, and what child processes of the batch tests run."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tiny_pipelines
from blockcache.pipelines.generate import generate
from blockcache.pipelines.generate import run as run_module


class Toy:
    """Makes noise pictures from seed and prompt. `fails` maps words to what they raise."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, pace_s: float = 0.0, fails: dict[str, Any] | None = None) -> None:
        self.pace_s, self.fails, self.calls = pace_s, fails or {}, []

    def __call__(
        self,
        prompt: list[str],
        generator: list[torch.Generator],
        negative_prompt: list[str] | None = None,
        num_inference_steps: int = 4,
        height: int = 8,
        width: int = 8,
        guidance_scale: float = 1.0,
        output_type: str = "np",
    ) -> tuple[np.ndarray]:
        self.calls.append(list(prompt))
        for text in prompt:
            for word, error in self.fails.items():
                if word in text:
                    raise error(len(prompt)) if callable(error) else error
        time.sleep(self.pace_s)
        noise = [torch.rand(height, width, 3, generator=g) for g in generator]
        tints = [sum(text.encode()) % 97 / 97 for text in prompt]
        return (np.stack([(n * 0.5 + t * 0.5).numpy() for n, t in zip(noise, tints, strict=True)]),)


def flux() -> tuple[Any, dict[str, Any]]:
    """A tiny Flux and the settings of small items."""
    pipe, _ = tiny_pipelines.flux(layers=1)
    arguments = {"max_sequence_length": 16, "guidance_scale": 3.5}
    return pipe, {"steps": 5, "height": 16, "width": 16, "arguments": arguments}


def in_child(rank: int, kind: str, prompts: str, out: str, settings: dict[str, Any]) -> None:
    """Generate as one process of several; what a test kills."""
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    run_module._POLL_S = 0.02
    pace_s = settings.pop("pace_s", 0.0)
    pipe, usual = flux() if kind == "flux" else (Toy(pace_s), {"plan": "none"})
    for _ in generate(prompts, pipe, out, **{**usual, **settings}):
        pass


def command_in_child(arguments: list[str], output: str) -> None:
    """The command line, its output going to a file."""
    from blockcache.pipelines.cli import main

    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    main(arguments)


def manifest(out: Path) -> list[dict[str, Any]]:
    """The merged manifest; every line must be whole."""
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def pictures(out: Path) -> dict[str, bytes]:
    """The files of the items."""
    return {path.name: path.read_bytes() for path in (out / "items").iterdir()}


def split_in_child(
    rank: int, world: int, name: str, what: Any, meeting: str, answers: Any, **size: int
) -> None:
    """Render with a tiny model whose tokens are split over `world` processes, and answer.

    The answer: rank, picture, which blocks were computed in which step, by branch.
    """
    import blockcache

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    pipe, arguments = tiny_pipelines.BUILDERS[name](heads=4)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
        )
        _split_tokens(pipe.transformer, world)
    if what is not None:
        blockcache.enable(pipe, what)
    picture = tiny_pipelines.generate(pipe, arguments | size, steps=12)
    maps = []
    if what is not None:
        maps = [branch["map"] for branch in blockcache.summary(pipe).as_dict()["branches"]]
    answers.put((rank, picture, maps))
    answers.close()
    answers.join_thread()
    if world > 1:
        torch.distributed.destroy_process_group()


def _split_tokens(transformer: Any, world: int) -> None:
    """Diffusers' own context parallelism, which wants an accelerator to count."""
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("ring", "ulysses"))
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1
    try:
        config = ContextParallelConfig(ulysses_degree=world, mesh=mesh)
        transformer.enable_parallelism(config=config)
    finally:
        torch.accelerator.device_count = count
