import multiprocessing
import os

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Not a process of some launcher."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def children(repository):
    """Makes processes that have everything imported already, so that they start at once."""
    paths = (str(repository), str(repository / "tests"), os.environ.get("PYTHONPATH", ""))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["generate_toys"])
    context.Process(target=print).start()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context
