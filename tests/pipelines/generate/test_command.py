import re
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from PIL import Image

from blockcache.pipelines import cli, models
from blockcache.pipelines.generate.claims import Claims
from blockcache.pipelines.generate.progress import Progress
from blockcache.pipelines.generate.run import Run
from blockcache.pipelines.generate.settings import Config
from generate_toys import Toy, manifest


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run("--prompts", ...)`: code, stdout and stderr of the command, in an empty folder."""
    place = tmp_path / "cwd"
    place.mkdir()
    monkeypatch.chdir(place)
    Path("p.txt").write_text("a red ring on a blue background\na green star\n")

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["generate", *map(str, args)])
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return run


TINY = ("--prompts", "p.txt", "--steps", 4)


def test_the_command_renders_and_says_what_it_did(run):
    code, out, err = run(*TINY, "--out", "o", "--preset", "fast", "--seed", 5)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "2 of 2 items done" and "of the block calls reused" in lines[1]
    assert lines[-1] == "o: manifest.jsonl, contact-sheet.png, gallery.html"
    assert [line.split()[0] for line in err.splitlines()] == ["1/2", "2/2"]
    assert [row["seed"] for row in manifest(Path("o"))] == [5, 6]
    # Again, there is nothing to do, and the same is said.
    assert run(*TINY, "--out", "o", "--preset", "fast", "--seed", 5) == (0, out, "")


def test_run_yaml_repeats_a_run_and_the_command_line_wins(run):
    Path("p.jsonl").write_text('{"prompt": "a red ring"}\n')
    asked = ("--steps", 3, "--recipe", "every", "--argument", "max_sequence_length=12")
    assert run("--prompts", "p.jsonl", "--out", "a", *asked)[0] == 0
    saved = yaml.safe_load(Path("a/run.yaml").read_text())
    assert saved["plan"] == "every" and saved["arguments"] == {"max_sequence_length": 12}
    assert run("--config", "a/run.yaml", "--out", "b")[0] == 0
    assert run("--config", "a/run.yaml", "--out", "c", "--preset", "none", "--steps", 2)[0] == 0
    rows = [manifest(Path(name))[0] for name in "abc"]
    assert rows[0]["settings_hash"] == rows[1]["settings_hash"]
    assert rows[0]["settings"]["max_sequence_length"] == 12
    assert (rows[2]["plan"], rows[2]["settings"]["num_inference_steps"]) == ("none", 2)
    pictures = [Path(name, "items/000000.png").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(run):
    before = set(Path().rglob("*"))
    code, out, _ = run("--prompts", "p.txt", "--steps", 10, "--out", "o", "--dry-run")
    assert code == 0 and "2 rows in p.txt: 2 to do, 0 done already" in out
    assert "balanced computes 3 of 10 steps\n█" in out and "tiny-image" in out
    assert set(Path().rglob("*")) == before
    run("--prompts", "p.txt", "--steps", 10, "--out", "o")
    assert "0 to do, 2 done already" in run(*TINY, "--steps", 10, "--out", "o", "--dry-run")[1]
    gated = run(*TINY, "--recipe", "first_block", "--dry-run")[1]
    assert "first_block, decides while it runs" in gated


def test_some_failed_is_exit_code_one_and_named(run, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_: Toy(fails={"green": ValueError("no\nmore")}))
    settings = {"height": 8, "width": 8}
    monkeypatch.setattr(models, "find", lambda name: models.Model("toy", "toy", settings))
    code, out, err = run("--prompts", "p.txt", "--plan", "none", "--out", "o")
    assert code == 1
    assert "1 of 2 items done, 1 failed" in out and "failed: 000001: ValueError: no more" in out
    assert "failed: '000001': ValueError: no more" in err
    page = Path("o/gallery.html").read_text()
    assert "failed: ValueError: no more" in page and page.count("<figure") == 2


def test_only_the_last_to_leave_fails(run, monkeypatch):
    """Launchers end all processes when one fails; these may be rendering."""
    monkeypatch.setattr(models, "load", lambda *_: Toy(fails={"green": ValueError("no")}))
    monkeypatch.setattr(models, "find", lambda name: models.Model("toy", "toy", is_local=False))
    monkeypatch.setattr(Claims, "leaving", lambda _: nullcontext(False))
    code, out, err = run("--prompts", "p.txt", "--plan", "none", "--out", "o")
    assert code == 0 and "failed: '000001': ValueError: no" in err
    assert out.startswith("others are still at work; the last one makes the manifest")


BAD = {
    "no prompts": ((), "no prompts: give --prompts FILE"),
    "missing file": (("--prompts", "none.txt"), "found nothing"),
    "two plans": ((*TINY, "--preset", "fast", "--recipe", "every"), "exclude each other"),
    "unknown preset": ((*TINY, "--preset", "blazing"), "unknown preset or recipe 'blazing'"),
    "unknown model": ((*TINY, "--model", "tiny-imaeg"), "unknown model 'tiny-imaeg'"),
    "steps in words": ((*TINY, "--steps", "many"), "--steps.*many"),
    "zero steps": ((*TINY, "--steps", 0), "steps: .*found 0"),
    "argument": ((*TINY, "--argument", "x"), "takes NAME=VALUE, found 'x'"),
    "argument's value": ((*TINY, "--argument", "x=["), "x takes a YAML value, found '\\['"),
    "unknown argument": ((*TINY, "--argument", "x=1"), "FluxPipeline takes no x"),
    "config is missing": (("--config", "none.yaml"), "cannot read none.yaml"),
    "config is a list": (("--config", "list.yaml"), "must hold names and values, found list"),
    "config with a typo": (("--config", "typo.yaml"), "unknown name 'stpes' .known: .*steps"),
    "config with a list": (("--config", "many.yaml"), "steps takes one value, found .3."),
    "config is no yaml": (("--config", "broken.yaml"), "cannot read broken.yaml"),
    "out is a file": ((*TINY, "--out", "p.txt"), "is not a folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_two(run, case):
    args, message = BAD[case]
    Path("list.yaml").write_text("- a\n")
    Path("typo.yaml").write_text("stpes: 3\n")
    Path("many.yaml").write_text("prompts: p.txt\nsteps: [3]\n")
    Path("broken.yaml").write_text("a: [\n")
    code, out, err = run(*args)
    assert (code, out) == (2, ""), err
    assert err.startswith("blockcache: error: ") and err.count("\n") == 1 and len(err) < 600
    assert re.search(message, err), err
    assert not list(Path().rglob("*.png"))


def test_the_module_is_the_command(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "--prompts", "p.txt", "--dry-run"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("blockcache.pipelines.generate", run_name="__main__")
    assert caught.value.code == 0 and "2 rows in p.txt" in capsys.readouterr().out


def test_a_terminal_gets_a_bar(monkeypatch, capsys, tmp_path):
    """With the items of all, seconds per item, reuse and the time left; a log gets lines."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    run = Run(Config.of(prompts=list("abc"), model=Toy(), out=tmp_path, plan="none"))
    with Progress(run) as progress:
        for result in run.results():
            progress.show(result)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "0:00:00" in shown
    assert re.search(r"\d\.\d\d s each, reuse 0%", shown)


def test_other_ranks_are_silent(run, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    code, _, err = run(*TINY, "--out", "o")
    assert (code, err) == (0, "") and manifest(Path("o"))[0]["rank"] == 3


def test_the_pages_open_offline(run):
    assert run(*TINY, "--out", "o", "--baseline")[0] == 0
    page = Path("o/gallery.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and "<link" not in page
    for row in manifest(Path("o")):
        assert f'src="{row["file"]}"' in page and f'src="{row["baseline_file"]}"' in page
        assert f"{row['psnr_db']:.1f} dB" in page
    with Image.open("o/contact-sheet.png") as sheet:
        assert sheet.size[0] >= 500 and len(sheet.convert("RGB").getcolors(2**20)) > 50
