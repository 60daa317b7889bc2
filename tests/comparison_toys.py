"""Comparisons with pictures that need no pipeline."""

import numpy as np

from blockcache.plan import Every, Fingerprint, Layout, Plan, Recipe, Rule, Site, even_steps
from blockcache.tuning.comparison import Comparison, Entry
from blockcache.tuning.quality import scores

MAP = [[1, 1, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]]
"""[steps][blocks]"""


def branch(name="0", rows=MAP):
    calls = sum(map(len, rows))
    skipped = calls - sum(map(sum, rows))
    figures = {"block_calls": calls, "block_calls_skipped": skipped}
    return {"name": name, "map": rows, **figures}


def summary(*branches):
    return {"models": [{"part": "", "branches": list(branches), "cache_bytes": 3 << 20}]}


def entry(name, pictures, references, second):
    found = tuple(scores(a, b) for a, b in zip(pictures, references, strict=True))
    return Entry(name, 4, tuple((second,) for _ in pictures), found, tuple(pictures))


def comparison(shape=(32, 32, 3), prompts=2, **changes) -> Comparison:
    random = np.random.default_rng(0)
    before = [random.random(shape, dtype=np.float32) * 0.9 for _ in range(prompts)]
    after = [x + np.float32(0.01) * (i + 1) for i, x in enumerate(before)]
    recipe = Recipe((Rule(Site(), Every(2)),), name="half")
    plan = Plan.make(recipe, Fingerprint("Foo", "0", 3), even_steps(4), Layout((3,)))
    given = {
        "model": "tiny",
        "pipeline": "FooPipeline",
        "plan": plan,
        "steps": 4,
        "prompts": tuple(f"prompt {i}" for i in range(prompts)),
        "seeds": tuple(range(prompts)),
        "settings": {},
        "baseline": entry("uncached", before, before, 1.0),
        "accelerated": entry("half", after, before, 0.4),
        "rivals": (),
        "objections": {},
        "summaries": (summary(branch()),) * prompts,
        "floor_db": 100.0,
        "peak_gib": None,
        "versions": {"torch": "2"},
        "machine": {"cpu": "a chip", "dtype": "float32", "threads": "1"},
    }
    return Comparison(**{**given, **changes})
