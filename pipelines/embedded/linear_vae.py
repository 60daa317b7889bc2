"""An AutoencoderDC whose weights are written, not trained: PCA of 4 x 4 pixel patches.

An autoencoder class is used as a linear code. The pixel-unshuffle and pixel-shuffle shortcuts do
the patching and one centre tap does the PCA. ``relu(x) - relu(-x) = x`` undoes the activation, so
every number travels twice, and a few large constant channels make the RMS norm a constant. Residual
blocks get zero weights.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

PATCH = 4
CHANNELS = 16
_NUMBERS = 3 * PATCH * PATCH
_HALF = _NUMBERS // 4
_CONSTANTS = 4
_WIDTH = 2 * _HALF + _CONSTANTS
_LARGE = 100.0


def fit_patches(
    images: torch.Tensor, channels: int = CHANNELS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best linear code of patches: ``(basis [channels, 48], mean [48], scale [channels])``.

    ``images`` is ``[N, 3, H, W]`` in -1..1. The scale is half-whitening: the square root of each
    component's deviation times the largest one, so that latents have an RMS near 1 and colour keeps
    its weight in the loss.
    """
    patches = F.pixel_unshuffle(images, PATCH).movedim(1, -1).reshape(-1, _NUMBERS).double()
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    deviation = values.flip(0)[:channels].clamp(min=1e-9).sqrt()
    scale = 0.5 * (deviation * deviation.max()).sqrt()
    return vectors.flip(1)[:, :channels].T.float(), mean.float(), scale.float()


def make_vae(basis: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> Any:
    """The AutoencoderDC (4x smaller, ``len(basis)`` channels) of a code from fit_patches."""
    from diffusers import AutoencoderDC

    channels = len(basis)
    vae: Any = AutoencoderDC(
        latent_channels=channels,
        encoder_block_out_channels=(0, _HALF, _NUMBERS),
        encoder_layers_per_block=(0, 1, 0),
        decoder_block_out_channels=(0, _WIDTH, 4 * _WIDTH),
        decoder_layers_per_block=(0, 1, 0),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        scaling_factor=1.0,
    )
    # FluxPipeline reads these two from its VAE; loading keeps config keys that the class does not
    # know.
    vae.register_to_config(block_out_channels=[_HALF, _HALF, _NUMBERS], shift_factor=0.0)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        _write_encoder(vae.encoder, basis / scale[:, None], mean)
        _write_decoder(vae.decoder, (basis * scale[:, None]).T, mean)
    return vae.eval()


def _order() -> torch.Tensor:
    """Where two pixel_unshuffle(2) in a row put the numbers of one pixel_unshuffle(4)."""
    index = torch.arange(_NUMBERS).view(1, _NUMBERS, 1, 1).float()
    image = F.pixel_shuffle(index, PATCH)
    return F.pixel_unshuffle(F.pixel_unshuffle(image, 2), 2).flatten().long()


def _centre(conv: nn.Conv2d) -> torch.Tensor:
    return conv.weight[:, :, 1, 1]


def _write_encoder(encoder: Any, code: torch.Tensor, mean: torch.Tensor) -> None:
    _centre(encoder.conv_in.conv).copy_(torch.eye(3))
    _centre(encoder.conv_out).copy_(code[:, _order()])
    encoder.conv_out.bias.copy_(-(code @ mean))


def _write_decoder(decoder: Any, code: torch.Tensor, mean: torch.Tensor) -> None:
    channels = code.shape[1]
    weight = torch.zeros(_WIDTH, 4, channels)
    bias = torch.full((_WIDTH, 4), _LARGE)
    code, mean = code[_order()].view(_HALF, 4, channels), mean[_order()].view(_HALF, 4)
    weight[:_HALF], bias[:_HALF] = code, mean
    weight[_HALF : 2 * _HALF], bias[_HALF : 2 * _HALF] = -code, -mean
    _centre(decoder.conv_in).copy_(weight.flatten(0, 1))
    decoder.conv_in.bias.copy_(bias.flatten())
    # The norm divides by about LARGE * sqrt(CONSTANTS / WIDTH); this undoes it.
    decoder.norm_out.weight.fill_(_LARGE * (_CONSTANTS / _WIDTH) ** 0.5)
    identity = torch.eye(_HALF)
    _centre(decoder.conv_out.conv).copy_(
        torch.cat([identity, -identity, torch.zeros(_HALF, _CONSTANTS)], 1)
    )
