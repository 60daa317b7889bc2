"""The embedded model as a stock FluxPipeline: built with random weights, loaded, written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockcache.pipelines.embedded import linear_vae, text, world

LATENT = world.SIZE_PX // linear_vae.PATCH
IMAGE_TOKENS = (LATENT // 2) ** 2
TRAINED_PARTS = ("transformer", "text_encoder", "text_encoder_2")


def make_pipeline() -> Any:
    """A pipeline with random transformer and text encoders and the closed-form VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * linear_vae.CHANNELS,
        num_layers=2,
        num_single_layers=12,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )
    _start_as_identity(transformer)
    generator = torch.Generator().manual_seed(0)
    _, images = world.draw_batch(world.Painter(), 512, generator)
    tokenizer = text.make_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=linear_vae.make_vae(*linear_vae.fit_patches(images)),
        text_encoder=text.make_clip(),
        tokenizer=tokenizer,
        text_encoder_2=text.make_t5(),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def _start_as_identity(transformer: Any) -> None:
    """Zero every modulation and the output, so that deep narrow models start well."""
    with torch.no_grad():
        for name, module in transformer.named_modules():
            modulation = name.endswith("linear") and "norm" in name
            if isinstance(module, nn.Linear) and (modulation or name == "proj_out"):
                module.weight.zero_()
                module.bias.zero_()


def load_pipeline(folder: str | Path) -> Any:
    """The pipeline in ``folder``, in float32; a T5 that sees padding is replaced by a new one."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder)
    if not text.padding_is_separate(pipeline.text_encoder_2):
        pipeline.register_modules(text_encoder_2=text.make_t5())
    return pipeline


def save_pipeline(pipeline: Any, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Put ``weights`` (names as in ``nn.ModuleDict`` of TRAINED_PARTS) in and write the folder.

    The diffusers parts are stored in float16 (they load as float32), the text encoders in float32
    (transformers keeps the stored type, and the parts must agree).
    """
    for part in TRAINED_PARTS:
        start = f"{part}."
        of_part = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        getattr(pipeline, part).load_state_dict(of_part)
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in (folder / "model_index.json", *folder.glob("*/*config.json")):
        tidy(path)
    for path in folder.rglob("*.*"):
        path.chmod(0o644)


def tidy(path: Path) -> None:
    """Forget where the pipeline was loaded from; name a tokenizer class of transformers 4 and 5."""
    settings = json.loads(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    settings.pop("_name_or_path", None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


@torch.no_grad()
def encode_images(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Latents of pictures in -1..1, packed as Flux wants them: ``[N, 64 tokens, 64]``."""
    latents = vae.encode(images, return_dict=False)[0]
    # Each token is a square of 2 x 2 latents, channels first.
    squares = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    packed: torch.Tensor = squares.flatten(1, 2).flatten(2)
    return packed


def image_ids(device: torch.device) -> torch.Tensor:
    """Row and column of each image token, ``[64, 3]``; the first number is unused."""
    axis = torch.arange(LATENT // 2, device=device, dtype=torch.float32)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
