"""What a comparison found: the figures, the pictures and the table they make."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from blockcache.plan import Plan
from blockcache.tuning.quality import CAP_DB, Scores, psnr

Picture: TypeAlias = NDArray[np.float32]
"""`[H, W, C]`, or `[F, H, W, C]` for a video; float in 0..1."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What one way of rendering did, item by item.

    steps: sampler steps. seconds: `[items][repeats]`. scores: against the uncached pictures.
    """

    name: str
    steps: int
    seconds: tuple[tuple[float, ...], ...]
    scores: tuple[Scores, ...]
    pictures: tuple[Picture, ...]

    @property
    def median_s(self) -> float:
        """Median over all items and repeats."""
        return statistics.median(second for row in self.seconds for second in row)

    @property
    def worst(self) -> int:
        """The item with the lowest PSNR."""
        return self._by_psnr()[0]

    @property
    def typical(self) -> int:
        """The item whose PSNR is the (lower) median."""
        return self._by_psnr()[(len(self.scores) - 1) // 2]

    def _by_psnr(self) -> list[int]:
        return sorted(range(len(self.scores)), key=lambda i: self.scores[i].psnr_db)

    def spread(self, figure: str) -> dict[str, float] | None:
        """Median and worst item of a figure of `Scores`; None where no item has it."""
        values = [getattr(item, figure) for item in self.scores]
        known = [value for value in values if value is not None]
        return {"median": statistics.median(known), "worst": min(known)} if known else None

    def quality(self) -> dict[str, Any]:
        """Median and worst of every figure, and how many items are identical."""
        return {
            "psnr_db": self.spread("psnr_db"),
            "ssim": self.spread("ssim"),
            "foreground_psnr_db": self.spread("foreground_db"),
            "worst_frame_psnr_db": self.spread("worst_frame_db"),
            "identical": sum(item.is_identical for item in self.scores),
        }


@dataclass(frozen=True, eq=False)
class Comparison:
    """The outcome of `compare`.

    model: its name in tables. summaries: blockcache's own, one per item. floor_db: PSNR between
    uncached runs of the same seed, the worst found; CAP_DB where all are identical. objections:
    rivals that could not run, with the reason. peak_gib: GPU memory by name, None without a GPU.
    """

    model: str
    pipeline: str
    plan: Plan
    steps: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    baseline: Entry
    accelerated: Entry
    rivals: tuple[Entry, ...]
    objections: dict[str, str]
    summaries: tuple[dict[str, Any], ...]
    floor_db: float
    peak_gib: dict[str, float] | None
    versions: dict[str, str]
    machine: dict[str, str]

    def speedup(self, entry: Entry | None = None) -> float:
        """Median uncached seconds over the median of `entry`, by default the accelerated one."""
        return self.baseline.median_s / (entry or self.accelerated).median_s

    def better_rivals(self) -> list[Entry]:
        """Rivals at least as fast that come nearer in the median and in the worst prompt."""
        return [rival for rival in self.rivals if self._is_better(rival)]

    def _is_better(self, rival: Entry) -> bool:
        ours, theirs = self.accelerated.spread("psnr_db"), rival.spread("psnr_db")
        if ours is None or theirs is None or self.speedup(rival) < self.speedup():
            return False
        return all(theirs[figure] >= ours[figure] for figure in ours)

    @property
    def computed_fraction(self) -> float:
        """Share of the block calls that were done, mean over the items."""
        return statistics.fmean(_computed_fraction(summary) for summary in self.summaries)

    @property
    def cache_bytes(self) -> int:
        """The most the cache held in any run."""
        held = (sum(m["cache_bytes"] for m in summary["models"]) for summary in self.summaries)
        return int(max(held))

    def frames_db(self, i: int) -> list[float]:
        """PSNR of every frame of video `i`; of a picture, its own."""
        pair = self.accelerated.pictures[i], self.baseline.pictures[i]
        if pair[0].ndim == 3:
            return [psnr(*pair)]
        return [psnr(a, b) for a, b in zip(*pair, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Every figure as plain data, without the pictures."""
        fast = self.accelerated
        return {
            "model": self.model,
            "pipeline": self.pipeline,
            "recipe": fast.name,
            "steps": self.steps,
            "seeds": list(self.seeds),
            "settings": self.settings,
            "baseline_s": self.baseline.median_s,
            "accelerated_s": fast.median_s,
            "speedup": self.speedup(),
            **fast.quality(),
            "worst": {"prompt": self.prompts[fast.worst], "seed": self.seeds[fast.worst]},
            "computed_fraction": self.computed_fraction,
            "cache_bytes": self.cache_bytes,
            "peak_gib": self.peak_gib,
            "determinism_floor_db": self.floor_db,
            "rivals": [self._rival(entry) for entry in self.rivals],
            "rivals_not_run": self.objections,
            "better_rivals": [entry.name for entry in self.better_rivals()],
            "items": [self._item(i) for i in range(len(self.prompts))],
            "summary": self.summaries[fast.typical],
            "plan": self.plan.to_json(),
            "versions": self.versions,
            "machine": self.machine,
        }

    def _rival(self, entry: Entry) -> dict[str, Any]:
        figures = {"seconds": entry.median_s, "speedup": self.speedup(entry)}
        return {"name": entry.name, "steps": entry.steps, **figures, **entry.quality()}

    def _item(self, i: int) -> dict[str, Any]:
        scores = self.accelerated.scores[i]
        return {
            "prompt": self.prompts[i],
            "seed": self.seeds[i],
            "baseline_s": list(self.baseline.seconds[i]),
            "accelerated_s": list(self.accelerated.seconds[i]),
            "psnr_db": scores.psnr_db,
            "ssim": scores.ssim,
            "foreground_psnr_db": scores.foreground_db,
            "worst_frame_psnr_db": scores.worst_frame_db,
            "computed_fraction": _computed_fraction(self.summaries[i]),
            **self._video(i),
        }

    def _video(self, i: int) -> dict[str, Any]:
        """What only a video has: every frame's PSNR, the motion's, and its flicker."""
        scores = self.accelerated.scores[i]
        if self.accelerated.pictures[i].ndim == 3:
            return {}
        return {
            "frames_psnr_db": self.frames_db(i),
            "motion_psnr_db": scores.motion_db,
            "flicker": scores.flicker,
        }

    def __str__(self) -> str:
        """One screen: the table, the worst prompt and what the numbers were made with."""
        prompts = f"{len(self.prompts)} prompt" + "s" * (len(self.prompts) > 1)
        title = f"{self.model} ({self.pipeline}), {self.steps} steps, {prompts}"
        return "\n".join([title, "", *self._table(), "", *self._remarks()])

    def _table(self) -> list[str]:
        rows = [
            ["", "steps", "seconds", "speed-up", "PSNR dB", "foreground", "SSIM"],
            ["", "", "", "", *["med / worst"] * 3],
            ["uncached", str(self.steps), f"{self.baseline.median_s:.2f}", "1.00x", "", "", ""],
        ]
        rows += [self._row(entry) for entry in (self.accelerated, *self.rivals)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [_aligned(row, widths) for row in rows]
        return [*lines[:2], "-" * max(map(len, lines)), *lines[2:]]

    def _row(self, entry: Entry) -> list[str]:
        return [
            entry.name,
            str(entry.steps),
            f"{entry.median_s:.2f}",
            f"{self.speedup(entry):.2f}x",
            _pair(entry.spread("psnr_db"), 1),
            _pair(entry.spread("foreground_db"), 1),
            _pair(entry.spread("ssim"), 3),
        ]

    def _remarks(self) -> Iterator[str]:
        fast = self.accelerated
        yield (
            f"{self.computed_fraction:.0%} of the block calls computed, "
            f"cache {size(self.cache_bytes)}"
        )
        worst, worst_db = fast.worst, fast.scores[fast.worst].psnr_db
        yield f'worst: "{self.prompts[worst]}", seed {self.seeds[worst]}: {worst_db:.1f} dB'
        apart = "identical" if self.floor_db >= CAP_DB else f"{self.floor_db:.1f} dB apart"
        yield f"two uncached runs: {apart}"
        identical = sum(item.is_identical for item in fast.scores)
        if identical:
            yield f"{identical} of {len(fast.scores)} identical, counted as {CAP_DB:.0f} dB"
        for rival in self.better_rivals():
            yield f"{rival.name} ({rival.steps} steps) is as fast and nearer: no cache needed here"
        for name, reason in self.objections.items():
            yield f"{name}: not run, {reason}"
        where = self.machine.get("gpu", self.machine["cpu"])
        dtype, threads = self.machine["dtype"], self.machine["threads"]
        yield f"{where}, {dtype}, threads: {threads}, torch {self.versions['torch']}"


def _computed_fraction(summary: dict[str, Any]) -> float:
    """Share of the block calls that were done, over all branches of all denoisers."""
    branches = [branch for model in summary["models"] for branch in model["branches"]]
    calls = sum(branch["block_calls"] for branch in branches)
    skipped = sum(branch["block_calls_skipped"] for branch in branches)
    return 1 - skipped / calls if calls else 1.0


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _aligned(row: list[str], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join(cells).rstrip()


def _pair(figures: dict[str, float] | None, digits: int) -> str:
    if figures is None:
        return "-"
    return f"{figures['median']:.{digits}f} / {figures['worst']:.{digits}f}"
