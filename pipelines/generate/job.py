"""What is to be rendered: every row joined with the run's settings, the model's and its plan."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockcache import api
from blockcache.errors import BlockCacheError, PlanError
from blockcache.pipelines.generate import claims, manifest
from blockcache.pipelines.generate.names import stem_for
from blockcache.pipelines.generate.prompts import BadRow, Prompts
from blockcache.pipelines.generate.settings import NO_PLAN, Config, Row
from blockcache.plan import Plan, Recipe
from blockcache.plan.spec import to_json

_SHOWN = 3


@dataclass(frozen=True)
class Chosen:
    """A plan by the name it was asked for. what: None caches nothing."""

    name: str
    what: Recipe | Plan | None
    hash: str

    @property
    def batches(self) -> bool:
        """Whether batch mates leave each other's pictures alone: nothing is decided on the way."""
        recipe = self.what.recipe if isinstance(self.what, Plan) else self.what
        return recipe is None or recipe.is_static()


@dataclass(frozen=True)
class ModelName:
    """What a model is called. hash: of a folder's contents, empty where there is no folder."""

    name: str
    hash: str = ""


@dataclass(frozen=True)
class Item:
    """One picture to be made. call: of the pipeline. hash: of everything that decides it."""

    number: int
    id: str
    stem: str
    prompt: str
    seed: int
    call: Mapping[str, Any]
    plan: Chosen
    hash: str

    @cached_property
    def form(self) -> str:
        """Items of one form fit in one batch."""
        call = {k: v for k, v in self.call.items() if k != "negative_prompt"}
        return digest([call, "negative_prompt" in self.call, self.plan.hash])


class Job:
    """The items of a run. `model_call` are the model's own default arguments."""

    def __init__(
        self, config: Config, model: ModelName, model_call: Mapping[str, Any], dtype: str
    ) -> None:
        """Read the run's own plan.

        Raises:
            BlockCacheError: no such prompts or plan.
        """
        self.config, self.prompts, self.model = config, Prompts(config.prompts), model
        self.call = {**model_call, **config.arguments, **config.call()}
        self._common = [model.name, model.hash, dtype, config.baseline, config.fps]
        self._plans: dict[str, Chosen] = {}
        self.plan = self.plan_called(config.plan)

    def plan_called(self, name: str) -> Chosen:
        """The preset, recipe or plan file of that name; each is read once.

        Raises:
            PlanError: there is none, or the file is bad.
        """
        if name not in self._plans:
            what = None if name == NO_PLAN else api.read(name)
            content = NO_PLAN if what is None else to_json(what)
            self._plans[name] = Chosen(name, what, digest(content))
        return self._plans[name]

    def items(self) -> Iterator[Item | BadRow]:
        """Every row in order."""
        for row in self.prompts.rows():
            yield row if isinstance(row, BadRow) else self._item(row)

    def _item(self, row: Row) -> Item | BadRow:
        try:
            plan = self.plan_called(row.plan) if row.plan else self.plan
        except PlanError as error:
            return BadRow(row.number, row.line, str(error))
        seed = self.config.seed + row.number if row.seed is None else row.seed
        call = {**self.call, **row.call()}
        decided_by = [*self._common, row.prompt, seed, call, plan.hash]
        stem = stem_for(row.id)
        return Item(row.number, row.id, stem, row.prompt, seed, call, plan, digest(decided_by))

    def survey(self) -> "Survey":
        """Go through all rows once."""
        keys, names = array("Q"), array("Q")
        bad: dict[int, BadRow] = {}
        for item in self.items():
            if isinstance(item, BadRow):
                bad[item.number] = item
                keys.append(0)
                names.append(item.number)
            else:
                keys.append(manifest.key_of(item.id, item.hash))
                names.append(_place(item.stem))
        places = np.asarray(names, np.uint64)
        for row in self._repeated(places):
            bad.setdefault(row.number, row)
        rows = tuple(bad[number] for number in sorted(bad))
        return Survey(np.asarray(keys, np.uint64), places, rows)

    def _repeated(self, names: NDArray[np.uint64]) -> Iterator[BadRow]:
        """Rows whose file would be that of an earlier row."""
        order = np.argsort(names, kind="stable")
        same = np.flatnonzero(names[order][1:] == names[order][:-1]) + 1
        earlier = {int(order[i]): int(order[i - 1]) for i in same}
        if not earlier:
            return
        wanted = {*earlier, *earlier.values()}
        rows = {row.number: row for row in self.prompts.rows() if row.number in wanted}
        for number, before in earlier.items():
            row = rows[number]
            if isinstance(row, Row):
                why = f"the id {row.id!r:.60} is that of line {rows[before].line} again"
                yield BadRow(number, row.line, why)


@dataclass(frozen=True)
class Standing:
    """How far a job is in a folder.

    status: a byte for each row. replaced: rows to do whose file is there with other settings.
    """

    status: bytes
    replaced: int = 0


@dataclass(frozen=True, eq=False)
class Survey:
    """All rows at a glance, and those that cannot be used.

    keys: of each row's id and settings. places: of its file's name.
    """

    keys: NDArray[np.uint64]
    places: NDArray[np.uint64]
    bad: tuple[BadRow, ...]

    @property
    def digest(self) -> str:
        """32 digits that stand for the whole job."""
        numbers = ",".join(str(row.number) for row in self.bad)
        return hashlib.sha256(self.keys.tobytes() + numbers.encode()).hexdigest()[:32]

    def standing(self, done: Iterable[dict[str, Any]]) -> Standing:
        """What `Claims` starts from. done: the rows of the manifest whose file is there."""
        keys, places = array("Q"), array("Q")
        for row in done:
            keys.append(manifest.key_of(row["id"], row["settings_hash"]))
            places.append(_place(stem_for(row["id"])))
        is_done = np.isin(self.keys, np.asarray(keys, np.uint64))
        found = np.where(is_done, ord(claims.DONE), ord(claims.TODO))
        found[[row.number for row in self.bad]] = ord(claims.BAD)
        is_there = np.isin(self.places, np.asarray(places, np.uint64))
        replaced = int(np.count_nonzero(is_there & (found == ord(claims.TODO))))
        return Standing(found.astype(np.uint8).tobytes(), replaced)

    def refuse_bad(self, prompts: Prompts) -> None:
        """Refuse the job if any row is bad.

        Raises:
            BlockCacheError: names the first lines and says what is wrong with them.
        """
        if not self.bad:
            return
        shown = "; ".join(f"line {row.line}: {row.why}" for row in self.bad[:_SHOWN])
        more = f"; and {len(self.bad) - _SHOWN} more" if len(self.bad) > _SHOWN else ""
        raise BlockCacheError(
            f"{prompts}: {shown}{more}. Nothing was generated; mend them or give --skip-bad"
        )


def _place(stem: str) -> int:
    """64 bits that stand for a file's name, on file systems that know no letter case, too."""
    return manifest.key_of(stem.casefold(), "")


def digest(value: Any) -> str:
    """16 hexadecimal digits of plain data."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
