import json
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import blockcache
from blockcache.errors import BlockCacheError
from blockcache.pipelines import models
from blockcache.pipelines.generate import claims, files, generate
from blockcache.pipelines.generate import manifest as manifest_module
from blockcache.pipelines.generate import run as run_module
from blockcache.pipelines.generate.render import DeviceError
from blockcache.pipelines.generate.settings import Config
from generate_toys import Toy, flux, manifest, pictures

OOM = torch.OutOfMemoryError("out of memory")


@pytest.fixture
def toy(tmp_path):
    """`toy(rows, pipe, **settings)`: results of a run without a cache, in `tmp_path/out`."""

    def run(rows, pipe=None, **settings):
        usual = {"plan": "none", "out": tmp_path / "out"}
        return list(generate(rows, pipe or Toy(), **{**usual, **settings}))

    run.out = tmp_path / "out"
    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A tiny Flux and eight items that it rendered one by one."""
    pipe, usual = flux()
    out = tmp_path_factory.mktemp("alone")
    rows = [{"prompt": f"a {word} fox", "id": word} for word in "abcdefgh"]
    return pipe, usual, rows, list(generate(rows, pipe, out, **usual))


# ---- what is made -------------------------------------------------------------------------------


def test_everything_is_written_and_said(alone):
    results = alone[3]
    folder = results[0].file.parents[1]
    assert {path.name for path in folder.iterdir()} == {
        *("items", "manifest.jsonl", "gallery.html", "contact-sheet.png", "run.yaml", ".state")
    }
    row = manifest(folder)[3]
    assert row == results[3].row
    expected = {"id": "d", "row": 3, "prompt": "a d fox", "seed": 3, "status": "done"}
    assert row | expected == row and row["file"] == "items/d.png" and row["error"] == ""
    assert row["counts"]["computed"] + row["counts"]["reused"] == row["counts"]["steps"] == 5
    assert 0 < row["reuse"] == row["counts"]["block_calls_skipped"] / row["counts"]["block_calls"]
    assert row["plan"] == "balanced" and len(row["plan_hash"]) == len(row["settings_hash"]) == 16
    assert row["seconds"] > 0 and row["peak_gib"] > 0.01
    assert row["settings"]["num_inference_steps"] == 5 and row["versions"]["torch"]


def test_a_picture_tells_what_it_was_made_from(alone):
    result = alone[3][3]
    with Image.open(result.file) as image:
        assert image.size == (16, 16)
        assert (image.text["prompt"], image.text["seed"]) == ("a d fox", "3")
        inside = json.loads(image.text["blockcache"])
    assert inside.items() <= result.row.items()
    assert {"prompt", "seed", "plan", "plan_hash", "versions", "settings"} <= inside.keys()


def test_items_are_what_the_pipeline_makes(alone):
    pipe, usual, _, results = alone
    call = {"num_inference_steps": 5, "height": 16, "width": 16, **usual["arguments"]}
    with blockcache.enabled(pipe, "balanced"):
        generator = torch.Generator().manual_seed(3)
        image = pipe("a d fox", generator=generator, output_type="pil", **call).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(results[3].file)))


def test_row_seven_is_the_same_alone_in_a_batch_and_on_another_rank(alone, tmp_path, monkeypatch):
    pipe, usual, rows, results = alone
    one = [{**rows[7], "seed": 7}]
    (by_itself,) = generate(one, pipe, tmp_path / "one", **usual)
    assert by_itself.file.read_bytes() != b"" and pictures(tmp_path / "one").keys() == {"h.png"}
    # Its row number is another one, and stands in the file; the pixels are the same.
    assert np.array_equal(*(np.asarray(Image.open(r.file)) for r in (by_itself, results[7])))
    batched = list(generate(rows, pipe, tmp_path / "batch", batch_size=3, **usual))
    assert [r.row["batch"] for r in batched] == [3, 3, 3, 3, 3, 3, 2, 2]
    for ours, theirs in zip(batched, results, strict=True):
        a, b = (np.asarray(Image.open(r.file), dtype=int) for r in (ours, theirs))
        assert np.abs(a - b).max() <= 1
    monkeypatch.setenv("RANK", "5")
    other = list(generate(rows, pipe, tmp_path / "rank", **usual))
    assert pictures(tmp_path / "rank") == pictures(results[0].file.parents[1])
    assert {r.row["rank"] for r in other} == {5}


def test_settings_of_a_row_win_and_batches_hold_one_form_only(toy):
    pipe = Toy()
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "negative_prompt": "no"},
        {"prompt": "c", "negative_prompt": "nay"},
        {"prompt": "d", "width": 12},
        {"prompt": "e", "width": 12, "steps": 9, "seed": 40},
        {"prompt": "f", "width": 12, "steps": 9},
    ]
    results = toy(rows, pipe, batch_size=4, height=10, seed=100)
    assert pipe.calls == [["a"], ["b", "c"], ["d"], ["e", "f"]]
    assert [r.row["seed"] for r in results] == [100, 101, 102, 103, 40, 105]
    assert results[4].row["settings"] == {"height": 10, "width": 12, "num_inference_steps": 9}
    assert Image.open(results[4].file).size == (12, 10)


def test_gated_plans_are_rendered_one_by_one(alone, tmp_path):
    """Batch mates would decide for each other, and a picture would depend on them."""
    pipe, usual, rows, _ = alone
    found = generate(rows[:3], pipe, tmp_path, batch_size=3, **usual | {"plan": "first_block"})
    assert [r.row["batch"] for r in found] == [1, 1, 1]


def test_a_row_may_have_its_own_plan(alone, tmp_path):
    pipe, usual, rows, _ = alone
    plans = ["none", "fast", "every", "balanced"]
    given = [{**row, "plan": plan} for row, plan in zip(rows, plans, strict=False)]
    results = list(generate(given, pipe, tmp_path, **usual))
    assert [r.row["plan"] for r in results] == plans
    assert results[0].row["reuse"] == 0 < results[2].row["reuse"]
    assert len({r.row["plan_hash"] for r in results}) == 4


def test_the_baseline_is_measured_and_the_worst_item_named(alone, tmp_path):
    pipe, usual, rows, _ = alone
    run = run_module.Run(Config.of(prompts=rows, model=pipe, out=tmp_path, baseline=True, **usual))
    results = list(run.results())
    worst = min(results, key=lambda r: r.row["psnr_db"])
    pair = [
        np.asarray(Image.open(worst.file.parents[1] / p / worst.file.name))
        for p in ("items", "uncached")
    ]
    error = np.mean((pair[0] / 255 - pair[1] / 255) ** 2)
    # The files are rounded to 8 bits, the figure is not.
    assert -10 * np.log10(error) == pytest.approx(worst.row["psnr_db"], abs=1.5)
    assert f"worst {worst.row['psnr_db']:.1f} (item {worst.id})" in str(run.report)
    assert "x as fast" in str(run.report) and "SSIM: mean" in str(run.report)
    page = (tmp_path / "gallery.html").read_text()
    assert page.count("<figure") == 8 and f'src="uncached/{worst.file.name}"' in page


def test_videos_are_written_with_what_they_were_made_from(build_tiny, tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    wan = build_tiny("wan", layers=2)
    settings = {k: wan.kwargs[k] for k in ("height", "width")} | {"frames": 9, "steps": 3}
    rows = [{"prompt": 'a "fox"\n= 🙂', "negative_prompt": "bad"}]
    for out in "ab":
        (result,) = generate(
            rows, wan.pipe, tmp_path / out, fps=8, plan="none",
            arguments={"max_sequence_length": 32}, **settings,
        )  # fmt: skip
    assert result.file.name == "000000.mp4"
    reader = imageio_ffmpeg.read_frames(str(result.file))
    about = next(reader)
    assert about["fps"] == 8 and about["size"] == (32, 32) and len(list(reader)) == 9
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    assert comment_of(result.file)["prompt"] == rows[0]["prompt"]
    assert Image.open(tmp_path / "a" / "contact-sheet.png").size[0] > 400


@pytest.fixture
def film():
    """A pipeline whose pictures are five frames of noise."""

    class Film(Toy):
        def __call__(self, prompt, num_frames=5, **rest):
            return (np.stack([super().__call__(prompt, **rest)[0]] * num_frames, axis=1),)

    return Film()


def comment_of(path: Path) -> dict:
    """What an mp4 says about itself, as ffmpeg reads it."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    (line,) = (line for line in text.splitlines() if line.startswith("comment="))
    return json.loads(re.sub(r"\\(.)", r"\1", line.removeprefix("comment=")))


def test_a_video_tells_what_it_was_made_from_however_long(toy, film):
    """64 KiB of emoji, thrice that as JSON, are more than fits on a command line."""
    rows = [{"prompt": "🙂" * 16_000, "negative_prompt": 'a=b;c#d\\ "e"\n' * 900, "seed": 5}]
    (result,) = toy(rows, film)
    assert result.error == "" and result.file.name == "000000.mp4"
    inside = comment_of(result.file)
    assert inside.items() <= result.row.items()
    assert inside["prompt"] == rows[0]["prompt"] and (inside["seed"], inside["plan"]) == (5, "none")
    assert inside["settings"]["negative_prompt"] == rows[0]["negative_prompt"]
    assert [path.name for path in result.file.parent.iterdir()] == ["000000.mp4"]


def test_a_video_that_ffmpeg_could_not_write_is_not_done(toy, film, monkeypatch, tmp_path):
    """It leaves half a file behind, and says so by its exit code only."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    with monkeypatch.context() as patch:
        patch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "false")
        (result,) = toy(["a"], film)
    assert result.status == "failed" and "ffmpeg ended with 1" in result.error
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(files.StorageError, match="the disk is full"):
            toy(["a"], film)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out/items").iterdir()) == []
    assert [r.status for r in toy(["a"], film)] == ["done"]


def test_hostile_ids_and_prompts_stay_inside(toy, tmp_path):
    names = ["../up", "/etc/x", "nul\0", "CON", "x" * 300, "<script>alert(1)</script>", "a\nb"]
    rows = [{"id": name, "prompt": f"{name} 🙂 <b>" + "y" * 10_000} for name in names]
    results = toy(rows)
    assert [r.status for r in results] == ["done"] * len(names)
    everything = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert all(path.is_relative_to(tmp_path / "out") for path in everything)
    assert len(pictures(tmp_path / "out")) == len(names)
    assert [row["id"] for row in manifest(tmp_path / "out")] == names
    page = (tmp_path / "out" / "gallery.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "http" not in page
    assert (tmp_path / "out" / "gallery.html").stat().st_size < 100_000


# ---- what is refused ----------------------------------------------------------------------------


def test_a_broken_line_is_named_and_nothing_is_generated(tmp_path, toy):
    lines = [json.dumps({"prompt": f"p{i}"}) for i in range(80)]
    lines[56] = '{"prompt": "p56"'
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(BlockCacheError, match="p.jsonl: line 57: no valid JSON.*--skip-bad"):
        toy(path)
    assert not (tmp_path / "out").exists()
    results = toy(path, skip_bad=True)
    assert len(results) == 79 and results[56].row["prompt"] == "p57"
    # Mending the line moves no other: only what was missing is made.
    lines[56] += "}"
    path.write_text("\n".join(lines))
    assert [r.row["prompt"] for r in toy(path)] == ["p56"]
    assert [row["row"] for row in manifest(tmp_path / "out")] == list(range(80))


@pytest.mark.parametrize("second", ["cat", "CAT"])
def test_a_repeated_id_is_refused_even_where_only_the_case_differs(toy, tmp_path, second):
    rows = [{"id": "cat", "prompt": "a"}, {"prompt": "b"}, {"id": second, "prompt": "c"}]
    with pytest.raises(BlockCacheError, match=f"line 3: the id '{second}' is that of line 1 again"):
        toy(rows)
    assert [r.id for r in toy(rows, skip_bad=True)] == ["cat", "000001"]
    assert Image.open(tmp_path / "out/items/cat.png").text["prompt"] == "a"


BAD = {
    "unknown plan": ({"plan": "blazing"}, "unknown preset or recipe 'blazing'"),
    "missing plan": ({"plan": "no/plan.json"}, "cannot read the plan"),
    "unknown setting": ({"sed": 3}, "unknown name 'sed'"),
    "batch of none": ({"batch_size": 0}, "batch_size: "),
    "argument": ({"arguments": {"true_cfg": 3}}, "Toy takes no true_cfg"),
    "frames of an image": ({"frames": 9}, "Toy takes no num_frames"),
    "device": ({"device": "toaster"}, "'toaster'"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_settings_are_refused(toy, case):
    settings, message = BAD[case]
    with pytest.raises(BlockCacheError, match=message):
        toy(["a"], **settings)


def test_bad_rows_of_all_kinds_are_refused(toy):
    for row, message in {
        "": "line 2: prompt",
        3: "line 2: expected an object, found int",
        ("a",): "line 2: expected an object",
    }.items():
        with pytest.raises(BlockCacheError, match=message):
            toy(["fine", row])
    with pytest.raises(BlockCacheError, match="line 1: unknown preset"):
        toy([{"prompt": "a", "plan": "blazing"}])
    with pytest.raises(BlockCacheError, match="no usable prompts"):
        toy([])


def test_a_plan_for_another_model_is_refused_before_anything_is_rendered(
    alone, tmp_path, build_tiny
):
    blockcache.plan_for(build_tiny("sd3").pipe, "fast", steps=4).save(tmp_path / "sd3.json")
    pipe, usual, rows, _ = alone
    with pytest.raises(BlockCacheError, match="made for SD3Transformer2DModel"):
        list(generate(rows, pipe, tmp_path / "o", **usual | {"plan": str(tmp_path / "sd3.json")}))
    assert not (tmp_path / "o" / "items").exists()


# ---- again and again ----------------------------------------------------------------------------


def test_what_is_done_is_left_alone_until_its_settings_change(toy, tmp_path):
    rows = [{"id": name, "prompt": name} for name in "abcd"]
    toy(rows)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/items").iterdir()}
    pipe = Toy()
    assert toy(rows, pipe) == [] and pipe.calls == []
    rows[2]["seed"] = 77
    rows.append({"id": "e", "prompt": "e"})
    assert [r.id for r in toy(rows)] == ["c", "e"]
    (tmp_path / "out/items/a.png").unlink()
    assert [r.id for r in toy(rows)] == ["a"]
    assert [r.id for r in toy(rows, steps=9)] == list("abcde")
    assert [r.id for r in toy(rows, steps=9, overwrite=True)] == list("abcde")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/items").iterdir()}
    assert len(before) == 4 and all(after[path] > before[path] for path in before)
    assert [row["id"] for row in manifest(tmp_path / "out")] == list("abcde")


def test_files_of_another_job_are_replaced_aloud(toy, tmp_path, caplog):
    """Both number their rows from 0. Going back to the first job, its pictures are made again."""
    toy(["a", "b", "c"])
    first = pictures(tmp_path / "out")
    assert caplog.messages == []
    # The second one is killed when it has replaced one picture: its line is in a part.
    results = generate(["x", "y"], Toy(), tmp_path / "out", plan="none")
    next(results)
    results.close()
    assert caplog.messages == [run_module.REPLACED.format(2)]
    assert pictures(tmp_path / "out") != first
    assert [r.row["prompt"] for r in toy(["a", "b", "c"])] == ["a"]
    assert pictures(tmp_path / "out") == first


def test_an_old_line_does_not_speak_for_a_new_file(toy, tmp_path, monkeypatch):
    """Killed between the rename and the line, the file is neither the old nor the new one's."""
    toy(["a"])
    append = manifest_module.Part.append

    def fail_when_done(part, row):
        if row["status"] == "done":
            raise OSError(5, "stands for a kill")
        append(part, row)

    monkeypatch.setattr(manifest_module.Part, "append", fail_when_done)
    with pytest.raises(files.StorageError):
        toy(["b"])
    monkeypatch.undo()
    assert [r.row["prompt"] for r in toy(["a"])] == ["a"]


def test_another_model_of_the_same_name_generates_anew(tmp_path):
    """Checkpoints of one training are often folders of one name."""
    given = {"prompts": ["a"], "out": tmp_path / "out"}
    for name in ("1", "2"):
        shutil.copytree(models.find("tiny-image").source, tmp_path / name / "checkpoint")
    (weights,) = (tmp_path / "2" / "checkpoint" / "transformer").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) // 2)
    weights.write_bytes(content)
    (tmp_path / "2" / "checkpoint" / "README.md").write_text("what is no part of the model")
    jobs = [
        run_module.Run(Config.of(model=str(tmp_path / name / "checkpoint"), **given)).job
        for name in ("1", "2")
    ]
    first, second = (next(job.items()) for job in jobs)
    assert first.hash != second.hash
    (tmp_path / "2").rename(tmp_path / "moved")
    moved = run_module.Run(Config.of(model=str(tmp_path / "moved/checkpoint"), **given)).job
    assert next(moved.items()).hash == second.hash


def test_a_changed_plan_file_generates_anew(alone, tmp_path):
    pipe, usual, rows, _ = alone
    file = tmp_path / "plan.json"
    asked = usual | {"plan": str(file)}
    blockcache.plan_for(pipe, "fast", steps=5).save(file)
    assert len(list(generate(rows[:2], pipe, tmp_path / "o", **asked))) == 2
    assert len(list(generate(rows[:2], pipe, tmp_path / "o", **asked))) == 0
    blockcache.plan_for(pipe, "quality", steps=5).save(file)
    assert len(list(generate(rows[:2], pipe, tmp_path / "o", **asked))) == 2


def test_leaving_the_loop_early_loses_nothing(toy, tmp_path):
    rows = [f"prompt {i}" for i in range(6)]
    for result in generate(rows, Toy(), tmp_path / "out", plan="none"):
        assert result.id == "000000"
        break
    pipe = Toy()
    again = toy(rows, pipe)
    assert 3 <= len(again) <= 5 and len(pictures(tmp_path / "out")) == 6


def test_prompts_that_change_under_way_are_noticed(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a\nb\nc\nd\n")
    results = generate(path, Toy(), tmp_path / "out", plan="none")
    path.write_text("a\nb\nX\nd\n")
    with pytest.raises(BlockCacheError, match="has changed since the run began"):
        list(results)


# ---- what goes wrong ----------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_and_keeps_it_small(toy):
    class Small(Toy):
        def __call__(self, prompt, generator, **rest):
            if len(prompt) > 2:
                self.calls.append(list(prompt))
                raise OOM
            return super().__call__(prompt, generator)

    pipe = Small()
    results = toy([f"p{i}" for i in range(12)], pipe, batch_size=8)
    assert [r.status for r in results] == ["done"] * 12
    assert [len(call) for call in pipe.calls] == [8, 4, 2, 2, 4, 2, 2, 2, 2]
    assert {r.row["batch"] for r in results} == {2}


def test_an_item_that_never_fits_is_marked_and_the_others_go_on(toy, tmp_path):
    pipe = Toy(fails={"huge": OOM})
    results = toy(["a", "huge", "c"], pipe, batch_size=2)
    assert [r.status for r in results] == ["done", "failed", "done"]
    assert "out of memory" in results[1].error and results[1].file is None
    # Once together, once for each half; memory that was not enough is not tried again.
    assert pipe.calls == [["a", "huge"], ["a"], ["huge"], ["c"]]
    assert len(toy(["a", "huge", "c"])) == 1
    assert [row["status"] for row in manifest(tmp_path / "out")] == ["done"] * 3


def test_other_errors_get_one_more_try_alone(toy):
    errors = [RuntimeError("flaky")]

    class Flaky(Toy):
        def __call__(self, prompt, generator, **rest):
            if "flaky" in prompt and errors:
                self.calls.append(list(prompt))
                raise errors.pop()
            return super().__call__(prompt, generator)

    pipe = Flaky(fails={"poison": ValueError("never")})
    results = toy(["flaky", "b", "poison", "d"], pipe, batch_size=2)
    assert [r.status for r in results] == ["done", "done", "failed", "done"]
    assert results[2].error == "ValueError: never"
    assert pipe.calls == [
        *(["flaky", "b"], ["flaky"], ["b"]),
        *(["poison", "d"], ["poison"], ["d"]),
    ]


def test_a_dead_device_marks_nothing_as_failed(toy, tmp_path):
    """Every further item would fail: one broken GPU must not use up the whole list."""
    rows = [f"p{i}" for i in range(5)]
    broken = Toy(fails={"p2": RuntimeError("CUDA error: an illegal memory access")})
    with pytest.raises(DeviceError, match="illegal memory access; the device is of no more use"):
        toy(rows, broken)
    assert broken.calls == [["p0"], ["p1"], ["p2"]]
    assert [r.row["prompt"] for r in toy(rows)] == ["p2", "p3", "p4"]
    assert [row["status"] for row in manifest(tmp_path / "out")] == ["done"] * 5


def test_a_stop_leaves_what_does_not_fit_the_batch(toy):
    """The row that was looked at and is of another form is not rendered any more."""
    pipe = Toy()
    rows = [{"prompt": "a"}, {"prompt": "b", "width": 12}, {"prompt": "c", "width": 12}]
    run = run_module.Run(
        Config.of(prompts=rows, model=pipe, out=toy.out, plan="none", batch_size=2),
        should_stop=lambda: len(pipe.calls) == 1,
    )
    assert [r.id for r in run.results()] == ["000000"]
    assert [r.id for r in toy(rows)] == ["000001", "000002"]


def test_pictures_of_nothing_are_failures(toy):
    class Broken(Toy):
        def __call__(self, prompt, **rest):
            return (np.full((len(prompt), 8, 8, 3), np.nan),)

    (result,) = toy(["a"], Broken())
    assert result.status == "failed" and "not numbers" in result.error


def test_fail_fast_stops_at_the_first_failure(toy, tmp_path):
    pipe = Toy(fails={"p2": ValueError("no")})
    results = toy([f"p{i}" for i in range(9)], pipe, fail_fast=True)
    assert [r.status for r in results] == ["done", "done", "failed"]
    assert len(manifest(tmp_path / "out")) == 3
    assert len(toy([f"p{i}" for i in range(9)])) == 7


def test_a_full_disk_stops_the_run_and_loses_nothing(toy, tmp_path):
    """The limit on file sizes plays the full disk; it hits the manifest in mid-line."""
    rows = [f"p{i}" for i in range(30)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(files.StorageError, match="the disk is full: .*same command again"):
            toy(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    made = pictures(tmp_path / "out")
    assert 5 < len(made) < 30
    again = toy(rows)
    assert len(made) - 2 <= 30 - len(again) <= len(made)
    toy(rows, out=tmp_path / "calm")
    assert pictures(tmp_path / "out") == pictures(tmp_path / "calm")
    assert [row["row"] for row in manifest(tmp_path / "out")] == list(range(30))
    assert not list((tmp_path / "out").rglob("*.partial*"))


def test_the_last_item_meets_a_full_disk(toy, tmp_path):
    """Rank 0 waited for it to be settled, for ever: it is its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(files.StorageError, match="the disk is full"):
            toy(["a"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out/items").iterdir()) == []


def test_places_that_cannot_be_written_to_are_refused(toy, tmp_path):
    (tmp_path / "file").write_text("")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    places = [tmp_path / "file", tmp_path / "file" / "o", Path("/proc/o")]
    # The superuser may write anywhere but where nobody can.
    places += [closed / "o"] if os.geteuid() else []
    for place in places:
        with pytest.raises(BlockCacheError, match="cannot write to"):
            toy(["a"], out=place)


def test_a_run_within_a_run_is_refused(tmp_path):
    first = generate(["a", "b", "c"], Toy(), tmp_path, plan="none")
    next(first)
    with pytest.raises(BlockCacheError, match="already generating into"):
        list(generate(["a", "b", "c"], Toy(), tmp_path, plan="none"))
    assert len(list(first)) == 2


def test_a_million_rows_are_claimed_without_being_held(tmp_path, monkeypatch):
    """Claims and survey of a large file stay small: bytes per row, not rows."""
    rows = 30_000
    path = tmp_path / "p.txt"
    path.write_text("a prompt\n" * rows)
    run = run_module.Run(Config.of(prompts=path, model=Toy(), out=tmp_path / "o", plan="none"))
    assert run.survey.keys.nbytes == 8 * rows
    run.should_stop = lambda: run.counts.get(claims.DONE, 0) >= 3
    assert 3 <= len(list(run.results())) <= 5
    assert (tmp_path / "o" / ".state").stat().st_size == rows + 64


def test_embedded_models_are_found_by_name(tmp_path, monkeypatch):
    results = list(generate(["a red ring"], "tiny-image", tmp_path, steps=2))
    assert results[0].row["model"] == "tiny-image" and models.EMBEDDED
    assert Image.open(results[0].file).size == (64, 64)
