"""The captioned world of coloured shapes that the embedded model is trained on.

A scene has a background colour and one object, or two objects in a relation ("left of", "above",
...). Everything is discrete: shapes, colours, two sizes, centres on a grid of eight pixels. So a
scene is a row of small integers, a caption follows from it word by word, and a program can check a
picture against it.

About one scene in twenty is *held out*: a hash of its attributes (sizes aside) decides, so training
and evaluation never share one, whatever the seed.
"""

from dataclasses import dataclass, replace

import torch

SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring", "cross", "heart")
COLORS = {
    "red": (0.90, 0.14, 0.16),
    "green": (0.12, 0.68, 0.26),
    "blue": (0.15, 0.33, 0.90),
    "yellow": (0.98, 0.85, 0.15),
    "purple": (0.55, 0.20, 0.75),
    "cyan": (0.15, 0.80, 0.85),
    "pink": (0.98, 0.55, 0.72),
    "white": (0.97, 0.97, 0.97),
    "black": (0.09, 0.09, 0.10),
    "brown": (0.50, 0.31, 0.16),
}
COLOR_NAMES = tuple(COLORS)
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
NO_RELATION = len(RELATIONS)

SIZE_PX = 64
RADII_PX = (8.6, 13.4)
HELD_OUT_ONE_IN = 20

# Centres relative to the middle of the picture, in pixels. All are multiples of the model's token,
# 8 x 8 pixels, so a shape of one size always meets the tokens in the same way: a model of four
# million weights then has sharp outlines to learn instead of all their shifts.
_STEP = 8
_PAIR_DISTANCE = 2 * _STEP


@dataclass(frozen=True)
class Scene:
    """One picture in words. Indices into SHAPES, COLOR_NAMES, SIZES and RELATIONS.

    ``relation`` is NO_RELATION for a single object; the second object's fields are then 0 and
    unused.
    """

    background: int
    color: int
    shape: int
    size: int
    relation: int = NO_RELATION
    color2: int = 0
    shape2: int = 0
    size2: int = 0

    @property
    def count(self) -> int:
        """Number of objects, 1 or 2."""
        return 1 if self.relation == NO_RELATION else 2

    def row(self) -> list[int]:
        """The scene as integers in the order of the fields."""
        return [
            self.background,
            self.color,
            self.shape,
            self.size,
            self.relation,
            self.color2,
            self.shape2,
            self.size2,
        ]

    @property
    def is_held_out(self) -> bool:
        """Whether the scene belongs to the evaluation split."""
        key = self.background
        for value, base in (
            (self.color, 10),
            (self.shape, 8),
            (self.relation, 5),
            (self.color2, 10),
            (self.shape2, 8),
        ):
            key = key * base + value
        # A multiplicative hash; the high half of the 32-bit product is well mixed.
        return ((key + 1) * 2654435761 % 2**32 >> 16) % HELD_OUT_ONE_IN == 0

    def caption(self, *, sizes: tuple[bool, bool] = (True, True), background: bool = True) -> str:
        """The caption, optionally without size words or without the background clause."""
        words = [_object_words(self.size if sizes[0] else None, self.color, self.shape)]
        if self.count == 2:
            words.append(RELATIONS[self.relation])
            words.append(_object_words(self.size2 if sizes[1] else None, self.color2, self.shape2))
        if background:
            words.append(f"on a {COLOR_NAMES[self.background]} background")
        return " ".join(words)


def _object_words(size: int | None, color: int, shape: int) -> str:
    name = f"{COLOR_NAMES[color]} {SHAPES[shape]}"
    return f"a {name}" if size is None else f"a {SIZES[size]} {name}"


def sample_scene(
    generator: torch.Generator, *, held_out: bool = False, two_objects: float = 0.6
) -> Scene:
    """Draw a scene from one of the two splits; all colours in it differ."""
    while True:
        draw = torch.randint(2**31 - 1, (9,), generator=generator).tolist()
        colors = torch.randperm(len(COLOR_NAMES), generator=generator)[:3].tolist()
        scene = Scene(colors[0], colors[1], draw[0] % len(SHAPES), draw[1] % len(SIZES))
        if draw[2] < two_objects * (2**31 - 1):
            scene = replace(
                scene,
                relation=draw[3] % len(RELATIONS),
                color2=colors[2],
                shape2=draw[4] % len(SHAPES),
                size2=draw[5] % len(SIZES),
            )
        if scene.is_held_out == held_out:
            return scene


def held_out_scenes(n: int, seed: int) -> list[Scene]:
    """``n`` different scenes of the evaluation split."""
    generator = torch.Generator().manual_seed(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < n:
        scenes[sample_scene(generator, held_out=True)] = None
    return list(scenes)


def held_out_prompts(n: int, seed: int) -> list[str]:
    """Full captions of ``n`` different scenes that training never draws."""
    return [scene.caption() for scene in held_out_scenes(n, seed)]


def training_caption(scene: Scene, generator: torch.Generator) -> str:
    """A caption as in training: now and then a word less, one in twenty empty (for guidance)."""
    drop = torch.rand(4, generator=generator).tolist()
    if drop[0] < 0.05:
        return ""
    return scene.caption(sizes=(drop[1] > 0.08, drop[2] > 0.08), background=drop[3] > 0.05)


def sample_centers(scenes: list[Scene], generator: torch.Generator) -> torch.Tensor:
    """Object centres in pixels from the middle: ``[N, 2 objects, (x, y)]``, y upwards."""
    n = len(scenes)
    relation = torch.tensor([s.relation for s in scenes])
    alone, across = torch.randint(-1, 2, (2, n, 2), generator=generator) * _STEP
    # "left of" and "below" put the first object on the negative side of its axis.
    along = torch.where((relation == 0) | (relation == 3), -_PAIR_DISTANCE, _PAIR_DISTANCE)
    along = torch.stack([along, -along], 1)
    pair = torch.where(
        (relation < 2)[:, None, None],
        torch.stack([along, across], -1),
        torch.stack([across, along], -1),
    )
    return torch.where((relation == NO_RELATION)[:, None, None], alone[:, None], pair)


def signed_distances(x: torch.Tensor, y: torch.Tensor, r: float) -> torch.Tensor:
    """Signed distance (negative inside) of every shape of radius about ``r``: ``[8, ...]``."""
    ax, ay = x.abs(), y.abs()
    d = torch.hypot(x, y)
    circle = d - 0.95 * r
    square = torch.maximum(ax, ay) - 0.82 * r
    triangle = torch.maximum(0.866 * ax + 0.5 * (y + 0.25 * r), -(y + 0.25 * r)) - 0.55 * r
    diamond = (ax + ay - 1.08 * r) * 0.7071
    ring = (d - 0.70 * r).abs() - 0.26 * r
    arm = 0.33 * r
    cross = torch.minimum(torch.maximum(ax - r, ay - arm), torch.maximum(ax - arm, ay - r))
    return torch.stack(
        [circle, square, triangle, diamond, _star(ax, y, r), ring, cross, _heart(ax, y, r)]
    )


def _segment(
    px: torch.Tensor, py: torch.Tensor, bx: float, by: float, length: float
) -> torch.Tensor:
    """Distance from ``p`` to the segment from the origin along ``b`` (times at most ``length``)."""
    h = ((px * bx + py * by) / (bx * bx + by * by)).clamp(0, length)
    return torch.hypot(px - bx * h, py - by * h)


def _star(ax: torch.Tensor, y: torch.Tensor, r: float) -> torch.Tensor:
    """Five points: fold the plane into one half point by two mirrors, then measure to its edge."""
    tip, inner = 1.12 * r, 0.45
    cos36, sin36 = 0.809017, 0.587785
    for kx in (cos36, -cos36):
        t = 2 * (kx * ax - sin36 * y).clamp(min=0)
        ax, y = ax - t * kx, y + t * sin36
    ax, y = ax.abs(), y - tip
    bx, by = inner * sin36, inner * cos36 - 1
    return _segment(ax, y, bx, by, tip) * torch.sign(y * bx - ax * by)


def _heart(ax: torch.Tensor, y: torch.Tensor, r: float) -> torch.Tensor:
    """Two half discs above a right angle that stands on its corner."""
    scale = 1.75 * r
    x, y = ax / scale, (y + 0.95 * r) / scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - 0.353553
    m = 0.5 * (x + y).clamp(min=0)
    edge = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - m, y - m)) * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, edge) * scale


def shape_masks() -> torch.Tensor:
    """Coverage (0 to 1, anti-aliased) of every shape and size: ``[8, 2, 128, 128]``, centred."""
    axis = torch.arange(2 * SIZE_PX) + 0.5 - SIZE_PX
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    return torch.stack([(0.5 - signed_distances(x, y, r)).clamp(0, 1) for r in RADII_PX], 1)


class Painter:
    """Draws scenes. Holds all masks, so that a picture is two crops and two blends."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.masks = shape_masks().to(self.device)
        self.colors = torch.tensor(list(COLORS.values()), device=self.device)
        rows = torch.linspace(1, -1, SIZE_PX, device=self.device)
        # The only light in the picture: the background is a little darker at the bottom.
        self.shade = (0.90 + 0.10 * rows)[None, None, :, None]

    def draw(self, scenes: list[Scene], centers: torch.Tensor) -> torch.Tensor:
        """Pictures ``[N, 3, 64, 64]``, float32 in 0..1; centres as from sample_centers."""
        rows = torch.tensor([s.row() for s in scenes], device=self.device)
        background, color, shape, size, relation, color2, shape2, size2 = rows.unbind(1)
        centers = centers.to(self.device)
        image = self.colors[background][:, :, None, None] * self.shade
        image = image.expand(-1, -1, -1, SIZE_PX)
        image = self._blend(image, color, self._mask(shape, size, centers[:, 0]))
        second = self._mask(shape2, size2, centers[:, 1])
        second = second * (relation != NO_RELATION)[:, None, None]
        return self._blend(image, color2, second)

    def _mask(self, shape: torch.Tensor, size: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        pixels = torch.arange(SIZE_PX, device=self.device) + SIZE_PX // 2
        y = (pixels + center[:, 1:])[:, :, None]
        x = (pixels - center[:, :1])[:, None, :]
        return self.masks[shape[:, None, None], size[:, None, None], y, x]

    def _blend(self, image: torch.Tensor, color: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask[:, None]
        return image * (1 - mask) + self.colors[color][:, :, None, None] * mask


def draw_batch(
    painter: Painter, n: int, generator: torch.Generator
) -> tuple[list[Scene], torch.Tensor]:
    """``n`` scenes of the training split and their pictures in -1..1."""
    scenes = [sample_scene(generator) for _ in range(n)]
    return scenes, painter.draw(scenes, sample_centers(scenes, generator)) * 2 - 1
