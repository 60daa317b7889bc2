"""What a run is about to become: a small picture from the latents of one step.

Where the sampler is a flow, its last step is followed to the end first, which takes the noise out.
The autoencoder decodes; of a video one latent frame. Where it cannot, the three main directions of
the latents become colours. Good enough to see where a picture goes, and never in the way: a preview
that cannot be made is left out.
"""

import inspect
import logging
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockcache.demo.watch import Stopped

logger = logging.getLogger("blockcache.demo")

Small = NDArray[np.uint8]

_LONGEST_PX = 256
_SHARE = 0.15
"""Of the run's time that previews may take."""


class Preview:
    """Previews of one run. height, width: of the picture, in pixels."""

    def __init__(self, pipe: Any, height: int, width: int) -> None:
        """Nothing is computed yet."""
        self._pipe, self._height, self._width = pipe, height, width
        self._before: torch.Tensor | None = None
        self._cost_s, self._last = 0.0, 0.0
        self._is_broken = self._is_undecodable = False

    @torch.no_grad()
    def after(self, step: int, latents: torch.Tensor | None) -> Small | None:
        """The picture after `step` steps, `[h, w, 3]`; None if there is none to be had now."""
        if latents is None or self._is_broken:
            return None
        clean = self._followed(step, latents.detach())
        began = time.perf_counter()
        if began - self._last < self._cost_s / _SHARE:
            return None
        try:
            small = self._picture(clean)
        except Stopped:
            raise
        # A preview is worth no run: whatever goes wrong, there is none.
        except Exception as error:
            logger.info("no previews here: %s: %s", type(error).__name__, error)
            self._is_broken = True
            return None
        self._last = time.perf_counter()
        self._cost_s = self._last - began
        return small

    def _followed(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Where the last step leads if it is followed to the end of the flow."""
        before, self._before = self._before, latents
        scheduler = self._pipe.scheduler
        sigmas = getattr(scheduler, "sigmas", None)
        is_flow = "Flow" in type(scheduler).__name__
        if before is None or sigmas is None or not is_flow or not 0 < step < len(sigmas):
            return latents
        now, then = float(sigmas[step]), float(sigmas[step - 1])
        if now == then:
            return latents
        return latents + (latents.float() - before.float()) * (now / (then - now))

    def _picture(self, latents: torch.Tensor) -> Small:
        grid = self._unpacked(latents[:1]).float()
        channels = self._channels()
        if grid.ndim == 5:
            grid = _middle_frame(grid, channels)
        frame = grid[:, :, 0] if grid.ndim == 5 else grid
        if frame.shape[1] == channels and not self._is_undecodable:
            try:
                return _small(self._decoded(grid))
            except RuntimeError as error:
                logger.info("previews are not decoded: %s", error)
                self._is_undecodable = True
        return _small(_colours(frame[0].cpu()))

    def _decoded(self, grid: torch.Tensor) -> torch.Tensor:
        """`[3, h, w]` in 0..1 of the latents of a picture or of one frame."""
        vae = self._pipe.vae
        config = vae.config
        form = (1, -1, *[1] * (grid.ndim - 2))
        if getattr(config, "latents_std", None) is not None:
            grid = grid * torch.tensor(config.latents_std).to(grid).view(form)
        grid = grid / float(getattr(config, "scaling_factor", None) or 1.0)
        if getattr(config, "latents_mean", None) is not None:
            grid = grid + torch.tensor(config.latents_mean).to(grid).view(form)
        grid = grid + float(getattr(config, "shift_factor", None) or 0.0)
        pixels = vae.decode(grid.to(vae.dtype), return_dict=False)[0][0].float()
        frame = pixels[:, -1] if pixels.ndim == 4 else pixels
        shown: torch.Tensor = (frame / 2 + 0.5).clamp(0, 1)
        return shown

    def _channels(self) -> int:
        config = getattr(getattr(self._pipe, "vae", None), "config", None)
        names = ("latent_channels", "z_dim")
        return next((int(config[n]) for n in names if config is not None and n in config), -1)

    def _unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        """`[1, C, h, w]` or `[1, C, F, h, w]` of latents that may be a row of tokens."""
        if latents.ndim != 3:
            return latents
        unpack = getattr(self._pipe, "_unpack_latents", None)
        factor = getattr(self._pipe, "vae_scale_factor", None)
        if unpack is not None and factor and len(inspect.signature(unpack).parameters) == 4:
            unpacked: torch.Tensor = unpack(latents, self._height, self._width, factor)
            return unpacked
        tokens = latents.shape[1]
        rows = max(1, round((tokens * self._height / self._width) ** 0.5))
        columns = tokens // rows
        grid: torch.Tensor = latents[:, : rows * columns].mT.unflatten(2, (rows, columns))
        return grid


def _middle_frame(grid: torch.Tensor, channels: int) -> torch.Tensor:
    """`[1, C, 1, h, w]` of `[1, C, F, h, w]`, or of `[1, F, C, h, w]` as CogVideoX has it."""
    if grid.shape[1] != channels and grid.shape[2] == channels:
        grid = grid.transpose(1, 2)
    middle = grid.shape[2] // 2
    return grid[:, :, middle : middle + 1]


def _colours(frame: torch.Tensor) -> torch.Tensor:
    """`[3, h, w]` in 0..1: the three directions in which `[C, h, w]` varies the most."""
    flat = frame.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    directions = torch.linalg.eigh(centred @ centred.T)[1].flip(1)[:, :3]
    # The sign of a direction is arbitrary; without a rule colours would flip from step to step.
    directions = directions * directions.sum(0).sign().where(directions.sum(0) != 0, torch.ones(1))
    seen = directions.T @ centred
    spread = 2.5 * seen.std(1, keepdim=True).clamp(min=1e-6)
    pixels = (0.5 + seen / (2 * spread)).clamp(0, 1)
    picture: torch.Tensor = pixels.unflatten(1, frame.shape[1:])
    return picture


def _small(pixels: torch.Tensor) -> Small:
    """8 bits, at most `_LONGEST_PX` large."""
    stride = -(-max(pixels.shape[1:]) // _LONGEST_PX)
    shown = pixels[:, ::stride, ::stride].movedim(0, -1).cpu().numpy()
    if shown.shape[-1] == 1:
        shown = np.repeat(shown, 3, -1)
    small: Small = np.rint(shown[..., :3] * 255).astype(np.uint8)
    return small
