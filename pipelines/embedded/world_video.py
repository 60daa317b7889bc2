"""The captioned world of moving shapes that the embedded video model is trained on.

A clip looks through a window at an endless, regular pattern of equal flat shapes on a flat
background. Together they move in one of four directions, bounce up and down, or each rotates in its
place. Everything is discrete, and so is the motion: in the time of one token (two frames) a moving
shape advances by exactly one token (eight pixels), and a rotating one turns by thirty degrees.
Shapes therefore always meet the tokens in the same few ways, which lets a model of two million
weights learn outlines in an hour or two on a CPU.

The pattern repeats every eight tokens and has no edges, no first and no last frame. So a window of
any size and length shows the same statistics, and a model can learn nearly everything on small,
short clips, where a training step is cheap.

One scene in ten is *held out*: a sum over its attributes decides, in which each shape, motion and
colour has its share, so training and evaluation never have one in common.
"""

import math
from dataclasses import dataclass

import torch

from blockcache.pipelines.embedded import world

SHAPES = ("square", "triangle", "ring", "cross")
PLURALS = ("squares", "triangles", "rings", "crosses")
COLOR_NAMES = ("white", "yellow", "cyan", "green", "black", "blue", "purple", "red")
BRIGHT = 4
"""The first colours are those of objects, the others those of backgrounds."""
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "bouncing",
    "rotating",
)
DIRECTIONS = torch.tensor([[-1, 0], [1, 0], [0, 1], [0, -1]])
"""Tokens to the right and upwards in the time of one token, of the first four motions."""
BOUNCING, ROTATING = MOTIONS.index("bouncing"), MOTIONS.index("rotating")
RING = SHAPES.index("ring")

TOKEN_PX = 8
TOKEN_FRAMES = 2
RADIUS_PX = 20.0
TURN = math.pi / 6
"""Angle in radians by which a rotating shape turns, counter-clockwise, in the time of one token."""
HOP = 3
"""Tokens that a bouncing shape rises before it falls again."""
PERIOD = 8
"""Distance in tokens between neighbours, across and up."""
HELD_OUT_ONE_IN = 10
HELD_OUT_CLIPS = 36


@dataclass(frozen=True)
class Clip:
    """A clip in words. Indices into COLOR_NAMES, COLOR_NAMES, SHAPES and MOTIONS."""

    background: int
    color: int
    shape: int
    motion: int

    def row(self) -> list[int]:
        """The clip as integers in the order of the fields."""
        return [self.background, self.color, self.shape, self.motion]

    @property
    def is_held_out(self) -> bool:
        """Whether the clip belongs to the evaluation split."""
        background = self.background - BRIGHT
        return (background + self.color + 3 * self.shape + 5 * self.motion) % HELD_OUT_ONE_IN == 0

    def caption(self) -> str:
        """The caption, in the only grammar that the model knows."""
        return (
            f"{COLOR_NAMES[self.color]} {PLURALS[self.shape]} {MOTIONS[self.motion]} "
            f"on a {COLOR_NAMES[self.background]} background"
        )


def sample_clip(generator: torch.Generator, *, held_out: bool = False) -> Clip:
    """Draw a clip from one of the two splits. Rings, being round, never rotate."""
    while True:
        draw = torch.randint(2**31 - 1, (4,), generator=generator).tolist()
        clip = Clip(
            BRIGHT + draw[0] % (len(COLOR_NAMES) - BRIGHT),
            draw[1] % BRIGHT,
            draw[2] % len(SHAPES),
            draw[3] % len(MOTIONS),
        )
        if clip.shape == RING and clip.motion == ROTATING:
            continue
        if clip.is_held_out == held_out:
            return clip


def held_out_clips(n: int, seed: int) -> list[Clip]:
    """``n`` different clips of the evaluation split.

    Raises:
        ValueError: there are not as many.
    """
    if n > HELD_OUT_CLIPS:
        raise ValueError(f"the evaluation split has {HELD_OUT_CLIPS} clips, asked for {n}")
    generator = torch.Generator().manual_seed(seed)
    clips: dict[Clip, None] = {}
    while len(clips) < n:
        clips[sample_clip(generator, held_out=True)] = None
    return list(clips)


def held_out_prompts(n: int, seed: int) -> list[str]:
    """Captions of ``n`` different clips that training never draws."""
    return [clip.caption() for clip in held_out_clips(n, seed)]


def training_caption(clip: Clip, generator: torch.Generator) -> str:
    """The caption; one in ten is empty (for guidance)."""
    return "" if torch.rand(1, generator=generator).item() < 0.1 else clip.caption()


@dataclass(frozen=True)
class Paths:
    """Where objects are.

    centers: Of one of them, ``[N, frames, (x, y)]``, in pixels from the bottom left. angles: Of all
    of them, ``[N, frames]``, in radians.
    """

    centers: torch.Tensor
    angles: torch.Tensor


def sample_paths(clips: list[Clip], frames: int, generator: torch.Generator) -> Paths:
    """Draw a path for each clip, for ``frames`` tokens of time."""
    n = len(clips)
    start = torch.randint(0, PERIOD, (n, 1, 2), generator=generator)
    phase = torch.randint(0, 12, (n, 1), generator=generator)
    return make_paths(clips, frames, start, phase)


def make_paths(clips: list[Clip], frames: int, start: torch.Tensor, phase: torch.Tensor) -> Paths:
    """Paths of ``frames`` tokens of time.

    start: Tokens to the right and upwards, ``[N, 1, 2]``. phase: How many tokens of time a bounce
    has gone on, or how many turns a rotation begins with, ``[N, 1]``.
    """
    motion = torch.tensor([clip.motion for clip in clips])[:, None]
    # Two pictures in the time of one token, a quarter before and a quarter after its middle.
    time = (torch.arange(frames * TOKEN_FRAMES) + 0.5) / TOKEN_FRAMES - 0.5
    direction = torch.cat([DIRECTIONS, DIRECTIONS.new_zeros(2, 2)])[motion]
    centers = start + 0.5 + direction * time[:, None]
    hop = HOP - ((time + phase) % (2 * HOP) - HOP).abs()
    centers[..., 1] += torch.where(motion == BOUNCING, hop, 0.0)
    angles = torch.where(motion == ROTATING, (phase + time) * TURN, 0.0)
    return Paths(centers * TOKEN_PX, angles)


def signed_distances(x: torch.Tensor, y: torch.Tensor, shape: int) -> torch.Tensor:
    """Signed distance (negative inside) to an upright shape at the origin, in pixels."""
    r = RADIUS_PX
    ax, ay = x.abs(), y.abs()
    name = SHAPES[shape]
    if name == "square":
        return torch.maximum(ax, ay) - 0.82 * r
    if name == "triangle":
        return torch.maximum(0.866 * ax + 0.5 * y, -y) - 0.53 * r
    if name == "ring":
        return (torch.hypot(x, y) - 0.70 * r).abs() - 0.26 * r
    arm = 0.33 * r
    return torch.minimum(torch.maximum(ax - r, ay - arm), torch.maximum(ax - arm, ay - r))


def colors(indices: torch.Tensor) -> torch.Tensor:
    """RGB in 0..1 of indices into COLOR_NAMES: ``[..., 3]``."""
    return torch.tensor([world.COLORS[name] for name in COLOR_NAMES])[indices]


def masks(clips: list[Clip], paths: Paths, height: int, width: int) -> torch.Tensor:
    """Coverage (0 to 1, anti-aliased) of the objects: ``[N, frames, height, width]`` in pixels."""
    x = (torch.arange(width) + 0.5)[None, None, None, :]
    y = (torch.arange(height).flip(0) + 0.5)[None, None, :, None]
    period = PERIOD * TOKEN_PX
    coverage = torch.empty(*paths.angles.shape, height, width)
    shape = torch.tensor([clip.shape for clip in clips])
    for number in shape.unique().tolist():
        rows = shape == number
        cx, cy = paths.centers[rows, ..., None, None].unbind(2)
        angle = paths.angles[rows, :, None, None]
        cos, sin = angle.cos(), angle.sin()
        # Distances from the nearest of all centres.
        dx, dy = ((d + period / 2) % period - period / 2 for d in (x - cx, y - cy))
        distance = signed_distances(cos * dx + sin * dy, cos * dy - sin * dx, number)
        coverage[rows] = (0.5 - distance).clamp(0, 1)
    return coverage


def draw(clips: list[Clip], paths: Paths, height: int, width: int) -> torch.Tensor:
    """Videos ``[N, 3, frames, height, width]``, float32 in 0..1; sizes in pixels."""
    rows = torch.tensor([clip.row() for clip in clips])
    background, color = (colors(rows[:, i])[:, :, None, None, None] for i in (0, 1))
    return torch.lerp(background, color, masks(clips, paths, height, width)[:, None])


def draw_batch(
    n: int, grid: tuple[int, int, int], generator: torch.Generator
) -> tuple[list[Clip], torch.Tensor]:
    """``n`` clips of the training split and their videos in -1..1.

    grid: Frames, height and width of the clips in tokens.
    """
    clips = [sample_clip(generator) for _ in range(n)]
    paths = sample_paths(clips, grid[0], generator)
    return clips, draw(clips, paths, grid[1] * TOKEN_PX, grid[2] * TOKEN_PX) * 2 - 1
