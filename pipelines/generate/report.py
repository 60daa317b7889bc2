"""What came of a run: the merged manifest, the figures, the contact sheet and the gallery."""

import statistics
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.pipelines.generate import claims, gallery, manifest
from blockcache.pipelines.generate.job import Survey

_FAILURES_SHOWN = 5


@dataclass
class Extreme:
    """A figure's mean and its worst item."""

    total: float = 0.0
    count: int = 0
    worst: float = float("inf")
    id: str = ""

    def add(self, value: float, name: str) -> None:
        """Take in one item."""
        self.total += value
        self.count += 1
        if value < self.worst:
            self.worst, self.id = value, name

    def __str__(self) -> str:
        """Mean and worst."""
        digits = 1 if abs(self.worst) > 1.5 else 3
        mean = self.total / self.count
        return f"mean {mean:.{digits}f}, worst {self.worst:.{digits}f} (item {self.id})"


@dataclass
class Report:
    """The figures of all processes together. Seconds are per item."""

    folder: Path
    counts: Mapping[bytes, int]
    seconds: "array[float]" = field(default_factory=lambda: array("d"))
    baseline_s: "array[float]" = field(default_factory=lambda: array("d"))
    reuse: Extreme = field(default_factory=Extreme)
    psnr: Extreme = field(default_factory=Extreme)
    ssim: Extreme = field(default_factory=Extreme)
    failures: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path, survey: Survey, counts: Mapping[bytes, int]) -> "Report":
        """Merge the manifests, read the figures of this job's items off them, draw the pages."""
        merged = manifest.merge(folder)
        report = cls(folder, counts, files=[merged.name])
        for row in _rows_of(merged, survey):
            report._add(row)
        report.files += gallery.write(folder, lambda: _rows_of(merged, survey), report.lines())
        return report

    def _add(self, row: dict[str, Any]) -> None:
        if row["status"] != "done":
            if len(self.failures) < _FAILURES_SHOWN:
                self.failures.append(f"{row['id']}: {row['error']}")
            return
        self.seconds.append(row["seconds"])
        self.reuse.add(row["reuse"], row["id"])
        if "psnr_db" in row:
            self.baseline_s.append(row["baseline_s"])
            self.psnr.add(row["psnr_db"], row["id"])
            self.ssim.add(row["ssim"], row["id"])

    def lines(self) -> list[str]:
        """For people: what was done, how long it took, and what it cost."""
        done, failed = self.counts[claims.DONE], self.counts[claims.FAILED]
        todo, bad = self.counts[claims.TODO], self.counts[claims.BAD]
        parts = [f"{done} of {done + failed + todo} items done"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{todo} to do (give the same command again)"] if todo else []
        parts += [f"{bad} bad rows skipped"] if bad else []
        return [", ".join(parts), *self._figures(), *(f"failed: {why}" for why in self.failures)]

    def _figures(self) -> Iterator[str]:
        if not self.seconds:
            return
        typical = statistics.median(self.seconds)
        reuse = self.reuse.total / self.reuse.count
        yield f"{typical:.2f} s per item (median), {reuse:.0%} of the block calls reused"
        if self.psnr.count:
            plain = statistics.median(self.baseline_s)
            yield f"uncached {plain:.2f} s per item, so {plain / typical:.2f}x as fast"
            yield f"PSNR dB: {self.psnr}"
            yield f"SSIM: {self.ssim}"

    def __str__(self) -> str:
        """The lines and what was written where."""
        return "\n".join([*self.lines(), f"{self.folder}: {', '.join(self.files)}"])


def _rows_of(merged: Path, survey: Survey) -> Iterator[dict[str, Any]]:
    """The lines that belong to this job; a folder may hold others' as well."""
    keys = np.sort(survey.keys)
    for row in manifest.rows(merged):
        key = np.uint64(manifest.key_of(str(row["id"]), str(row["settings_hash"])))
        at = int(np.searchsorted(keys, key))
        if at < len(keys) and keys[at] == key and row["status"] != manifest.REPLACED:
            yield row
