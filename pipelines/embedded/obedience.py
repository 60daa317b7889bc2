"""Does a picture show what its caption says? Measured by a program, without a reference picture.

    python -m blockcache.pipelines.embedded.obedience --model FOLDER --n 200

The world is simple enough to be read back: the border tells the background, connected patches of
one colour are the objects, their centres give the relation, and the best fitting mask gives shape
and size.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from blockcache.pipelines.embedded import world

# Colour distance (Euclidean, RGB in 0..1) from the background beyond which a pixel belongs to an
# object.
FOREGROUND_DISTANCE = 0.15
# Smallest interior of an object in pixels; the smallest true one, a small ring or star, has about
# 60.
SMALLEST_INTERIOR = 12
_TOUCHING_SHARE = 0.15
_BORDER = 2
_KERNEL = 32


@dataclass(frozen=True)
class FoundObject:
    """An object read back from a picture: indices of colour, shape and size, centre in pixels.

    ``x`` goes to the right and ``y`` upwards from the middle of the picture. ``overlap`` is the
    intersection over union with the best fitting true outline, 1 for a perfect one.
    """

    color: int
    shape: int
    size: int
    x: float
    y: float
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """Which parts of the caption hold. ``relation`` is None for a single object."""

    background: bool
    colors: bool
    count: bool
    relation: bool | None
    shapes: bool
    sizes: bool
    overlap: float


class PictureReader:
    """Reads scenes from pictures ``[3, 64, 64]`` in 0..1 on the CPU."""

    def __init__(self) -> None:
        painter = world.Painter()
        self.colors, self.shade = painter.colors, painter.shade[0]
        middle = slice(world.SIZE_PX - _KERNEL // 2, world.SIZE_PX + _KERNEL // 2)
        masks = painter.masks[:, :, middle, middle]
        self.masks = masks.reshape(-1, 1, _KERNEL, _KERNEL)
        self.area = self.masks.square().sum((1, 2, 3))

    def background(self, image: torch.Tensor) -> int:
        """The colour that most border pixels are nearest to."""
        backgrounds = self.colors[:, :, None, None] * self.shade
        nearest = (image - backgrounds).square().sum(1).argmin(0)
        inside = torch.zeros_like(nearest, dtype=torch.bool)
        inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
        return int(nearest[~inside].bincount(minlength=len(self.colors)).argmax())

    def objects(self, image: torch.Tensor, background: int) -> list[FoundObject]:
        """All objects, largest first."""
        plain = self.colors[background][:, None, None] * self.shade
        foreground = (image - plain).square().sum(0).sqrt() > FOREGROUND_DISTANCE
        # Edges mix two colours into a third, so only the interior tells the colour.
        interior = ~_spread(~foreground)
        nearest = (image - self.colors[:, :, None, None]).square().sum(1).argmin(0)
        found = []
        for whole in patches(interior):
            # Objects that touch are told apart by colour; a rim of mixed colour is no object.
            smallest = max(SMALLEST_INTERIOR, int(_TOUCHING_SHARE * whole.sum()))
            for color in nearest[whole].unique().tolist():
                for patch in patches(whole & (nearest == color), smallest):
                    near = _spread(_spread(_spread(patch)))
                    found.append((int(patch.sum()), self._fit(image, plain, color, near)))
        return [item for _, item in sorted(found, key=lambda pair: -pair[0])]

    def _fit(
        self, image: torch.Tensor, plain: torch.Tensor, color: int, near: torch.Tensor
    ) -> FoundObject:
        """The shape, size and place whose mask fits best to how much of ``color`` is there."""
        step = self.colors[color][:, None, None] - plain.expand_as(image)
        cover = ((image - plain) * step).sum(0) / step.square().sum(0).clamp(min=1e-6)
        cover = cover.clamp(0, 1) * near
        common = F.conv2d(cover[None, None], self.masks, padding=_KERNEL // 2)[0]
        overlap = common / (self.area[:, None, None] + cover.square().sum() - common)
        best = int(overlap.argmax())
        side = overlap.shape[-1]
        kind, place = divmod(best, side * side)
        shape, size = divmod(kind, len(world.SIZES))
        y, x = divmod(place, side)
        half = world.SIZE_PX / 2
        return FoundObject(color, shape, size, x - half, half - y, float(overlap.max()))


def _spread(mask: torch.Tensor) -> torch.Tensor:
    """The mask and its four neighbours in each pixel."""
    wide = F.pad(mask, (1, 1, 1, 1))
    return mask | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]


def patches(mask: torch.Tensor, smallest: int = SMALLEST_INTERIOR) -> list[torch.Tensor]:
    """The parts (eight neighbours) of a mask ``[H, W]`` with at least ``smallest`` pixels."""
    labels = torch.arange(1, mask.numel() + 1).view_as(mask) * mask
    while True:
        # Each part takes on the largest number that one of its pixels began with.
        grown = F.max_pool2d(labels[None].float(), 3, stride=1, padding=1)[0].long() * mask
        if torch.equal(grown, labels):
            break
        labels = grown
    names, sizes = labels[mask].unique(return_counts=True)
    return [labels == name for name in names[sizes >= smallest]]


def judge(scene: world.Scene, image: torch.Tensor, reader: PictureReader) -> Verdict:
    """Compare a picture with the scene that its caption was made from."""
    background = reader.background(image)
    objects = reader.objects(image, background)
    wanted = [(scene.color, scene.shape, scene.size)]
    if scene.count == 2:
        wanted.append((scene.color2, scene.shape2, scene.size2))
    # The largest of a colour speaks for it; extra ones are the count's business.
    by_color = {item.color: item for item in reversed(objects)}
    matched = [(by_color[c], s, z) for c, s, z in wanted if c in by_color]
    complete = len(matched) == len(wanted)
    relation = None
    if scene.count == 2:
        relation = complete and _relation(matched[0][0], matched[1][0]) == scene.relation
    return Verdict(
        background=background == scene.background,
        colors=complete,
        count=len(objects) == scene.count,
        relation=relation,
        shapes=complete and all(item.shape == shape for item, shape, _ in matched),
        sizes=complete and all(item.size == size for item, _, size in matched),
        overlap=sum(item.overlap for item, _, _ in matched) / len(wanted),
    )


def _relation(first: FoundObject, second: FoundObject) -> int:
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return 0 if dx > 0 else 1
    return 2 if dy < 0 else 3


def summarize(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Per cent of captions; ``relation`` of those with two objects, ``overlap`` a mean."""

    def share(values: list[bool]) -> float:
        return 100 * sum(values) / max(1, len(values))

    summary = {
        name: share([getattr(v, name) for v in verdicts])
        for name in ("background", "colors", "count", "shapes", "sizes")
    }
    summary["relation"] = share([v.relation for v in verdicts if v.relation is not None])
    aims = ("background", "colors", "count", "relation")
    summary["all of these four"] = share(
        [all(getattr(v, name) is not False for name in aims) for v in verdicts]
    )
    summary["overlap"] = 100 * sum(v.overlap for v in verdicts) / max(1, len(verdicts))
    return summary


def generate(
    model: str | Path,
    prompts: list[str],
    *,
    steps: int,
    max_sequence_length: int,
    seed: int = 0,
    batch: int = 25,
) -> torch.Tensor:
    """Pictures ``[N, 3, 64, 64]`` in 0..1; every prompt has its own generator seed."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images.append(
            pipeline(
                part,
                height=world.SIZE_PX,
                width=world.SIZE_PX,
                num_inference_steps=steps,
                max_sequence_length=max_sequence_length,
                generator=generators,
                output_type="pt",
            ).images.float()
        )
    return torch.cat(images)


def save_grid(images: torch.Tensor, path: Path, *, columns: int = 8, scale: int = 2) -> None:
    """Write pictures ``[N, 3, H, W]`` in 0..1 as one, enlarged without smoothing."""
    from PIL import Image

    rows = -(-len(images) // columns)
    padded = F.pad(images.clamp(0, 1), (1, 1, 1, 1), value=1.0)
    blank = torch.ones(rows * columns - len(images), *padded.shape[1:])
    grid = torch.cat([padded, blank]).unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)
    pixels = (grid.flatten(2, 3).flatten(0, 1) * 255).round().byte()
    picture = Image.fromarray(pixels.numpy())
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(
        path
    )


AIMS = {"background": 99.0, "colors": 95.0, "relation": 85.0}


def print_table(summary: dict[str, float], title: str) -> None:
    """Print the summary with rich."""
    from rich.console import Console
    from rich.table import Table

    table = Table("property", "%", "aim", title=title)
    for name, value in summary.items():
        table.add_row(name, f"{value:.1f}", f"{AIMS[name]:.0f}" if name in AIMS else "")
    Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure how well pictures obey their captions.")
    parser.add_argument("--model", required=True, help="pipeline folder")
    parser.add_argument("--n", type=int, default=200, help="number of held-out captions")
    parser.add_argument("--steps", type=int, default=50, help="inference steps")
    parser.add_argument("--max-sequence-length", type=int, default=16, help="padded prompt length")
    parser.add_argument("--seed", type=int, default=1, help="seed of captions and pictures")
    parser.add_argument("--json", type=Path, help="also write summary and verdicts here")
    parser.add_argument("--png", type=Path, help="also write a grid of the first 40 pictures here")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    scenes = world.held_out_scenes(args.n, args.seed)
    images = generate(
        args.model,
        [scene.caption() for scene in scenes],
        steps=args.steps,
        max_sequence_length=args.max_sequence_length,
        seed=args.seed,
    )
    reader = PictureReader()
    verdicts = [judge(scene, image, reader) for scene, image in zip(scenes, images, strict=True)]
    summary = summarize(verdicts)
    print_table(summary, f"{args.n} captions, padded to {args.max_sequence_length}")
    if args.png:
        save_grid(images[:40], args.png)
    if args.json:
        rows = [
            {"caption": scene.caption(), **asdict(verdict)}
            for scene, verdict in zip(scenes, verdicts, strict=True)
        ]
        args.json.write_text(json.dumps({"summary": summary, "verdicts": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
