"""Small comparisons for the tests of the demo, and a gate at which a run can be held."""

import threading
import time
from typing import Any

from blockcache.demo.desk import Job

PROMPT = "a red circle on a blue background"
STEPS = 8
ASKED = {"prompt": PROMPT, "steps": STEPS, "way": "preset", "what": "balanced"}


def finished(job: Job) -> Job:
    """Wait for a job, looking at it as a page does."""
    deadline = time.monotonic() + 300
    while not job.is_over:
        assert time.monotonic() < deadline, "the job does not end"
        job.look()
        time.sleep(0.01)
    return job


class Gate:
    """Counts the calls of the denoiser, and holds one until it is let through."""

    def __init__(self, denoiser: Any) -> None:
        self.calls = 0
        self._held_at: int | None = None
        self._reached, self._open = threading.Event(), threading.Event()
        self._hook = denoiser.register_forward_pre_hook(self._pass)

    def _pass(self, *_: object) -> None:
        self.calls += 1
        if self._held_at is not None and self.calls >= self._held_at:
            self._held_at = None
            self._reached.set()
            assert self._open.wait(120), "nobody opened the gate"

    def hold(self, after: int) -> None:
        """Hold the call that comes after so many more."""
        self._reached.clear()
        self._open.clear()
        self._held_at = self.calls + after

    def wait(self) -> None:
        """Until a call is held."""
        assert self._reached.wait(120), "no call came to the gate"

    def open(self) -> None:
        """Let it through, and all others."""
        self._held_at = None
        self._open.set()

    def remove(self) -> None:
        self.open()
        self._hook.remove()
