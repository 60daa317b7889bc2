"""The figures, as SVG that takes its colours from the page: light, dark, and any width.

Every mark carries its numbers in `data-tip`; the page shows them on hovering and on focus. Nothing
is loaded from anywhere. Text from outside is escaped.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from blockcache.demo.story import COMPUTED, KINDS, PARTLY, PREDICTED, REUSED, Map, Story
from blockcache.tuning.quality import CAP_DB

_WIDTH = 540
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 44
_NAME_HIGH, _NAME_LONG = 20, 26
_CLASSES = {COMPUTED: "computed", REUSED: "reused", PREDICTED: "predicted", PARTLY: "partly"}


@dataclass(frozen=True)
class Dot:
    """A run on the plane of time and quality.

    name: stands beside it where it is on the front. is_front: on the Pareto front. is_other: of
    another prompt or other settings than those shown.
    """

    id: str
    seconds: float
    psnr_db: float
    tip: str
    name: str = ""
    is_front: bool = False
    is_other: bool = False
    is_current: bool = False


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (seconds, quality) no other beats in both; by seconds."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front, best = [], -math.inf
    for i in order:
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front


# ---- what happened in a run ---------------------------------------------------------------------


def block_map(found: Map) -> str:
    """Steps to the right, blocks downwards, one cell for what happened."""
    blocks, steps = found.kinds.shape
    high = max(4, min(18, 300 // blocks))
    plot = _Plot(steps, blocks * high)
    wide = plot.wide / steps
    gap = 1.0 if wide > 5 and high > 5 else 0.4
    for block in range(blocks):
        for step in range(steps):
            kind = int(found.kinds[block, step])
            tip = f"step {step}, block {block}: {KINDS[kind]}"
            x, y = _LEFT + step * wide, _TOP + block * high
            plot.add(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - gap:.1f}" height="{high - gap:.1f}" '
                f'class="bc-{_CLASSES[kind]}" data-tip="{tip}"/>'
            )
    for step in _few(steps):
        plot.text(_LEFT + (step + 0.5) * wide, plot.bottom + 16, str(step), "middle")
    for block in _few(blocks, 8):
        plot.text(_LEFT - 8, _TOP + (block + 0.5) * high + 4, str(block), "end")
    plot.axes("step", "block")
    share = float(((found.kinds == COMPUTED) | (found.kinds == PARTLY)).mean())
    words = f"{share:.0%} of {blocks} blocks times {steps} steps computed"
    return plot.svg(f"Step by block map: {words}")


def stripes(computed: Collection[int], steps: int, blocks: int, words: str) -> str:
    """The idea of a block map, without axes: these steps are computed, the others are not."""
    wide, high = _WIDTH / steps, 9
    cells = "".join(
        f'<rect x="{step * wide:.1f}" y="{block * high}" width="{wide - 1.5:.1f}" '
        f'height="{high - 1.5}" class="bc-{"computed" if step in computed else "reused"}"/>'
        for step in range(steps)
        for block in range(blocks)
    )
    label = escape(words, quote=True)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {blocks * high}" role="img" aria-label="{label}">{cells}</svg>'
    )


def changes(story: Story) -> str:
    """What the cache measured against its threshold, and how the uncached output moved."""
    steps = len(story.step_ms[0])
    seen = [value for _, value in story.changes]
    moved = [(i, value) for i, value in enumerate(story.moved) if value is not None]
    values = [*seen, *(value for _, value in moved)]
    values += [story.threshold] if story.threshold else []
    values = [value for value in values if value > 0]
    if not values:
        return nothing("No change was measured in this run.")
    low, high = min(values) / 1.3, max(values) * 1.3
    plot = _Plot(steps, 214)
    y = _Log(low, high, plot)
    for tick in y.ticks():
        plot.grid(y(tick), f"{tick:g}")
    plot.steps(steps)
    plot.line([(plot.at(i, steps), y(value)) for i, value in moved if value > 0], "bc-faint-line")
    for i, value in moved:
        tip = f"step {i}: the uncached output moved by {value:.3f}"
        plot.dot(plot.at(i, steps), y(max(value, low)), 2.5, "bc-faint-dot", tip)
    if story.threshold:
        plot.across(y(story.threshold))
    is_gate = story.threshold is not None
    for i, value in story.changes:
        what = _what(story, i)
        verdict = f", {what}" if is_gate else " since the last computed step"
        tip = f"step {i}: change {value:.3f}{verdict}"
        plot.dot(plot.at(i, steps), y(min(max(value, low), high)), 4.5, f"bc-{what}", tip)
    if story.threshold:
        label = f"threshold {story.threshold:g}"
        plot.text(_WIDTH - _RIGHT, y(story.threshold) - 7, label, "end", "bc-mark-text")
    plot.axes("step", "relative change")
    return plot.svg(
        f"Change per step, {len(seen)} measured, from {min(values):.3f} to {max(values):.3f}"
    )


def errors(story: Story) -> str:
    """How far the latents have moved away after each step."""
    found = [(i, value) for i, value in enumerate(story.errors_db)]
    apart = [value for _, value in found if value < CAP_DB]
    if not found:
        return nothing("This pipeline does not show its latents.")
    if not apart:
        return nothing("The latents are the same after every step.")
    steps = len(found)
    low, high = 10 * math.floor(min(apart) / 10), 10 * math.ceil((max(apart) + 1) / 10)
    plot = _Plot(steps, 214)
    y = _Linear(low, high, plot)
    for tick in range(low, high + 1, 10 if high - low <= 60 else 20):
        plot.grid(y(tick), str(tick))
    plot.steps(steps)
    plot.line([(plot.at(i, steps), y(value)) for i, value in found if value < CAP_DB], "bc-line")
    for i, value in found:
        is_same = value >= CAP_DB
        what = _what(story, i)
        tip = f"after step {i} ({what}): " + ("identical" if is_same else f"{value:.1f} dB")
        plot.dot(plot.at(i, steps), y(high if is_same else value), 3.5, f"bc-{what}", tip)
    same = [i for i, value in found if value >= CAP_DB]
    if same:
        plot.text(plot.at(same[-1], steps) + 9, y(high) + 4, "identical", "start", "bc-at-mark")
    plot.axes("step", "nearness, dB")
    return plot.svg(
        f"Nearness of the latents per step, {max(apart):.0f} down to {min(apart):.0f} dB"
    )


def _what(story: Story, step: int) -> str:
    """What happened to most blocks in a step."""
    kinds = story.step_kinds
    return _CLASSES[kinds[step]] if step < len(kinds) else "computed"


def parts(story: Story) -> str:
    """Where the seconds went, uncached above and cached below."""
    totals = [sum(pair[side] for pair in story.parts.values()) for side in (0, 1)]
    most = max(*totals, 1e-9)
    plot = _Plot(1, 104, left=100)
    for side, label in enumerate(("uncached", "cached")):
        x, y = float(plot.left), _TOP + side * 54
        plot.text(plot.left - 8, y + 23, label, "end")
        for number, (name, pair) in enumerate(story.parts.items()):
            wide = plot.wide * pair[side] / most
            tip = (
                f"{label}, {name}: {pair[side]:.3f} s ({pair[side] / max(totals[side], 1e-9):.0%})"
            )
            if wide > 0:
                plot.add(
                    f'<rect x="{x:.1f}" y="{y}" width="{max(wide, 0.5):.1f}" height="36" '
                    f'class="bc-part-{number}" data-tip="{tip}"/>'
                )
            x += wide
    for tick in _ticks(0, most, 5):
        x = plot.left + plot.wide * tick / most
        plot.text(x, plot.bottom + 18, f"{tick:g}", "middle")
    plot.axes("seconds", "")
    words = ", ".join(f"{name} {a:.2f} s and {b:.2f} s" for name, (a, b) in story.parts.items())
    return plot.svg(f"Time by part, uncached and cached: {words}")


def part_legend(names: Iterable[str]) -> str:
    """What the colours of `parts` mean."""
    keys = (f'<span><i class="bc-part-{i}"></i>{escape(n)}</span>' for i, n in enumerate(names))
    return f'<p class="bc-legend">{"".join(keys)}</p>'


def kind_legend(maps: Sequence[Map]) -> str:
    """What the colours of the maps mean; only what occurs."""
    there = sorted({int(kind) for found in maps for kind in set(found.kinds.flat)})
    keys = (f'<span><i class="bc-{_CLASSES[kind]}"></i>{KINDS[kind]}</span>' for kind in there)
    return f'<p class="bc-legend">{"".join(keys)}</p>'


# ---- many runs ----------------------------------------------------------------------------------


def plane(dots: Sequence[Dot], baseline_s: float | None) -> str:
    """Time against quality; each dot can be clicked, and reached by keyboard."""
    seconds = [dot.seconds for dot in dots] + ([baseline_s] if baseline_s else [])
    known = [dot.psnr_db for dot in dots if dot.psnr_db < CAP_DB] or [40.0]
    low, high = 5 * math.floor((min(known) - 1) / 5), 5 * math.ceil((max(known) + 2) / 5)
    most = 1.12 * max(seconds)
    plot = _Plot(1, 260)
    y = _Linear(low, high, plot)
    for level in range(low, high + 1, 5 if high - low <= 40 else 10):
        is_same = level == high and any(dot.psnr_db >= CAP_DB for dot in dots)
        plot.grid(y(level), "same" if is_same else str(level))
    for tick in _ticks(0, most, 6):
        plot.text(plot.left + plot.wide * tick / most, plot.bottom + 16, f"{tick:g}", "middle")
    places = {
        d.id: (plot.left + plot.wide * d.seconds / most, y(min(d.psnr_db, high))) for d in dots
    }
    if baseline_s:
        plot.upright(plot.left + plot.wide * baseline_s / most, f"uncached {baseline_s:.2f} s")
    plot.line(
        [places[d.id] for d in sorted(dots, key=lambda d: d.seconds) if d.is_front], "bc-front"
    )
    # The current one last, so that it lies on top.
    for dot in sorted(dots, key=lambda d: (d.is_current, not d.is_other)):
        plot.add(_button(dot, *places[dot.id]))
    _name_front(plot, dots, places)
    plot.axes("seconds", "PSNR, dB")
    return plot.svg(f"Time against quality of {len(dots)} runs", is_group=True)


def _name_front(plot: "_Plot", dots: Sequence[Dot], places: dict[str, tuple[float, float]]) -> None:
    """Names below and to the right of their dots, where the line does not run."""
    lowest = -math.inf
    for dot in sorted((d for d in dots if d.is_front), key=lambda d: d.psnr_db, reverse=True):
        x, y = places[dot.id]
        if y - lowest >= _NAME_HIGH:
            lowest = y
            name = dot.name if len(dot.name) <= _NAME_LONG else f"{dot.name[: _NAME_LONG - 1]}…"
            is_far = x > plot.left + 0.7 * plot.wide
            plot.text(
                x + (-12 if is_far else 11), y + 15, name, "end" if is_far else "start", "bc-name"
            )


def _button(dot: Dot, x: float, y: float) -> str:
    states = {"bc-other": dot.is_other, "bc-on-front": dot.is_front, "bc-current": dot.is_current}
    classes = " ".join(["bc-run", *(name for name, holds in states.items() if holds)])
    tip = escape(dot.tip, quote=True)
    # The invisible disc is what a finger hits.
    return (
        f'<g class="{classes}" role="button" tabindex="0" data-run="{dot.id}" data-tip="{tip}" '
        f'aria-label="{tip}. Bring this pair back."><circle cx="{x:.1f}" cy="{y:.1f}" r="14" '
        f'class="bc-hit"/><circle cx="{x:.1f}" cy="{y:.1f}" r="6"/></g>'
    )


# ---- drawing ------------------------------------------------------------------------------------


def nothing(words: str) -> str:
    """In the place of a figure."""
    return f'<p class="bc-nothing">{escape(words)}</p>'


class _Plot:
    """An SVG with room for axes; x is spread over the width, y is given in pixels."""

    def __init__(self, steps: int, height: int, left: int = _LEFT) -> None:
        self.left, self.height = left, height
        self.wide = _WIDTH - left - _RIGHT
        self.bottom = _TOP + height
        self._marks: list[str] = []

    def add(self, mark: str) -> None:
        self._marks.append(mark)

    def at(self, step: int, steps: int) -> float:
        """The middle of a step."""
        return self.left + self.wide * (step + 0.5) / steps

    def text(self, x: float, y: float, text: str, anchor: str, name: str = "bc-tick") -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.add(f'<text {place} class="{name}">{escape(text)}</text>')

    def grid(self, y: float, label: str) -> None:
        right = _WIDTH - _RIGHT
        self.add(f'<path d="M{self.left} {y:.1f}H{right}" class="bc-grid"/>')
        self.text(self.left - 8, y + 4, label, "end")

    def steps(self, steps: int) -> None:
        for step in _few(steps):
            self.text(self.at(step, steps), self.bottom + 16, str(step), "middle")

    def across(self, y: float) -> None:
        self.add(f'<path d="M{self.left} {y:.1f}H{_WIDTH - _RIGHT}" class="bc-mark"/>')

    def upright(self, x: float, label: str) -> None:
        self.add(f'<path d="M{x:.1f} {_TOP}V{self.bottom}" class="bc-mark"/>')
        # Below, where the dots of a front that goes up to the right are not.
        self.text(x - 6, self.bottom - 8, label, "end", "bc-mark-text")

    def line(self, points: Sequence[tuple[float, float]], name: str) -> None:
        if len(points) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            self.add(f'<path d="M{path}" class="{name}"/>')

    def dot(self, x: float, y: float, radius: float, name: str, tip: str) -> None:
        tip = escape(tip, quote=True)
        self.add(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{name}" data-tip="{tip}"/>'
        )

    def axes(self, x: str, y: str) -> None:
        middle = _TOP + self.height / 2
        self.text(self.left + self.wide / 2, self.bottom + 36, x, "middle", "bc-axis")
        if y:
            self.add(
                f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle" '
                f'class="bc-axis bc-upright">{escape(y)}</text>'
            )

    def svg(self, words: str, is_group: bool = False) -> str:
        """The picture. words: what it says, for those who do not see it."""
        role = "group" if is_group else "img"
        box = f"0 0 {_WIDTH} {self.bottom + _BOTTOM}"
        label = escape(words, quote=True)
        marks = "".join(self._marks)
        return (
            f'<div class="bc-plot"><svg viewBox="{box}" role="{role}" aria-label="{label}">'
            f"{marks}</svg></div>"
        )


class _Linear:
    def __init__(self, low: float, high: float, plot: _Plot) -> None:
        self._low, self._high, self._plot = low, max(high, low + 1e-9), plot

    def __call__(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return self._plot.bottom - share * self._plot.height


class _Log(_Linear):
    def __init__(self, low: float, high: float, plot: _Plot) -> None:
        super().__init__(math.log(low), math.log(high), plot)
        self._range = (low, high)

    def __call__(self, value: float) -> float:
        return super().__call__(math.log(value))

    def ticks(self) -> list[float]:
        low, high = self._range
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        return [tick for tick in every if low <= tick <= high]


def _few(count: int, most: int = 12) -> list[int]:
    """Numbers worth writing along an axis."""
    every = next((n for n in (1, 2, 5, 10, 20, 50) if count <= most * n), 100)
    return list(range(0, count, every))


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values from low to high, `most` at most."""
    rough = max((high - low) / most, 1e-9)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    count = int((high - low) / step + 1e-9)
    return [round(low + i * step, 10) for i in range(count + 1)]
