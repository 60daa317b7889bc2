"""How local is the video model's attention, and how much of the time does it take?

    python -m blockcache.pipelines.embedded.video_attention --model FOLDER

Recall of a share of blocks: for each block of 64 queries, the attention mass in the share of key
blocks (64 keys each) that hold most of it. It is what a perfect choice of blocks would keep.
"""

import argparse
import logging
from typing import Any

import torch

from blockcache.pipelines import models
from blockcache.pipelines.embedded import world_video

BLOCK = 64
SHARES = (0.1, 0.25)


class RecallProcessor:
    """Wan attention that notes the recall of the best blocks: ``[layers, heads, shares]``.

    inner: diffusers' own, which does the work.
    """

    def __init__(self, recalls: list[torch.Tensor], inner: Any) -> None:
        self.recalls, self.inner = recalls, inner

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' own."""
        rotary: Any = kwargs.get("rotary_emb", args[2] if len(args) > 2 else None)
        query, key = (
            _rotate(norm(linear(hidden_states)).unflatten(2, (attn.heads, -1)), *rotary)
            for norm, linear in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        self.recalls.append(recall(query[0].transpose(0, 1), key[0].transpose(0, 1)))
        return self.inner(attn, hidden_states, *args, **kwargs)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin


def recall(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Attention mass in the best blocks, ``[heads, shares]``; inputs ``[heads, tokens, size]``."""
    rows = []
    for q, k in zip(query, key, strict=True):
        mass = (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)
        blocks = mass.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum(3).mean(1)
        held = blocks.sort(descending=True).values.cumsum(1).mean(0)
        rows.append(torch.stack([held[round(share * len(held)) - 1] for share in SHARES]))
    return torch.stack(rows)


def attention_share(transformer: Any, inputs: dict[str, Any]) -> float:
    """Share of a forward's time that is spent in self-attention's softmax and two products."""
    with torch.profiler.profile(record_shapes=True) as profile:
        transformer(**inputs)
    events = profile.key_averages(group_by_input_shape=True)
    total = sum(event.self_cpu_time_total for event in events)
    length = inputs["hidden_states"].shape[2:].numel()
    attention = sum(
        event.self_cpu_time_total
        for event in events
        if "scaled_dot_product" in event.key and event.input_shapes[1][2:3] == [length]
    )
    share: float = attention / total
    return share


@torch.no_grad()
def main() -> None:
    """Command line."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description="Measure the video model's self-attention.")
    parser.add_argument("--model", default="tiny-video", help="its name, or a pipeline folder")
    parser.add_argument("--steps", type=int, help="inference steps, if not the model's own")
    parser.add_argument("--every", type=int, default=4, help="look at one step in so many")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    model = models.find(args.model)
    pipeline = models.load(model, torch.device("cpu"))
    call = model.call | ({"num_inference_steps": args.steps} if args.steps else {})
    console = Console()
    seen: list[dict[str, Any]] = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named), with_kwargs=True
    )
    prompt = world_video.held_out_prompts(1, seed=1)[0]
    generator = torch.Generator().manual_seed(1)
    pipeline(prompt, generator=generator, output_type="latent", **call)
    handle.remove()
    share = attention_share(pipeline.transformer, seen[0])
    console.print(f"self-attention takes {100 * share:.0f} % of a forward's time")
    recalls: list[torch.Tensor] = []
    for block in pipeline.transformer.blocks:
        attention = block.attn1
        attention.set_processor(RecallProcessor(recalls, attention.processor))
    # With guidance each step is two forwards; the first is with the caption.
    forwards = 2 if call.get("guidance_scale", 5.0) > 1 else 1
    looked = seen[:: forwards * args.every]
    for inputs in looked:
        pipeline.transformer(**inputs)
    table = torch.stack(recalls).unflatten(0, (len(looked), -1))
    console.print(f"mass in the best {SHARES} of key blocks: {table.mean((0, 1, 2)).tolist()}")
    for step, rows in enumerate(table.mean((1, 2))):
        console.print(f"step {step * args.every}: {rows.tolist()}")
    for layer, rows in enumerate(table.mean(0)):
        console.print(f"layer {layer}, each head: {rows.tolist()}")


if __name__ == "__main__":
    main()
