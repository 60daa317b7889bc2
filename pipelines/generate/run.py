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

import torch

from blockcache.errors import BlockCacheError
from blockcache.pipelines import models
from blockcache.pipelines.compare import check_folder
from blockcache.pipelines.generate import claims, files, manifest
from blockcache.pipelines.generate.claims import Claims
from blockcache.pipelines.generate.fingerprint import fingerprint
from blockcache.pipelines.generate.job import Item, Job, ModelName, Standing
from blockcache.pipelines.generate.prompts import BadRow
from blockcache.pipelines.generate.render import Renderer
from blockcache.pipelines.generate.report import Report
from blockcache.pipelines.generate.saving import Result, Saver
from blockcache.pipelines.generate.settings import Config
from blockcache.pipelines.options import dtype_name

logger = logging.getLogger("blockcache")

REPLACED = "{} files of other settings (or prompts) are there under the same ids; they are replaced"

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
        call = self._model.call if self._model else {}
        self.job = Job(config, self._model_name(), call, self._dtype)
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

    def _model_name(self) -> ModelName:
        if self._model is None:
            return _name_of(self.config.model)
        folder = Path(self._model.source).expanduser()
        return ModelName(self._model.name, fingerprint(folder) if self._model.is_local else "")

    def standing(self) -> Standing:
        """What is done and what is to be done, were the run to begin now."""
        return self.survey.standing(() if self.config.overwrite else manifest.done(self.folder))

    def results(self) -> Iterator[Result]:
        """Render what is to be done; yields what this process finishes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            book = Claims(self.folder / _STATE)
        except OSError as error:
            raise BlockCacheError(f"cannot write to {self.folder}: {error.strerror}") from None
        once = _Once()
        logger.addFilter(once)
        try:
            book.enter(self.survey.digest, self._initialise)
            yield from self._work(book)
            with book.leaving() as is_last:
                if is_last:
                    self._tidy()
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
        """Nobody else is here: tidy up, and find what is done."""
        self._tidy()
        (self.folder / _CONFIG).write_text(self.config.as_yaml(), encoding="utf-8")
        standing = self.standing()
        if standing.replaced:
            logger.warning(REPLACED.format(standing.replaced))
        return standing.status

    def _tidy(self) -> None:
        """Remove what those who were killed left half written; nobody else may be at work."""
        for partial in self.folder.glob("*/.*.partial.*"):
            partial.unlink(missing_ok=True)

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
            rendered = renderer.render(batch) if batch else []
            if saving is not None:
                yield from self._saved(saving, book)
            saving = thread.submit(saver.save, rendered) if batch else None
            if self.config.fail_fast and any(one.error for one in rendered):
                book.stop()
        if saving is not None:
            yield from self._saved(saving, book)

    def _saved(self, saving: "Future[list[Result]]", book: Claims) -> Iterator[Result]:
        results = saving.result()
        self.counts = book.count()
        yield from results

    def _batches(self, book: Claims, renderer: Renderer) -> Iterator[list[Item]]:
        """Claimed items of one form, as many as go into one call; none while there is none to take.

        Rank 0 stays until every item is settled, for others may die.
        """
        reader = _Reader(self.job, self.survey.keys)
        following: Item | None = None
        # What was taken beyond a batch is free again when this process leaves.
        while not self.should_stop() and not book.is_stopped():
            first, following = following or self._next(book, reader), None
            if first is None:
                # Whoever asked settles its own items now, so that it does not wait for these.
                yield []
                if self.worker.rank or not book.count()[claims.TODO]:
                    return
                time.sleep(_POLL_S)
                continue
            batch = [first]
            most = renderer.most if first.plan.batches else 1
            while len(batch) < most and (item := self._next(book, reader)) is not None:
                if item.form != first.form:
                    following = item
                    break
                batch.append(item)
            yield batch

    def _next(self, book: Claims, reader: "_Reader") -> Item | None:
        """The next item to do, if there is one at the moment."""
        row = book.take()
        return None if row is None else reader.item(row)


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


def _name_of(pipe: Any) -> ModelName:
    """What to call a pipeline that was handed over."""
    name = getattr(getattr(pipe, "config", None), "_name_or_path", "")
    return ModelName(str(name or type(pipe).__name__))
