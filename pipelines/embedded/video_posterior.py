"""The mean of all clips that a noisy clip can be, which this world has in closed form.

A model of diffusion learns the mean of the clean clips that a noisy one may have come from. It is
usually trained on samples from these, one at a time, because nobody knows the mean. Here, once the
caption is fixed, only the place of the pattern is open, one of 64, and where a bounce or a turn
begins, one of 6 or 12. So the mean can be summed up. A model trained on it sees no noise in its
targets, and learns from one clip what it otherwise would from many.

Patterns repeat and colours are linear in the latents, so all of them come from a small table.
"""

import torch

from blockcache.pipelines.embedded import world_video
from blockcache.pipelines.embedded.video_vae import Code
from blockcache.pipelines.embedded.world_video import (
    BOUNCING,
    HOP,
    MOTIONS,
    PERIOD,
    RING,
    ROTATING,
    SHAPES,
    TOKEN_PX,
    Clip,
    Paths,
)

Grid = tuple[int, int, int]
FRAMES = 12
"""Longest clips in tokens."""
CERTAIN = 0.7
"""Noise level below which a clip of 256 tokens or more tells where it comes from, beyond doubt."""


class Posterior:
    """All clips of the world as latents, and the mean of those that fit to a noisy one."""

    def __init__(self, code: Code) -> None:
        # Three colours of what an object changes, and of a plain picture.
        basis = (code.basis / code.scale[:, None]).unflatten(1, (3, -1))
        self.plain = basis.sum(2)
        self.offset = -(code.basis @ code.mean) / code.scale
        self.objects = {
            (shape, motion): torch.einsum("kcn,pthwn->pckthw", basis, _mask_blocks(shape, motion))
            for shape in range(len(SHAPES))
            for motion in range(len(MOTIONS))
            if (shape, motion) != (RING, ROTATING)
        }
        axis = torch.arange(PERIOD)
        # For each of 64 places, the row and column that a token of the pattern comes from.
        self.rows = (axis[None, :, None] + axis[:, None, None]) % PERIOD
        self.columns = (axis[None, None, :] + axis[:, None, None]) % PERIOD

    def periods(self, clip: Clip, frames: int) -> torch.Tensor:
        """One period of a clip, at one place, in all phases: ``[P, channels, frames, 8, 8]``."""
        background, color = world_video.colors(torch.tensor([clip.background, clip.color])) * 2 - 1
        objects = self.objects[clip.shape, clip.motion][:, :, :, :frames]
        plain = self.offset + self.plain @ background
        moves = torch.einsum("pckthw,c->pkthw", objects, color - background)
        periods: torch.Tensor = moves + plain[:, None, None, None]
        return periods

    def places(self, clip: Clip, frames: int) -> torch.Tensor:
        """The same at all places: ``[64 P, channels, frames, 8, 8]``."""
        # [phases, channels, frames, 8, 8 places, 8, 8 tokens]
        moved = self.periods(clip, frames)[..., self.rows[:, None], self.columns[None]]
        return moved.permute(0, 3, 4, 1, 2, 5, 6).flatten(0, 2)

    def draw(
        self, clip: Clip, grid: Grid, t: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A clip with noise at level ``t``, and the mean of the clean ones that it may be.

        Both are latents ``[channels, frames, height, width]``.
        """
        periods = self.periods(clip, grid[0])
        phase, up, right = torch.randint(0, 1 << 20, (3,), generator=generator).tolist()
        period = periods[phase % len(periods)].roll((up, right), (-2, -1))
        clean = _tile(period, grid)
        noisy = torch.lerp(clean, torch.randn(clean.shape, generator=generator), t)
        if t < CERTAIN:
            return noisy, clean
        return noisy, self.mean(self.places(clip, grid[0]), noisy, t)

    def mean(self, places: torch.Tensor, noisy: torch.Tensor, t: float) -> torch.Tensor:
        """The mean of the clips in ``places`` by how well they explain ``noisy``."""
        grid = (noisy.shape[1], noisy.shape[2], noisy.shape[3])
        # All repetitions of a token say the same, so they can be added up.
        count = _fold(torch.ones(1, 1, *grid[1:]))
        common = (places * _fold(noisy)).sum((1, 2, 3, 4))
        power = (places.square() * count).sum((1, 2, 3, 4))
        fit = ((1 - t) * common - (1 - t) ** 2 * power / 2) / t**2
        mean = torch.einsum("p,pkthw->kthw", fit.softmax(0), places)
        return _tile(mean, grid)


def _mask_blocks(shape: int, motion: int) -> torch.Tensor:
    """What an object covers of one period: ``[phases, FRAMES, 8, 8, numbers of one colour]``."""
    phases = {BOUNCING: 2 * HOP, ROTATING: 12}.get(motion, 1)
    phase = torch.arange(phases)[:, None]
    clips = [Clip(0, 1, shape, motion)] * phases
    start = torch.zeros(phases, 1, 2, dtype=torch.long)
    paths: Paths = world_video.make_paths(clips, FRAMES, start, phase)
    side = PERIOD * TOKEN_PX
    masks = world_video.masks(clips, paths, side, side)
    # The blocks' numbers are ordered (frame, row, column); values 0 to 1 are steps of colour.
    blocks = masks.unflatten(3, (-1, TOKEN_PX)).unflatten(2, (-1, TOKEN_PX))
    blocks = blocks.unflatten(1, (FRAMES, -1))
    flat: torch.Tensor = blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    return flat


def _tile(period: torch.Tensor, grid: Grid) -> torch.Tensor:
    rows, columns = torch.arange(grid[1]) % PERIOD, torch.arange(grid[2]) % PERIOD
    return period[..., rows[:, None], columns]


def _fold(clip: torch.Tensor) -> torch.Tensor:
    """Sums of the tokens that are whole periods apart: ``[channels, frames, 8, 8]``."""
    *outer, height, width = clip.shape
    rows, columns = torch.arange(height) % PERIOD, torch.arange(width) % PERIOD
    folded = torch.zeros(*outer, PERIOD, width).index_add_(-2, rows, clip)
    return torch.zeros(*outer, PERIOD, PERIOD).index_add_(-1, columns, folded)
