"""A workshop with the embedded image model, and a gate at which its runs can be held."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tiny_pipelines
from blockcache.demo.runs import Workshop
from blockcache.demo.settings import Limits
from demo_toys import ASKED, Gate, finished


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """The embedded image model, loaded once."""
    workshop = Workshop(["tiny-image"], tmp_path_factory.mktemp("demo") / "visits")
    workshop.studio("tiny-image")
    yield workshop
    workshop.close()


@pytest.fixture
def gate(shop: Workshop) -> Iterator[Gate]:
    """A gate in front of the embedded model."""
    gate = Gate(shop.studio("tiny-image").pipe.transformer)
    yield gate
    gate.remove()


@pytest.fixture(scope="session")
def video_shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A Wan pipeline with random weights, loaded from a folder."""
    pipe, call = tiny_pipelines.BUILDERS["wan"]()
    folder = tmp_path_factory.mktemp("models") / "random-wan"
    pipe.save_pretrained(folder)
    plain = {k: v for k, v in call.items() if isinstance(v, (int, float)) and k != "generator"}
    (folder / "blockcache.json").write_text(json.dumps(plain))
    workshop = Workshop([str(folder)], folder.parent / "visits", limits=Limits(steps=10))
    workshop.studio(str(folder))
    yield workshop
    workshop.close()


@pytest.fixture
def compare(shop: Workshop) -> Callable[..., Any]:
    """`compare(visit, what="fast")`: a finished comparison with the usual settings."""

    def run(visit: Any, is_fresh: bool = False, **changes: Any) -> Any:
        job = finished(shop.compare(visit, {**ASKED, **changes}, is_fresh=is_fresh))
        assert job.state == "done", job.error
        return job.result

    return run
