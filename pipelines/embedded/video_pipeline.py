"""The embedded video model as a stock WanPipeline: built with random weights, and written."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from blockcache.pipelines.embedded import text, world_video
from blockcache.pipelines.embedded.pipeline import tidy
from blockcache.pipelines.embedded.video_vae import CHANNELS, FRAMES, Code, make_vae

GRID = (12, 16, 16)
"""Frames, height and width of a clip in tokens: 3072 of them."""
SAMPLING_SHIFT = 1.0
VOCABULARY = text.VOCABULARY | {
    word: len(text.VOCABULARY) + i for i, word in enumerate(world_video.PLURALS)
}
WIDTH, HEADS, LAYERS = 128, 2, 8
HEAD_SIZE = WIDTH // HEADS
ROW_CHANNELS = range(HEAD_SIZE - 4 * (HEAD_SIZE // 6), HEAD_SIZE - 2 * (HEAD_SIZE // 6))
COLUMN_CHANNELS = range(ROW_CHANNELS.stop, HEAD_SIZE)
"""Channels of a head that turn with a token's row and column; those before, with its time."""

# Logit weights of rotary frequencies near 1, 0.4 and 0.15 (space) or 1, 0.46 and 0.2 (time): their
# sum of w (1 - cos(f d)) has curvature 1 at distance d = 0 and keeps rising to d = 12 or so.
_SPACE_WEIGHTS, _TIME_WEIGHTS = (0.6, 1.5, 6.0), (0.5, 1.2, 5.0)
AIMED_PAIRS = 3
# Which tokens a head looks at before training: (frames ahead, width in frames, width in tokens).
_NEAR, _AHEAD, _BEHIND, _WIDE = (0, 0.5, 1.0), (1, 0.5, 1.0), (-1, 0.5, 1.0), (0, 3.0, 3.0)
HEAD_KERNELS = 2 * (
    (_NEAR, _AHEAD),
    (_NEAR, _BEHIND),
    (_WIDE, _AHEAD),
    (_NEAR, _BEHIND),
)


def make_transformer() -> Any:
    """The transformer with random weights, attention already local, every block the identity."""
    from diffusers import WanTransformer3DModel

    transformer: Any = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    )
    _start_as_identity(transformer)
    for block, kernels in zip(transformer.blocks, HEAD_KERNELS, strict=True):
        for head, kernel in enumerate(kernels):
            aim_head(block.attn1, head, *kernel)
    return transformer


@torch.no_grad()
def _start_as_identity(transformer: Any) -> None:
    for name, parameter in transformer.named_parameters():
        is_modulation = "time_proj" in name or "scale_shift_table" in name
        if is_modulation or "attn2.to_out" in name or name.startswith("proj_out"):
            parameter.zero_()


@torch.no_grad()
def aim_head(attention: Any, head: int, ahead: float, frames: float, tokens: float) -> None:
    """Let one head begin as a soft window of Gaussian shape around each token.

    Queries and keys get constant parts in the fast rotary channels; rotation turns those into a
    bump of the distance alone. The slow channels keep their random weights, for content. So the
    network begins as a convolution in space and time, which is most of what it would have to find.

    ahead: Where the window's middle is, in frames. frames, tokens: its standard deviations.
    """
    plans = (
        (range(ROW_CHANNELS.start), _TIME_WEIGHTS, ahead, frames),
        (ROW_CHANNELS, _SPACE_WEIGHTS, 0.0, tokens),
        (COLUMN_CHANNELS, _SPACE_WEIGHTS, 0.0, tokens),
    )
    for channels, weights, shift, deviation in plans:
        for pair, weight in enumerate(weights):
            frequency = 10000 ** (-2 * pair / len(channels))
            size = math.sqrt(weight / deviation**2 * math.sqrt(HEAD_SIZE))
            row = head * HEAD_SIZE + channels.start + 2 * pair
            angle = frequency * shift
            directions = (
                (attention.to_q, attention.norm_q, angle),
                (attention.to_k, attention.norm_k, 0.0),
            )
            for linear, norm, phase in directions:
                linear.weight[row : row + 2] = 0
                linear.bias[row] = math.cos(phase)
                linear.bias[row + 1] = math.sin(phase)
                # The norm divides by about 0.65: the root of the mean of these and the random rows.
                norm.weight[row : row + 2] = 0.65 * size


def make_text_encoder() -> Any:
    """A UMT5 encoder of one layer whose heads begin by looking at the two words on each side."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(VOCABULARY),
        d_model=WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=2 * WIDTH,
        num_layers=1,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=text.PAD,
        eos_token_id=text.EOS,
    )
    encoder: Any = UMT5EncoderModel(config)
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    right = config.relative_attention_num_buckets // 2
    with torch.no_grad():
        attention.relative_attention_bias.weight.zero_()
        for head, bucket in enumerate((1, 2, right + 1, right + 2)):
            attention.relative_attention_bias.weight[bucket, head] = 6.0
    return encoder


def encode_captions(encoder: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What WanPipeline hands the transformer: hidden states with zeros for padding."""
    mask = (tokens != text.PAD).long()
    states: torch.Tensor = encoder(tokens, mask).last_hidden_state
    return states * mask[..., None]


def make_pipeline(code: Code, transformer: Any, text_encoder: Any) -> Any:
    """A WanPipeline of trained parts."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(
        tokenizer=text.make_tokenizer(vocabulary=VOCABULARY),
        text_encoder=text_encoder,
        vae=make_vae(code),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SAMPLING_SHIFT),
        transformer=transformer,
    )


def call_arguments(grid: tuple[int, int, int] = GRID) -> dict[str, int]:
    """Size arguments of the pipeline call for clips of ``grid`` tokens."""
    frames, height, width = grid
    return {
        "height": height * world_video.TOKEN_PX,
        "width": width * world_video.TOKEN_PX,
        "num_frames": FRAMES * frames - 1,
        "max_sequence_length": text.TEXT_LENGTH,
    }


def save_pipeline(weights: Mapping[str, torch.Tensor], code: Code, folder: Path) -> None:
    """Write a pipeline folder with ``weights``, named "transformer. ..." and "text_encoder. ...".

    The diffusers parts are stored in float16 (they load as float32), the text encoder in float32
    (transformers keeps the stored type, and the parts must agree).
    """
    parts = {"transformer": make_transformer(), "text_encoder": make_text_encoder()}
    for name, part in parts.items():
        start = f"{name}."
        part.load_state_dict(
            {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        )
    pipeline = make_pipeline(code, **parts)
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in (folder / "model_index.json", *folder.glob("*/*config.json")):
        tidy(path)
    for path in folder.rglob("*.*"):
        path.chmod(0o644)
