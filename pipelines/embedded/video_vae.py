"""An AutoencoderKLMochi whose weights are written, not trained: a linear code of video.

Each latent stands for a block of two frames and eight by eight pixels, by PCA of its 384 numbers.
This class of autoencoder can be used as such a code exactly: its samplers are strided convolutions
without overlap and pixel shuffles in space and time, and without residual blocks there is little
else. ``silu(x) - silu(-x) = x`` undoes the activations. In the encoder's group norm each number
shares its group with its negative and a large constant with its own, which make mean and deviation
constants.

As in all causal video autoencoders the first latent stands for one frame only: 12 latents are 23
frames.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockcache.pipelines.embedded import world_video

CHANNELS = 24
FRAMES, SIDE = world_video.TOKEN_FRAMES, world_video.TOKEN_PX
_NUMBERS = 3 * FRAMES * SIDE * SIDE
_GROUPS = 32
_LARGE = 1000.0


@dataclass(frozen=True)
class Code:
    """Blocks to channels and back: ``basis [channels, 384]``, ``mean [384]``, ``scale [channels]``.

    The 384 numbers of a block are ordered (colour, frame, row, column).
    """

    basis: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Latents ``[N, channels, F / 2, H / 8, W / 8]`` of videos ``[N, 3, F, H, W]``.

        ``F`` is even: the first frame, which decoding drops, is there too.
        """
        latents = (_to_blocks(video) - self.mean) @ (self.basis / self.scale[:, None]).T
        return latents.movedim(-1, 1).contiguous()


def _to_blocks(video: torch.Tensor) -> torch.Tensor:
    """``[N, 3, F, H, W]`` as ``[N, F / 2, H / 8, W / 8, 384]``."""
    blocks = video.unflatten(4, (-1, SIDE)).unflatten(3, (-1, SIDE)).unflatten(2, (-1, FRAMES))
    flat: torch.Tensor = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
    return flat


def fit_code(channels: int = CHANNELS) -> Code:
    """The best linear code of the world's blocks.

    The scale is half-whitening, the square root of each component's deviation times the largest
    one: latents of the main components have an RMS of 1 and colour keeps its weight in the loss.
    """
    generator = torch.Generator().manual_seed(0)
    _, video = world_video.draw_batch(256, (4, 8, 8), generator)
    blocks = _to_blocks(video).reshape(-1, _NUMBERS).double()
    mean = blocks.mean(0)
    centred = blocks - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    deviation = values.flip(0)[:channels].clamp(min=1e-9).sqrt()
    scale = (deviation * deviation.max()).sqrt()
    return Code(vectors.flip(1)[:, :channels].T.float(), mean.float(), scale.float())


def make_vae(code: Code) -> Any:
    """The AutoencoderKLMochi (8x smaller, half as many frames) of a code."""
    from diffusers import AutoencoderKLMochi

    channels = len(code.basis)
    vae: Any = AutoencoderKLMochi(
        latent_channels=channels,
        encoder_block_out_channels=(3, 24, 96, 4 * _GROUPS),
        decoder_block_out_channels=(6, 24, 96, channels),
        layers_per_block=(0, 0, 0, 0, 0),
        temporal_expansions=(FRAMES, 1, 1),
        spatial_expansions=(2, 2, 2),
        add_attention_block=(False, False, False, False, False),
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    # What WanPipeline reads from its VAE; loading keeps config keys that the class does not know.
    vae.register_to_config(z_dim=channels, scale_factor_temporal=FRAMES, scale_factor_spatial=SIDE)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        _write_encoder(vae.encoder, code)
        _write_decoder(vae.decoder, code)
    return vae.eval()


def _quarters(side: int) -> torch.Tensor:
    """Numbers of a block with ``side`` rows by quarter: ``[3 * FRAMES * side**2 / 4, 2, 2]``."""
    index = torch.arange(3 * FRAMES * side**2).view(3, FRAMES, 2, side // 2, 2, side // 2)
    return index.permute(0, 1, 3, 5, 2, 4).flatten(0, 3)


def _write_encoder(encoder: Any, code: Code) -> None:
    """Pixels to blocks of side 2, 4 and 8, the last with the code."""
    channels = len(code.basis)
    encoder.proj_in.weight[:, :3] = torch.eye(3)
    pixels, quarters = (block.conv_in.conv.weight for block in encoder.down_blocks[:2])
    small = torch.arange(3 * FRAMES * 4).view(3, FRAMES, 2, 2)
    for color in range(3):
        pixels[small[color].flatten(), color] = torch.eye(FRAMES * 4).view(-1, FRAMES, 2, 2)
    quarters[:, :, 0].copy_(torch.eye(3 * FRAMES * 16)[:, _quarters(4)])
    basis = code.basis / code.scale[:, None]
    # Groups of a number, its negative, a constant and its negative.
    last = encoder.down_blocks[2].conv_in.conv
    weight = torch.zeros(_GROUPS, 4, *last.weight.shape[1:])
    bias = torch.zeros(_GROUPS, 4)
    weight[:channels, 0, :, 0] = basis[:, _quarters(8)]
    bias[:channels, 0] = -basis @ code.mean
    weight[:, 1], bias[:, 1] = -weight[:, 0], -bias[:, 0]
    bias[:, 2], bias[:, 3] = _LARGE, -_LARGE
    last.weight.copy_(weight.flatten(0, 1))
    last.bias.copy_(bias.flatten())
    encoder.norm_out.norm_layer.weight.fill_(1.0)
    # The norm divides by LARGE / sqrt(2).
    means = torch.zeros(channels, _GROUPS, 4)
    rows = torch.arange(channels)
    means[rows, rows, 0], means[rows, rows, 1] = _LARGE / 2**0.5, -_LARGE / 2**0.5
    encoder.proj_out.weight[:channels] = means.flatten(1)
    # The constant is 1.1 after the activation: the logarithm of the variance is -29.
    encoder.proj_out.weight[channels:, 2] = -26.0


def _write_decoder(decoder: Any, code: Code) -> None:
    """The code to blocks of side 4 and 2, and to pixels and their negatives."""
    decoder.conv_in.weight.copy_(torch.eye(len(code.basis))[..., None, None, None])
    first, second, third = (block.proj for block in decoder.up_blocks)
    order = _quarters(8).flatten()
    first.weight.copy_((code.basis * code.scale[:, None]).T[order])
    first.bias.copy_(code.mean[order])
    _permute(second, _quarters(4).flatten())
    numbers = torch.eye(3 * FRAMES * 4)
    third.weight.copy_(torch.cat([numbers, -numbers]))
    decoder.proj_out.weight.copy_(torch.cat([torch.eye(3), -torch.eye(3)], 1))


def _permute(linear: nn.Linear, order: torch.Tensor) -> None:
    linear.weight.copy_(torch.eye(len(order))[order])
