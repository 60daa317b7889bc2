"""Does a clip show what its caption says? Measured by a program, without a reference clip.

    python -m blockcache.pipelines.embedded.obedience_video --model FOLDER --n 48

The world is simple enough to be read back: most pixels are the background, connected patches of the
others are the objects. Their outlines, turned to all angles, tell the shape and how it rotates, and
where each of them is two frames later tells the motion.
"""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from blockcache.pipelines import models
from blockcache.pipelines.embedded import world_video
from blockcache.pipelines.embedded.obedience import patches, print_table
from blockcache.pipelines.embedded.world_video import (
    BOUNCING,
    HOP,
    ROTATING,
    SHAPES,
    TOKEN_FRAMES,
    TOKEN_PX,
    Clip,
)

# Colour distance (Euclidean, RGB in 0..1) from the background beyond which a pixel belongs to an
# object.
FOREGROUND_DISTANCE = 0.3
# Smallest object in pixels; the true ones cover 600 (ring) to 1076 (square).
SMALLEST_OBJECT = 150
# Mean distance in pixels from the best path of a motion, beyond which it is none of them.
LONGEST_STRAY = 6.0
# Objects are followed over two frames: far enough to tell motion from noise, and near enough to
# know them again, since neighbours are 64 pixels apart.
_LAG = TOKEN_FRAMES
_FARTHEST = 20.0
_ANGLES = 48
# Half the size of the windows in which outlines are compared; they hold every shape at any angle.
_REACH = 28
_SYMMETRY = {"square": 4, "triangle": 3, "ring": 0, "cross": 4}


@dataclass(frozen=True)
class Reading:
    """A clip read back: indices as in Clip, -1 for what cannot be told.

    overlap: Mean intersection over union with the best fitting true outline, of objects that the
    edges of the picture do not cut.
    """

    background: int
    color: int
    shape: int
    motion: int
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """Which parts of the caption hold, and the overlap as in Reading."""

    background: bool
    color: bool
    shape: bool
    motion: bool
    overlap: float


class ClipReader:
    """Reads clips ``[frames, 3, height, width]`` in 0..1 on the CPU."""

    def __init__(self) -> None:
        self.colors = world_video.colors(torch.arange(len(world_video.COLOR_NAMES)))
        self.outlines = _outlines()

    def read(self, video: torch.Tensor) -> Reading:
        """What the clip shows."""
        pixels = video.float().movedim(1, -1)
        names = (pixels[..., None, :] - self.colors).square().sum(-1).argmin(-1)
        background = int(names.flatten().bincount().argmax())
        is_object = (pixels - self.colors[background]).norm(dim=-1) > FOREGROUND_DISTANCE
        votes = names[is_object].bincount(minlength=len(self.colors))
        votes[background] = 0
        color = int(votes.argmax()) if votes.any() else -1
        objects = [_whole_objects(mask) for mask in is_object]
        fits = [self._fit(masks) for masks in objects]
        seen = [fit.amax(2).mean(0) for fit in fits if len(fit)]
        if not seen:
            return Reading(background, color, -1, -1, 0.0)
        by_shape = torch.stack(seen).mean(0)
        shape = int(by_shape.argmax())
        steps = _steps([_centers(masks) for masks in objects])
        turn = _turn_per_frame([fit[:, shape].mean(0) for fit in fits], SHAPES[shape])
        motion = -1 if steps is None else _motion(steps, turn)
        return Reading(background, color, shape, motion, float(by_shape.max()))

    def _fit(self, masks: list[torch.Tensor]) -> torch.Tensor:
        """Overlap of every mask with every outline at every angle: ``[N, shapes, angles]``."""
        if not masks:
            return torch.empty(0, *self.outlines.shape[:2])
        windows = []
        for mask, center in zip(masks, _centers(masks), strict=True):
            wide = F.pad(mask.float(), (_REACH,) * 4)
            x, y = (round(float(c)) for c in center)
            windows.append(wide[y : y + 2 * _REACH, x : x + 2 * _REACH])
        flat = torch.stack(windows).flatten(1)
        outlines = self.outlines.flatten(2)
        common = torch.einsum("np,sap->nsa", flat, outlines)
        return common / (flat.sum(1)[:, None, None] + outlines.sum(2) - common)


def _outlines() -> torch.Tensor:
    """Outlines of all shapes at all angles, centre of area in the middle: ``[S, A, W, W]``."""
    axis = torch.arange(2 * _REACH) + 0.5 - _REACH
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    outlines = torch.empty(len(SHAPES), _ANGLES, 2 * _REACH, 2 * _REACH)
    for shape in range(len(SHAPES)):
        upright = world_video.signed_distances(x, y, shape) < 0
        cx, cy = x[upright].mean(), y[upright].mean()
        for step in range(_ANGLES):
            angle = 2 * math.pi * step / _ANGLES
            cos, sin = math.cos(angle), math.sin(angle)
            distance = world_video.signed_distances(
                cos * x + sin * y + cx, cos * y - sin * x + cy, shape
            )
            outlines[shape, step] = distance < 0
    return outlines


def _whole_objects(mask: torch.Tensor) -> list[torch.Tensor]:
    """The connected parts of a mask ``[H, W]`` that the edges do not cut."""
    inside = torch.zeros_like(mask)
    inside[1:-1, 1:-1] = True
    return [part for part in patches(mask, SMALLEST_OBJECT) if not (part & ~inside).any()]


def _centers(masks: list[torch.Tensor]) -> torch.Tensor:
    """Column and row of the middles of masks, ``[N, 2]``."""
    if not masks:
        return torch.empty(0, 2)
    return torch.stack([mask.nonzero().float().mean(0).flip(0) + 0.5 for mask in masks])


def _steps(centers: list[torch.Tensor]) -> torch.Tensor | None:
    """Mean step of all objects from each frame to the next but one, ``[frames - 2, 2]``.

    Frames without an object that is found again repeat what came before; None if all are such.
    """
    steps: list[torch.Tensor | None] = []
    for now, later in zip(centers, centers[_LAG:], strict=False):
        step = None
        if len(now) and len(later):
            away = later[None] - now[:, None]
            nearest = away.norm(dim=-1).argmin(1)
            moved = away[torch.arange(len(now)), nearest]
            moved = moved[moved.norm(dim=1) < _FARTHEST]
            if len(moved):
                step = moved.mean(0)
        steps.append(step)
    known = next((step for step in steps if step is not None), None)
    if known is None:
        return None
    filled = []
    for step in steps:
        known = known if step is None else step
        filled.append(known)
    return torch.stack(filled)


def _turn_per_frame(fits: list[torch.Tensor], shape: str) -> float:
    """Mean turn from frame to frame in radians, counter-clockwise; 0 for a round shape.

    fits: For each frame the overlap by angle, not a number if nothing was seen.
    """
    symmetry = _SYMMETRY[shape]
    angles = torch.stack([fit.argmax() for fit in fits]) * (2 * math.pi / _ANGLES)
    is_seen = torch.stack([~fit.isnan().any() for fit in fits])
    is_seen = is_seen[1:] & is_seen[:-1]
    if symmetry == 0 or not is_seen.any():
        return 0.0
    turns = symmetry * angles.diff()[is_seen]
    return math.atan2(float(turns.sin().mean()), float(turns.cos().mean())) / symmetry


def _motion(steps: torch.Tensor, turn: float) -> int:
    """The motion whose steps fit best, with any start; -1 if none does."""
    time = torch.arange(len(steps) + _LAG) / TOKEN_FRAMES
    directions = world_video.DIRECTIONS.float()
    paths = {m: [time[:, None] * d] for m, d in enumerate(directions)}
    phases = torch.arange(2 * HOP * TOKEN_FRAMES) / TOKEN_FRAMES
    heights = [HOP - ((time + phase) % (2 * HOP) - HOP).abs() for phase in phases]
    paths[BOUNCING] = [torch.stack([torch.zeros_like(h), h], 1) for h in heights]
    paths[ROTATING] = [torch.zeros(len(time), 2)]
    # Rows count downwards.
    unit = TOKEN_PX * torch.tensor([1.0, -1.0])
    stray = {
        motion: min(
            float((steps - (path[_LAG:] - path[:-_LAG]) * unit).norm(dim=1).mean())
            for path in of_motion
        )
        for motion, of_motion in paths.items()
    }
    best = min(stray, key=lambda motion: stray[motion])
    expected = world_video.TURN / TOKEN_FRAMES
    if stray[best] > LONGEST_STRAY or (best == ROTATING and abs(turn - expected) > expected / 2):
        return -1
    return best


def judge(clip: Clip, reading: Reading) -> Verdict:
    """Compare what was read with the clip that the caption was made from."""
    same = {f.name: getattr(clip, f.name) == getattr(reading, f.name) for f in fields(Clip)}
    return Verdict(**same, overlap=reading.overlap)


def summarize(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Per cent of captions; ``overlap`` a mean."""
    names = ("background", "color", "shape", "motion")
    n = max(1, len(verdicts))
    summary = {name: 100 * sum(getattr(v, name) for v in verdicts) / n for name in names}
    summary["all of these four"] = (
        100 * sum(all(getattr(v, name) for name in names) for v in verdicts) / n
    )
    summary["overlap"] = 100 * sum(v.overlap for v in verdicts) / n
    return summary


def generate(
    pipeline: Any, clips: list[Clip], call: dict[str, Any], *, seed: int = 0, batch: int = 4
) -> torch.Tensor:
    """Clips ``[N, frames, 3, height, width]`` in 0..1; every caption has its own generator seed."""
    videos = []
    for start in range(0, len(clips), batch):
        part = clips[start : start + batch]
        videos.append(
            pipeline(
                [clip.caption() for clip in part],
                generator=[
                    torch.Generator().manual_seed(seed + start + i) for i in range(len(part))
                ],
                output_type="pt",
                **call,
            ).frames.float()
        )
    return torch.cat(videos).clamp(0, 1)


def save_strips(videos: torch.Tensor, path: Path, *, every: int = 2) -> None:
    """Write one row of frames per clip."""
    from PIL import Image

    framed = F.pad(videos[:, ::every], (1, 1, 1, 1), value=1.0)
    picture = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((picture * 255).round().byte().numpy()).save(path, optimize=True)


def save_gif(videos: torch.Tensor, path: Path, *, columns: int = 6, frame_ms: int = 80) -> None:
    """Write all clips side by side as one animation."""
    from PIL import Image

    rows = -(-len(videos) // columns)
    blank = torch.ones(rows * columns - len(videos), *videos.shape[1:])
    framed = F.pad(torch.cat([videos, blank]), (2, 2, 2, 2), value=1.0)
    grid = (
        framed.unflatten(0, (rows, columns)).permute(2, 0, 4, 1, 5, 3).flatten(3, 4).flatten(1, 2)
    )
    frames = [Image.fromarray(frame.numpy()) for frame in (grid * 255).round().byte()]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=frame_ms, loop=0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure how well clips obey their captions.")
    parser.add_argument("--model", default="tiny-video", help="its name, or a pipeline folder")
    parser.add_argument("--n", type=int, default=48, help="number of held-out captions")
    parser.add_argument("--steps", type=int, help="inference steps, if not the model's own")
    parser.add_argument("--num-frames", type=int, help="odd, if not the model's own")
    parser.add_argument("--guidance-scale", type=float, help="if not the model's own")
    parser.add_argument("--seed", type=int, default=1, help="seed of captions and clips")
    parser.add_argument("--json", type=Path, help="also write summary and readings here")
    parser.add_argument("--png", type=Path, help="also write every second frame of 12 clips here")
    parser.add_argument("--gif", type=Path, help="also write the first 12 clips as animation here")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    model = models.find(args.model)
    asked = {
        "num_inference_steps": args.steps,
        "num_frames": args.num_frames,
        "guidance_scale": args.guidance_scale,
    }
    call = model.call | {name: value for name, value in asked.items() if value is not None}
    clips = world_video.held_out_clips(args.n, args.seed)
    pipeline = models.load(model, torch.device("cpu"))
    videos = generate(pipeline, clips, call, seed=args.seed)
    reader = ClipReader()
    readings = [reader.read(video) for video in videos]
    verdicts = [judge(clip, reading) for clip, reading in zip(clips, readings, strict=True)]
    summary = summarize(verdicts)
    print_table(summary, f"{args.n} captions, {json.dumps(call)}")
    if args.png:
        save_strips(videos[:12], args.png)
    if args.gif:
        save_gif(videos[:12], args.gif)
    if args.json:
        rows = [
            {"caption": clip.caption(), **asdict(verdict), "read": asdict(reading)}
            for clip, verdict, reading in zip(clips, verdicts, readings, strict=True)
        ]
        args.json.write_text(json.dumps({"summary": summary, "clips": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
