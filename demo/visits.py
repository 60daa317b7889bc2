"""What one visitor has made here. Nobody else can name it: all of it lies under a secret."""

import contextlib
import csv
import io
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blockcache.demo.desk import Job
from blockcache.demo.media import Shot
from blockcache.demo.settings import Settings
from blockcache.demo.shelf import Tuned
from blockcache.demo.story import Story
from blockcache.errors import BlockCacheError
from blockcache.plan import Plan
from blockcache.tuning.quality import Scores

_MOST_VISITS = 500
_MOST_PAIRS = 60
_MOST_PLANS = 30
_IDLE_S = 2 * 3600.0
# A spreadsheet takes a cell that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, eq=False)
class Pair:
    """One prompt without and with the cache.

    name: of what was enabled. baseline_s, seconds: whole calls. density: kept share of the
    attention, None if dense. parts: share of the sub-layer calls reused, None without such rules.
    peak_gib: GPU memory of (uncached, accelerated), None without a GPU. shot, plan_file: what lies
    in the folder `id` of the visit's. is_fresh: whether the uncached side was rendered for it.
    """

    id: str
    settings: Settings
    name: str
    steps: int
    baseline_s: float
    seconds: float
    scores: Scores
    computed: float
    density: float | None
    parts: float | None
    cache_bytes: int
    peak_gib: tuple[float, float] | None
    plan: Plan
    story: Story
    shot: Shot
    plan_file: str
    is_fresh: bool

    @property
    def speedup(self) -> float:
        """Times as fast as without the cache."""
        return self.baseline_s / self.seconds


@dataclass(eq=False)
class Visit:
    """One visitor: a folder, the pairs made, the plans at hand, and the job under way."""

    token: str
    folder: Path
    pairs: list[Pair] = field(default_factory=list)
    plans: list[Tuned] = field(default_factory=list)
    current: Pair | None = None
    job: Job | None = None
    last_tuned: Tuned | None = None
    tuned_file: str = ""
    seen: float = field(default_factory=time.monotonic)

    @property
    def is_busy(self) -> bool:
        """Whether a job of theirs waits or runs."""
        return self.job is not None and not self.job.is_over

    def keep(self, pair: Pair) -> None:
        """Remember it and show it; the oldest goes when there are too many."""
        self.pairs.append(pair)
        self.current = pair
        for old in self.pairs[:-_MOST_PAIRS]:
            shutil.rmtree(self.folder / old.id, ignore_errors=True)
        self.pairs = self.pairs[-_MOST_PAIRS:]

    def keep_plan(self, tuned: Tuned) -> Tuned:
        """Remember a plan under a name of its own."""
        taken = {other.name for other in self.plans if other.plan != tuned.plan}
        name, count = tuned.name, 2
        while name in taken:
            name, count = f"{tuned.name} ({count})", count + 1
        kept = Tuned(name, tuned.plan)
        self.plans = [*(p for p in self.plans if p.name != name), kept][-_MOST_PLANS:]
        return kept

    def pair(self, number: str) -> Pair:
        """The pair of that id.

        Raises:
            BlockCacheError: this visitor has none.
        """
        for pair in self.pairs:
            if pair.id == number:
                return pair
        raise BlockCacheError("that pair is not here any more; make it again")

    def write_csv(self) -> str:
        """Write all runs as a table; returns the file's name."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(_COLUMNS)
        writer.writerows([_cell(value) for value in _row(pair)] for pair in self.pairs)
        name = "blockcache-runs.csv"
        # With a byte order mark, or spreadsheets read it as Latin-1.
        (self.folder / name).write_text("\ufeff" + text.getvalue(), encoding="utf-8", newline="")
        return name


_COLUMNS = (
    *("plan", "settings", "model", "prompt", "seed", "steps", "uncached_s", "seconds", "speedup"),
    *("psnr_db", "ssim", "computed_share", "density", "cache_mib"),
)


def _row(pair: Pair) -> tuple[object, ...]:
    asked, density = pair.settings, pair.density
    return (
        *(pair.name, asked.knobs, asked.model, asked.prompt, asked.seed, pair.steps),
        *(f"{pair.baseline_s:.4f}", f"{pair.seconds:.4f}", f"{pair.speedup:.3f}"),
        *(f"{pair.scores.psnr_db:.3f}", f"{pair.scores.ssim:.5f}", f"{pair.computed:.4f}"),
        *("" if density is None else f"{density:.4f}", f"{pair.cache_bytes / 2**20:.3f}"),
    )


def _cell(value: object) -> str:
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def slug(name: str) -> str:
    """What of a name may stand in a file name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "plan"


class Visits:
    """Everybody's. A visit is known by its token alone."""

    def __init__(self, folder: Path) -> None:
        """Make the folder under which each gets their own."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._visits: dict[str, Visit] = {}
        self._lock = threading.Lock()

    def open(self, token: object = None) -> Visit:
        """The visit of that token, or a new one."""
        with self._lock:
            visit = self._visits.get(token) if isinstance(token, str) else None
            if visit is None:
                visit = self._new()
            visit.seen = time.monotonic()
            return visit

    def _new(self) -> Visit:
        for idle in self._idle():
            self._forget(idle)
        token = secrets.token_hex(16)
        # The folder has a name of its own: links to pictures do not give the visit away.
        folder = self._folder / secrets.token_hex(16)
        folder.mkdir(mode=0o700)
        self._visits[token] = Visit(token, folder)
        return self._visits[token]

    def _idle(self) -> Iterator[Visit]:
        now = time.monotonic()
        waiting = sorted(self._visits.values(), key=lambda visit: visit.seen)
        surplus = len(waiting) + 1 - _MOST_VISITS
        for number, visit in enumerate(waiting):
            if not visit.is_busy and (number < surplus or now - visit.seen > _IDLE_S):
                yield visit

    def _forget(self, visit: Visit) -> None:
        del self._visits[visit.token]
        shutil.rmtree(visit.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything that was written."""
        with self._lock:
            for visit in list(self._visits.values()):
                self._forget(visit)
            # Somebody else's files may lie there, too.
            with contextlib.suppress(OSError):
                self._folder.rmdir()
