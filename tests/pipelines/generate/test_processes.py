"""Several processes, and processes that are killed: nothing is lost, nothing is done twice."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from blockcache.errors import BlockCacheError
from blockcache.pipelines.generate import claims, files, generate
from generate_toys import Toy, command_in_child, flux, in_child, manifest, pictures

ITEMS = 40
PATIENCE_S = 120


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a fox in {i} colours" for i in range(ITEMS)))
    return path


def finished(out: Path) -> int:
    """Items that are done by all manifests so far; a line can also say that a file is replaced."""
    files = [*out.glob("parts/*.jsonl"), *out.glob("manifest.jsonl")]
    lines = [line for path in files for line in path.read_bytes().splitlines(keepends=True)]
    return sum(b'"status": "done"' in line and line.endswith(b"\n") for line in lines)


def wait_until(condition, process) -> None:
    """Until it holds or the process is over."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def has_claimed(out: Path) -> bool:
    """Whether a row was handed out: the cursor moves on after the claim."""
    path, layout = out / ".state", claims._HEADER
    header = path.read_bytes()[: layout.size] if path.exists() else b""
    return len(header) == layout.size and layout.unpack(header)[1] > 0


def check(out: Path, calm: Path) -> None:
    """The set is complete, equals an undisturbed run's byte for byte, and is written down once."""
    assert pictures(out) == pictures(calm)
    rows = manifest(out)
    assert [row["row"] for row in rows] == list(range(ITEMS))
    assert len({row["id"] for row in rows}) == ITEMS and {r["status"] for r in rows} == {"done"}
    left = {path.name for path in out.rglob("*") if "partial" in path.name or path.name == "parts"}
    assert left == set()


def test_twenty_kills_leave_what_an_undisturbed_run_leaves(children, prompts, tmp_path):
    pipe, usual = flux()
    calm, out = tmp_path / "calm", tmp_path / "out"
    undisturbed = list(generate(prompts, pipe, calm, **usual))
    assert len(undisturbed) == ITEMS
    each_s = statistics.median(one.seconds for one in undisturbed)
    chance = random.Random(0)
    for _ in range(20):
        process = children.Process(target=in_child, args=(0, "flux", str(prompts), str(out), {}))
        process.start()
        wanted = finished(out) + chance.choice([0, 0, 1, 1])
        started = len(list(out.glob("parts/*")))
        wait_until(lambda n=started: len(list(out.glob("parts/*"))) > n, process)
        wait_until(lambda n=wanted: finished(out) >= n, process)
        # Anywhere in an item, but not so late that a fast machine is through before the last kill.
        time.sleep(chance.uniform(0, each_s))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    before = finished(out)
    assert 10 < before < ITEMS
    again = list(generate(prompts, pipe, out, **usual))
    # What is written down as done is never made again.
    assert len(again) == ITEMS - before
    check(out, calm)


def test_two_processes_share_the_work(children, prompts, tmp_path):
    calm, out = tmp_path / "calm", tmp_path / "out"
    list(generate(prompts, Toy(), calm, plan="none"))
    both = [
        children.Process(target=in_child, args=(r, "toy", str(prompts), str(out), {"pace_s": 0.05}))
        for r in (0, 1)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in both] == [0, 0]
    check(out, calm)
    shares = [row["rank"] for row in manifest(out)]
    # How many each gets hangs on when it starts.
    assert set(shares) == {0, 1}
    assert (out / "gallery.html").is_file()


def test_a_dead_rank_s_items_are_picked_up_by_the_others(children, prompts, tmp_path):
    calm, out = tmp_path / "calm", tmp_path / "out"
    list(generate(prompts, Toy(), calm, plan="none"))
    slow = {"pace_s": 60.0}
    stuck = children.Process(target=in_child, args=(1, "toy", str(prompts), str(out), slow))
    stuck.start()
    wait_until(lambda: has_claimed(out), stuck)
    quick = children.Process(target=in_child, args=(0, "toy", str(prompts), str(out), {}))
    quick.start()
    wait_until(lambda: finished(out) == ITEMS - 1, quick)
    time.sleep(0.3)
    # Rank 0 has done all but the one that rank 1 sits on, and stays until that is settled.
    assert quick.is_alive() and finished(out) == ITEMS - 1
    stuck.kill()
    quick.join(PATIENCE_S)
    assert quick.exitcode == 0
    check(out, calm)


def saving_in_child(*arguments) -> None:
    """As `in_child`, but what it saves never gets whole."""
    files._force_to_disk = lambda path: time.sleep(PATIENCE_S)
    in_child(*arguments)


def test_what_a_dead_rank_was_saving_is_removed_by_the_others(children, prompts, tmp_path):
    calm, out = tmp_path / "calm", tmp_path / "out"
    list(generate(prompts, Toy(), calm, plan="none"))
    arguments = (1, "toy", str(prompts), str(out), {})
    stuck = children.Process(target=saving_in_child, args=arguments)
    stuck.start()
    half = f"items/.{stuck.pid}.partial.*"
    wait_until(lambda: any(out.glob(half)), stuck)
    other = children.Process(target=in_child, args=(0, "toy", str(prompts), str(out), {}))
    other.start()
    # Then it is inside, and nobody begins anew.
    wait_until(lambda: finished(out) > 0, other)
    assert any(out.glob(half)) and other.is_alive()
    stuck.kill()
    other.join(PATIENCE_S)
    assert other.exitcode == 0
    check(out, calm)


def test_another_job_in_a_folder_at_work_is_refused(children, prompts, tmp_path):
    out = tmp_path / "out"
    slow = {"pace_s": 60.0}
    process = children.Process(target=in_child, args=(0, "toy", str(prompts), str(out), slow))
    process.start()
    wait_until(lambda: has_claimed(out), process)
    with pytest.raises(BlockCacheError, match="another run with other prompts or settings"):
        list(generate(prompts, Toy(), out, plan="none", steps=7))
    process.kill()
    process.join()
    assert len(list(generate(prompts, Toy(), out, plan="none", steps=7))) == ITEMS


@pytest.fixture
def start(children, tmp_path):
    """`start(steps)`: the command at work on the second item, where it writes, and what it says.

    steps: the second item's; the first one has few.
    """

    def start(steps):
        prompts, out, said = (tmp_path / name for name in ("prompts.jsonl", "out", "said"))
        rows = [{"prompt": "a", "steps": 2}, {"prompt": "b", "steps": steps}, {"prompt": "c"}]
        prompts.write_text("\n".join(map(json.dumps, rows)))
        words = ["generate", "--prompts", prompts, "--out", out, "--plan", "none"]
        arguments = [*map(str, words), "--device", "cpu"]
        process = children.Process(target=command_in_child, args=(arguments, str(said)))
        process.start()
        # The first one is saved while the second one is rendered.
        wait_until(lambda: finished(out) >= 1, process)
        return process, out, said

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_item_finish(start, number):
    process, out, said = start(steps=110)
    # Launchers pass on what the terminal has sent already: an echo is no second Ctrl-C.
    os.kill(process.pid, number)
    os.kill(process.pid, number)
    process.join(PATIENCE_S)
    assert process.exitcode == 130
    text = said.read_text()
    assert text.count("finishing the current item; Ctrl-C again stops at once") == 1
    assert "2 of 3 items done, 1 to do (give the same command again)" in text
    assert [row["status"] for row in manifest(out)] == ["done", "done"]
    Image.open(out / "items/000001.png").verify()


def test_the_second_ctrl_c_stops_at_once(start):
    # So many steps that it is not through before the second one, however fast the machine.
    process, out, said = start(steps=5000)
    os.kill(process.pid, signal.SIGINT)
    # Within a second of this it would be an echo.
    wait_until(lambda: "finishing the current item" in said.read_text(), process)
    time.sleep(1.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE_S)
    assert process.exitcode == 130 and said.read_text().endswith("blockcache: interrupted\n")
    assert list(pictures(out)) == ["000000.png"] and finished(out) == 1


# ---- the real thing, in real processes ----------------------------------------------------------


def command(prompts: Path, out: Path, *more: str) -> list[str]:
    """The command line on the embedded model."""
    start = [sys.executable, "-m", "blockcache", "generate", "--prompts", str(prompts)]
    return [*start, "--steps", "20", "--out", str(out), *more]


@pytest.mark.slow
def test_kills_of_the_real_command_on_the_embedded_model(prompts, tmp_path, repository):
    """Fewer than twenty, as above: each start takes seconds."""
    calm, out = tmp_path / "calm", tmp_path / "out"
    subprocess.run(command(prompts, calm), cwd=repository, check=True, capture_output=True)
    chance = random.Random(1)
    said = tmp_path / "said"
    for _ in range(8):
        with said.open("wb") as file:
            process = subprocess.Popen(command(prompts, out), cwd=repository, stderr=file)
        wanted = finished(out) + chance.choice([0, 1, 2])
        while finished(out) < wanted and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, said.read_text()
    subprocess.run(command(prompts, out), cwd=repository, check=True, capture_output=True)
    check(out, calm)


LAUNCHERS = {
    "accelerate": (
        *("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0"),
    ),
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_processes_that_share_the_work(launcher, prompts, tmp_path, repository):
    """As the documentation says it; no process group is made, so no port but the launcher's."""
    calm, out = tmp_path / "calm", tmp_path / "out"
    subprocess.run(command(prompts, calm), cwd=repository, check=True, capture_output=True)
    words = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "blockcache.pipelines.generate"]
    words += command(prompts, out)[4:]
    done = subprocess.run(words, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{ITEMS} of {ITEMS} items done"
    check(out, calm)
    assert {row["rank"] for row in manifest(out)} == {0, 1}
