"""The loop: claim, render, save while the next one renders, and put it all together at the end.

A run is any number of processes that were given the same job and the same folder. They need not
know of each other: see `claims.py`.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockcache.errors import BlockCacheError
from blockcache.pipelines import models
from blockcache.pipelines.compare import check_folder
from blockcache.pipelines.generate import claims, files, manifest
from blockcache.pipelines.generate.claims import Claims
from blockcache.pipelines.generate.job import Item, Job
from blockcache.pipelines.generate.prompts import BadRow
from blockcache.pipelines.generate.render import Renderer
from blockcache.pipelines.generate.report import Report
from blockcache.pipelines.generate.saving import Result, Saver
from blockcache.pipelines.generate.settings import Config
from blockcache.pipelines.options import dtype_name

_STATE, _CONFIG = ".state", "run.yaml"
_POLL_S = 0.5


def generate(
    prompts: str | Path | Sequence[Any],
    model: Any = "tiny-image",
    out: str | Path = "outputs/generate",
    **settings: Any,
) -> Iterator[Result]:
    """Render a file of prompts into a folder; what is done there already is left alone.

    The same call in another process, on this machine or on another one that sees the folder,
    shares the work. The last process to finish makes the manifest, contact sheet and gallery.

    Args:
        prompts: A .txt, .jsonl or .csv file, or a list of prompts or of mappings with the names of
            a row (`prompt`, `id`, `seed`, `steps`, `height`, `width`, `guidance`, `frames`,
            `negative_prompt`, `plan`).
        model: An embedded model, a pipeline folder, a hub id, or a pipeline itself.
        out: The folder.
        settings: See `Config`.

    Returns:
        A `Result` for each item that this process finishes, as they are finished.

    Raises:
        BlockCacheError: bad prompts, settings or folder; nothing is rendered then.
        StorageError: while iterating: the disk is full. What is done is safe.
    """
    return Run(Config.of(prompts=prompts, model=model, out=out, **settings)).results()


@dataclass(frozen=True)
class Worker:
    """Which of the launcher's processes this is."""

    rank: int
    local_rank: int

    @classmethod
    def here(cls) -> "Worker":
        """As accelerate, torchrun or Slurm say it in the environment; the only one if none does."""
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        return cls(int(rank), int(local))


class Run:
    """This process's part in a run.

    should_stop: asked before each item. survey: all rows at a glance. report: what came of the
    whole run, once this process has left as the last one.
    """

    def __init__(self, config: Config, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Check everything that can be checked before a model is loaded.

        Raises:
            BlockCacheError: bad prompts, settings or folder.
        """
        self.config, self.folder, self.worker = config, config.out, Worker.here()
        self.should_stop = should_stop
        self.report: Report | None = None
        self.counts: dict[bytes, int] = {}
        check_folder(self.folder)
        self._model = models.find(config.model) if isinstance(config.model, str) else None
        self._device = models.device_for(self._device_name())
        self._dtype = self._dtype_name()
        name = self._model.name if self._model else _name_of(config.model)
        call = self._model.call if self._model else {}
        self.job = Job(config, name, call, self._dtype)
        self.survey = self.job.survey()
        if not config.skip_bad:
            self.survey.refuse_bad(self.job.prompts)
        if len(self.survey.keys) == len(self.survey.bad):
            raise BlockCacheError(f"no usable prompts in {self.job.prompts}")

    def _device_name(self) -> str | None:
        if self.config.device is not None or not torch.cuda.is_available():
            return self.config.device
        return f"cuda:{self.worker.local_rank % torch.cuda.device_count()}"

    def _dtype_name(self) -> str:
        if self._model is None:
            return str(self.config.model.dtype).removeprefix("torch.")
        is_embedded = self.config.model in models.EMBEDDED
        return dtype_name(self.config.dtype, self._device.type, is_embedded)

    def status(self) -> bytes:
        """What every row's byte would be, were the run to begin now."""
        nothing = np.empty(0, np.uint64)
        done = nothing if self.config.overwrite else manifest.done_keys(self.folder)
        return self.survey.status(done)

    def results(self) -> Iterator[Result]:
        """Render what is to be done; yields what this process finishes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            book = Claims(self.folder / _STATE)
        except OSError as error:
            raise BlockCacheError(f"cannot write to {self.folder}: {error.strerror}") from None
        once = _Once()
        logger = logging.getLogger("blockcache")
        logger.addFilter(once)
        try:
            book.enter(self.survey.digest, self._initialise)
            yield from self._work(book)
            with book.leaving() as is_last:
                if is_last:
                    self.report = Report.make(self.folder, self.survey, book.count())
        except files.StorageError:
            raise
        except OSError as error:
            raise files.storage_error(error, self.folder) from error
        finally:
            self.counts = book.count()
            book.close()
            logger.removeFilter(once)

    def _initialise(self) -> bytes:
        """Nobody else is here: tidy up after those who were killed, and find what is done."""
        for partial in self.folder.glob("*/.*.partial.*"):
            partial.unlink()
        (self.folder / _CONFIG).write_text(self.config.as_yaml(), encoding="utf-8")
        return self.status()

    def _work(self, book: Claims) -> Iterator[Result]:
        self.counts = book.count()
        if not self.counts[claims.TODO]:
            return
        pipe = self._load()
        files.needs_video_writer(pipe)
        renderer = Renderer(pipe, self.config.batch_size, self.config.baseline)
        renderer.check(self.job.plan, list(self.job.call))
        saver = Saver(self.folder, book, self.job.model, self.config.fps, self.worker.rank)
        try:
            with ThreadPoolExecutor(1, "save") as thread:
                yield from self._loop(book, renderer, saver, thread)
        finally:
            saver.close()

    def _load(self) -> Any:
        if self._model is None:
            return self.config.model
        return models.load(self._model, self._device, getattr(torch, self._dtype))

    def _loop(
        self, book: Claims, renderer: Renderer, saver: Saver, thread: ThreadPoolExecutor
    ) -> Iterator[Result]:
        saving: Future[list[Result]] | None = None
        for batch in self._batches(book, renderer):
            rendered = renderer.render(batch)
            if saving is not None:
                yield from self._saved(saving, book)
            saving = thread.submit(saver.save, rendered)
            if self.config.fail_fast and any(one.error for one in rendered):
                book.stop()
        if saving is not None:
            yield from self._saved(saving, book)

    def _saved(self, saving: "Future[list[Result]]", book: Claims) -> Iterator[Result]:
        results = saving.result()
        self.counts = book.count()
        yield from results

    def _batches(self, book: Claims, renderer: Renderer) -> Iterator[list[Item]]:
        """Claimed items of one form, as many as go into one call."""
        reader = _Reader(self.job, self.survey.keys)
        first = self._next(book, reader, may_wait=True)
        while first is not None:
            batch, following = [first], None
            most = renderer.most if first.plan.batches else 1
            while len(batch) < most and following is None:
                item = self._next(book, reader, may_wait=False)
                if item is None:
                    break
                if item.form == first.form:
                    batch.append(item)
                else:
                    following = item
            yield batch
            first = following or self._next(book, reader, may_wait=True)

    def _next(self, book: Claims, reader: "_Reader", may_wait: bool) -> Item | None:
        """The next item to do. Rank 0 stays until every item is settled, for others may die."""
        while not self.should_stop():
            row = book.take()
            if row is not None:
                return reader.item(row)
            is_over = book.is_stopped() or not book.count()[claims.TODO]
            if not may_wait or self.worker.rank or is_over:
                return None
            time.sleep(_POLL_S)
        return None


class _Reader:
    """Items by number; going on is cheap, going back reads the prompts from the start."""

    def __init__(self, job: Job, keys: Any) -> None:
        self._job, self._keys, self._at = job, keys, 0
        self._items = job.items()

    def item(self, number: int) -> Item:
        if number < self._at:
            self._items, self._at = self._job.items(), 0
        # What lies between was taken by others.
        item = next(islice(self._items, number - self._at, None))
        self._at = number + 1
        if isinstance(item, BadRow) or manifest.key_of(item.id, item.hash) != self._keys[number]:
            raise BlockCacheError(f"{self._job.prompts} has changed since the run began; run again")
        return item


class _Once(logging.Filter):
    """Lets every message through once: each item enables the cache anew, and would say it again."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._said
        self._said.add(message)
        return is_new


def _name_of(pipe: Any) -> str:
    """What to call a pipeline that was handed over."""
    name = getattr(getattr(pipe, "config", None), "_name_or_path", "")
    return str(name or type(pipe).__name__)
