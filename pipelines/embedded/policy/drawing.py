"""Pictures of episodes: `python -m blockcache.pipelines.embedded.policy.drawing --out FILE.png`.

One square per episode: where agent (orange) and disc (blue) began is drawn as an outline, where
they ended filled, with their paths; the goal is the green ring. A failed episode has a red frame.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from blockcache.pipelines.embedded.policy import task
from blockcache.pipelines.embedded.policy.pipeline import Rollout, load_pipeline, roll_out

TILE, COLUMNS = 150, 6
_FINE = 3
_GROUND, _FRAME, _FAILED = (250, 250, 248), (200, 200, 200), (214, 39, 40)
_AGENT, _DISC, _GOAL = (230, 120, 20), (50, 90, 180), (40, 160, 80)

Color = tuple[int, int, int]


def sheet(made: Rollout) -> Image.Image:
    """Every episode of a rollout, in reading order."""
    tiles = [_tile(made.states[:, i], bool(done)) for i, done in enumerate(made.success)]
    rows = -(-len(tiles) // COLUMNS)
    page = Image.new("RGB", (TILE * min(COLUMNS, len(tiles)), TILE * rows), "white")
    for i, tile in enumerate(tiles):
        page.paste(tile, (TILE * (i % COLUMNS), TILE * (i // COLUMNS)))
    return page


def _tile(states: torch.Tensor, is_done: bool) -> Image.Image:
    side = TILE * _FINE
    image = Image.new("RGB", (side, side), _GROUND)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, side - 1, side - 1), None, _FRAME if is_done else _FAILED, 2 * _FINE)
    agent, disc, goal = states.unbind(1)
    for path, radius, color in (
        (disc, task.DISC_RADIUS, _DISC),
        (agent, task.AGENT_RADIUS, _AGENT),
    ):
        _circle(pen, path[0], radius, outline=color)
        _circle(pen, path[-1], radius, fill=color)
        pen.line([_pixel(point) for point in path], color, _FINE)
    _circle(pen, goal[0], task.DISC_RADIUS, outline=_GOAL)
    return image.resize((TILE, TILE), Image.Resampling.LANCZOS)


def _circle(
    pen: ImageDraw.ImageDraw,
    center: torch.Tensor,
    radius: float,
    outline: Color | None = None,
    fill: Color | None = None,
) -> None:
    (x, y), r = _pixel(center), radius * TILE * _FINE / 2
    pen.ellipse((x - r, y - r, x + r, y + r), fill, outline, _FINE)


def _pixel(point: torch.Tensor) -> tuple[float, float]:
    """X to the right, y up, as on the table."""
    x, y = point.tolist()
    return (1 + x) / 2 * TILE * _FINE, (1 - y) / 2 * TILE * _FINE


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw episodes of the embedded policy.")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args(arguments)
    pipe, generator = load_pipeline(), torch.Generator().manual_seed(args.seed)

    def chunk(seen: torch.Tensor) -> torch.Tensor:
        actions: torch.Tensor = pipe(observation=seen, generator=generator, return_dict=False)[0]
        return actions

    sheet(roll_out(chunk, task.draw(args.episodes, generator))).save(args.out)


if __name__ == "__main__":
    main()
