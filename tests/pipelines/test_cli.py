import json
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image

from blockcache import api
from blockcache.pipelines import cli, models
from blockcache.plan import Every, Plan, Recipe, Rule, Site

HALF = Recipe((Rule(Site(), Every(2)),), name="half")
TINY = ("compare", "--prompt", "a red circle on a blue background", "--repeats", "1")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run("compare", ...)`: exit code, stdout, stderr; in an empty folder."""
    place = tmp_path / "cwd"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return run


@pytest.fixture
def plan(build_tiny, tmp_path) -> Path:
    """A valid plan for another model than the embedded one."""
    path = tmp_path / "sd3.json"
    api.plan_for(build_tiny("sd3").pipe, HALF, steps=4).save(path)
    return path


def written() -> list[Path]:
    return [path for path in Path().rglob("*") if path.is_file()]


def test_compare_writes_pictures_and_figures(run):
    code, out, err = run(*TINY, "--prompt", "a blue ring", "--steps", 4, "--out", "here")
    assert code == 0, err
    figures = json.loads(Path("here/compare.json").read_text())
    assert {path.name for path in written()} == {
        *("000-uncached.png", "000-balanced.png", "001-uncached.png", "001-balanced.png"),
        *("side-by-side.png", "all.png", "strip.png", "compare.json"),
    }
    assert figures["model"] == "tiny-image" and figures["recipe"] == "balanced"
    assert figures["steps"] == 4 and figures["seeds"] == [0, 1]
    assert figures["determinism_floor_db"] == 100
    needed = "plan baseline_s accelerated_s speedup psnr_db ssim computed_fraction cache_bytes"
    assert set(needed.split()) <= set(figures)
    assert set(figures["psnr_db"]) == set(figures["ssim"]) == {"median", "worst"}
    assert "tiny-image" in out and f"{figures['speedup']:.2f}x" in out
    assert f"{figures['psnr_db']['median']:.1f} / {figures['psnr_db']['worst']:.1f}" in out
    with Image.open("here/000-uncached.png") as image:
        assert image.size == (64, 64)
        assert image.text["prompt"] == "a red circle on a blue background"


def test_json_goes_to_stdout_alone(run):
    code, out, err = run(*TINY, "--steps", 3, "--json", "--recipe", "every", "--seed", 7)
    assert code == 0, err
    assert json.loads(out) == json.loads(Path("outputs/compare/compare.json").read_text())
    assert json.loads(out)["seeds"] == [7] and json.loads(out)["recipe"] == "every"


def test_a_plan_file_and_a_prompt_file(run):
    Path("prompts.txt").write_text("\ufeffa red ring\n\n  a green star  \n", encoding="utf-8")
    pipe = models.load(models.find("tiny-image"), torch.device("cpu"))
    api.plan_for(pipe, HALF, steps=4).save("half.json")
    code, _, err = run(
        *("compare", "--plan", "half.json", "--prompts", "prompts.txt"),
        *("--steps", 4, "--repeats", 1, "--out", "o"),
    )
    assert code == 0, err
    figures = json.loads(Path("o/compare.json").read_text())
    assert figures["computed_fraction"] == 0.5 and figures["recipe"] == "half"
    assert [item["prompt"] for item in figures["items"]] == ["a red ring", "a green star"]
    assert Plan.from_json(figures["plan"]) == Plan.load("half.json")


def test_other_files_in_the_folder_stay(run):
    Path("o").mkdir()
    Path("o/mine.txt").write_text("kept")
    Path("o/compare.json").write_text("old")
    assert run(*TINY, "--steps", 2, "--out", "o")[0] == 0
    assert Path("o/mine.txt").read_text() == "kept"
    assert json.loads(Path("o/compare.json").read_text())["steps"] == 2


def test_a_folder_as_model(run, build_tiny, tmp_path):
    build_tiny("flux", layers=1).pipe.save_pretrained(tmp_path / "mine")
    asked = ("--steps", 2, "--height", 32, "--width", 32, "--out", "o")
    code, out, err = run(*TINY, "--model", tmp_path / "mine", *asked)
    assert code == 0, err
    assert "mine (FluxPipeline), 2 steps, 1 prompt\n" in out
    code, _, err = run("compare", "--model", tmp_path / "mine", *asked)
    assert code == 2 and "no prompts" in err


BAD = {
    "unknown preset": (("--preset", "blazing"), "unknown preset 'blazing' .known: quality,"),
    "unknown recipe": (("--recipe", "nope"), "unknown recipe 'nope' .known: "),
    "unknown model": (("--model", "tiny-imaeg"), "unknown model 'tiny-imaeg'.*tiny-image"),
    "model is a file": (("--model", "{file}"), "found a file"),
    "model is an empty folder": (("--model", "{folder}"), "no model_index.json"),
    "hub without network": (("--model", "some/thing"), "cannot load 'some/thing' from the hub"),
    "zero steps": (("--steps", "0"), "--steps.*0"),
    "negative steps": (("--steps", "-4"), "--steps.*-4"),
    "steps in words": (("--steps", "many"), "--steps.*many"),
    "zero repeats": (("--repeats", "0"), "--repeats"),
    "negative seed": (("--seed", "-1"), "--seed"),
    "device": (("--device", "toaster"), "'toaster'"),
    "two kinds": (("--preset", "fast", "--plan", "{plan}"), "exclude each other"),
    "plan of another model": (("--plan", "{plan}"), "SD3Transformer2DModel"),
    "plan of another version": (("--plan", "{future}"), "plan format 2"),
    "plan is a folder": (("--plan", "{folder}"), "cannot read the plan .*director"),
    "plan is missing": (("--plan", "{folder}/none.json"), "cannot read the plan .*[Nn]o"),
    "plan of a gigabyte": (("--plan", "{huge}"), "larger than 32 MiB"),
    "plan is no json": (("--plan", "{file}"), "not readable JSON"),
    "prompt file is missing": (("--prompts", "{folder}/none.txt"), "found nothing"),
    "prompt file is a folder": (("--prompts", "{folder}"), "found a folder"),
    "prompt file is empty": (("--prompts", "{empty}"), "no prompts in"),
    "prompt file is a picture": (("--prompts", "{binary}"), "cannot read prompts from"),
    "prompt file of a gigabyte": (("--prompts", "{huge}"), "larger than 8 MiB"),
    "out is a file": (("--out", "{file}"), "is not a folder"),
    "out is under a file": (("--out", "{file}/o"), "is not a folder"),
    "unknown option": (("--sped", "2"), "--sped"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(run, case, plan, tmp_path):
    args, message = BAD[case]
    future = json.loads(plan.read_text()) | {"blockcache_plan": 2}
    (tmp_path / "future.json").write_text(json.dumps(future))
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**30)
    names = ("file", "empty", "binary", "folder", "huge")
    places = {name: tmp_path / name for name in names} | {"plan": plan}
    given = [arg.format(**places, future=tmp_path / "future.json") for arg in args]
    code, out, err = run(*TINY, *given)
    assert (code, out) == (2, ""), err
    assert err.startswith("blockcache: error: ") and err.count("\n") == 1
    assert len(err) < 500 and "Traceback" not in err
    assert re.search(message, err), err
    assert written() == [] and not Path("outputs").exists()


def test_an_unknown_command_is_bad_input(run):
    code, out, err = run("comprae")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "comprae" in err


def test_a_failure_is_one_line_and_a_traceback_on_demand(run, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory\nsecond line\nthird line")

    monkeypatch.setattr("blockcache.tuning.compare.compare", broken)
    code, out, err = run(*TINY)
    assert (code, out) == (1, "") and written() == []
    assert err == "blockcache: failed: RuntimeError: out of memory second line\n"
    for args in (("--debug", *TINY), (*TINY, "--debug")):
        code, _, err = run(*args)
        assert code == 1 and "Traceback" in err and err.endswith("second line\n")


def test_broken_pictures_are_a_failure_not_bad_input(run, monkeypatch):
    load = models.load

    def loaded(*args):
        pipe = load(*args)
        pipe.transformer.proj_out.weight.data.fill_(float("nan"))
        return pipe

    monkeypatch.setattr(models, "load", loaded)
    code, _, err = run(*TINY, "--steps", 2)
    assert code == 1 and "not numbers" in err and written() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_no_failure_of_ours(run, monkeypatch, error):
    def interrupted(*args, **kwargs):
        raise error

    monkeypatch.setattr("blockcache.tuning.compare.compare", interrupted)
    code, out, err = run(*TINY)
    assert (code, out, err.strip()) == (130, "", "blockcache: interrupted")


def test_what_there_is(run):
    for command, words in {
        "models": ("tiny-image", "ready", "WanPipeline", "refused, never guessed at"),
        "recipes": ("balanced", "geometric", "first_block", "threshold=0.08"),
        "env": ("torch", "diffusers", "threads", "cores"),
    }.items():
        code, out, err = run(command)
        assert (code, err) == (0, "") and all(word in out for word in words)


def test_env_names_what_is_installed(run):
    found = dict(line.split(None, 1) for line in run("env")[1].splitlines())
    assert found["torch"] == torch.__version__ and found["device"] in ("cpu", "cuda")


def test_plans_show_draws_the_mask(run, plan):
    code, out, err = run("plans", "show", plan)
    assert (code, err) == (0, "")
    assert "half: 4 steps of SD3Transformer2DModel" in out
    assert "█·█·" in out and "50% of the block calls computed" in out
    code, _, err = run("plans", "show", plan.with_name("none.json"))
    assert code == 2 and err.count("\n") == 1


def test_as_a_process(tmp_path, repository):
    command = [sys.executable, "-m", "blockcache", *TINY, "--steps", "2", "--preset", "fast"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "o")],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fast" in done.stdout and "tiny-image" in done.stdout
    # The hosts' remarks and progress bars are kept out; our own about so few steps is not.
    said = [line for line in done.stderr.splitlines() if "2 steps" not in line]
    assert said == [f"wrote 6 files to {tmp_path / 'o'}"]


def test_figures_and_pictures_agree(run):
    """The 8-bit files are the float pictures rounded; the figures come from the floats."""
    run(*TINY, "--steps", 3, "--out", "o")
    a, b = (
        np.asarray(Image.open(f"o/000-{x}.png")).astype(float) / 255
        for x in ("uncached", "balanced")
    )
    told = json.loads(Path("o/compare.json").read_text())["psnr_db"]["median"]
    from_files = -10 * np.log10(np.mean((a - b) ** 2))
    assert told == pytest.approx(from_files, abs=0.5)
