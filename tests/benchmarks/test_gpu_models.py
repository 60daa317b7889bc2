"""The end-to-end measurement in small, on a CPU: what it builds runs, and its figures add up."""

import dataclasses

import pytest
import torch

from benchmarks import gpu_models

SMALL = {
    "WanTransformer3DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32, "num_layers": 2,
            "text_dim": 16,
        },
        (1, 16, 3, 8, 8), 48,
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16,
            "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
        },
        (1, 16, 3, 8, 8), 48,
    ),
    "FluxTransformer2DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 8,
            "axes_dims_rope": (4, 6, 6), "guidance_embeds": False,
        },
        (1, 16, 64), 24,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SMALL)
def test_every_case_in_small(kind):
    config, latents, tokens = SMALL[kind]
    case = next(case for case in gpu_models.CASES if case.kind == kind)
    small = dataclasses.replace(
        case, config=config, latents=latents, tokens=tokens, heads=2, layers=2, head_dim=16,
        text=8, text_dim=16,
    )  # fmt: skip
    with torch.inference_mode():
        rows = gpu_models.rows(1, "cpu", (small,))
    kinds = ["caching", "sparse", "both"] if small.is_video else ["caching"]
    assert [row["kind"] for row in rows] == kinds
    for row in rows:
        assert row["speedup"] == pytest.approx(row["of_predicted"] * row["predicted"])
    assert rows[0]["predicted"] == 2


def test_the_large_cases_have_the_tokens_they_say():
    """Latents in patches of 1 x 2 x 2 for the videos, text beside the picture in FLUX."""
    for case in gpu_models.CASES:
        if case.is_video:
            _, _, frames, height, width = case.latents
            assert case.tokens == frames * (height // 2) * (width // 2)
        else:
            assert case.tokens == case.latents[1] + case.text
