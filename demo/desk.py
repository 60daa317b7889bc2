"""The queue: one job at a time, in the order they came; everybody sees their place."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from blockcache.demo.watch import Stopped
from blockcache.errors import BlockCacheError

logger = logging.getLogger("blockcache.demo")

State = Literal["waiting", "running", "done", "stopped", "failed"]

ABANDONED_S = 20.0
"""A job that nobody has looked at for so long is dropped."""
MOST_WAITING = 64


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    doing: in words. total: 0 if nobody knows. unit: what is counted. preview: a link with a small
    picture, or empty. part: which of several runs this is, in words.
    """

    doing: str = "starting"
    done: int = 0
    total: int = 0
    preview: str = ""
    part: str = ""
    unit: str = "step"


class OutOfTime(BlockCacheError):
    """A job took longer than one may."""


class Job:
    """One thing to do for one visitor. `work` gets the job and returns its result.

    minutes: after which it is ended. Read from any thread; written by the desk's.
    """

    def __init__(self, kind: str, work: Callable[["Job"], Any], minutes: float) -> None:
        """Wait for `Desk.submit`."""
        self.kind = kind
        self._work, self._minutes = work, minutes
        self.state: State = "waiting"
        self.progress = Progress()
        self.result: Any = None
        self.error = ""
        self.remarks: list[str] = []
        self._is_stopped = False
        self._turn = threading.Lock()
        self._deadline = float("inf")
        self._seen = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ("done", "stopped", "failed")

    def look(self) -> None:
        """Somebody is still interested."""
        self._seen = time.monotonic()

    def stop(self) -> None:
        """End it: at once if it still waits, else as soon as it asks."""
        with self._turn:
            self._is_stopped = True
            if self.state == "waiting":
                self.state = "stopped"

    @property
    def is_stopped(self) -> bool:
        """Whether it has been told to end, or nobody is interested any more."""
        return self._is_stopped or time.monotonic() - self._seen > ABANDONED_S

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self._deadline

    def check(self) -> None:
        """Go on, or be ended here.

        Raises:
            Stopped: it was told to end, or nobody is interested any more.
            OutOfTime: its time is over.
        """
        if self.is_stopped:
            raise Stopped
        if self.is_late:
            raise OutOfTime(
                f"stopped after {self._minutes:g} min, the limit here; ask for fewer steps or a "
                "smaller size"
            )

    def run(self) -> None:
        """Do it, unless it was stopped. Whatever happens is noted; nothing is raised."""
        with self._turn:
            if self.is_over:
                return
            self._deadline = time.monotonic() + 60 * self._minutes
            self.state = "running"
        try:
            self.check()
            self.result = self._work(self)
            self.state = "done"
        except (Stopped, KeyboardInterrupt):
            self.state = "stopped"
        except BlockCacheError as error:
            self.error, self.state = str(error), "failed"
        # The visitor has to be told, and the next one has to be served.
        except Exception as error:
            logger.exception("a run failed")
            lines = str(error).strip().splitlines() or [""]
            self.error, self.state = f"failed: {type(error).__name__}: {lines[0]}", "failed"


class Desk:
    """One worker thread and the jobs in front of it."""

    def __init__(self) -> None:
        """Start the worker."""
        self._jobs: deque[Job] = deque()
        self._current: Job | None = None
        self._changed = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._work, name="blockcache demo", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put it at the end of the queue.

        Raises:
            BlockCacheError: too many wait already.
        """
        with self._changed:
            self._send_away()
            if len(self._jobs) >= MOST_WAITING:
                raise BlockCacheError(f"{len(self._jobs)} others wait already; try again later")
            self._jobs.append(job)
            self._changed.notify()

    def _send_away(self) -> None:
        """Those who stopped or left make room."""
        for job in self._jobs:
            if job.is_stopped:
                job.stop()
        self._jobs = deque(job for job in self._jobs if not job.is_over)

    def before(self, job: Job) -> int:
        """How many are served first; 0 for the one being served."""
        with self._changed:
            waiting = [other for other in self._jobs if not other.is_stopped or other is job]
            if job not in waiting:
                return 0
            return waiting.index(job) + (self._current is not None)

    def close(self) -> None:
        """End what runs and send everybody away."""
        with self._changed:
            self._is_open = False
            for job in (*self._jobs, *([self._current] if self._current else [])):
                job.stop()
            self._changed.notify()
        self._thread.join(timeout=10)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and self._is_open:
                    self._changed.wait()
                if not self._jobs:
                    return
                self._current = self._jobs.popleft()
            self._current.run()
            with self._changed:
                self._current = None
