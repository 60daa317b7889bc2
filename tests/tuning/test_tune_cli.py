from pathlib import Path

import pytest

from blockcache.pipelines import cli
from blockcache.plan import Plan
from blockcache.plan.trace import Trace


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run("tune", ...)`: exit code, stdout, stderr; in a folder with three prompts."""
    monkeypatch.chdir(tmp_path)
    prompts = ("a small red circle", "a blue star above a ring", "a green square")
    Path("prompts.txt").write_text("\n".join(prompts))

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return run


SHORT = ("--prompts", "prompts.txt", "--steps", 8)


def test_a_plan_is_tuned_reported_on_and_used(run):
    code, out, err = run("tune", *SHORT, "--psnr", 15, "--quick", "--work", "work")
    assert code == 0, err
    plan = Plan.load("plan.json")
    assert out.startswith("tuned for psnr_db at least 15 dB in 50% of the pictures")
    assert plan.note in out and f"{plan.reached['speedup']:.2f}x as fast" in out
    assert plan.total == 8 and plan.fingerprint.model == "FluxTransformer2DModel"
    assert "blockcache.enable(pipe, 'plan.json')" in err
    code, out, _ = run("plans", "show", "plan.json")
    assert code == 0 and "tuned for psnr_db" in out
    pytest.importorskip("matplotlib")
    report = ("report", *SHORT, "--plan", "plan.json", "--work", "work", "--out", "page")
    code, out, err = run(*report)
    assert code == 0 and out == "wrote page/index.html\n", err
    assert "candidates tried" not in err and (Path("page") / "front.png").stat().st_size > 5000


def test_a_trace_is_written(run):
    code, out, err = run("trace", *SHORT, "--out", "here")
    assert code == 0, err
    found = Trace.load("here")
    assert len(found.prompts) == 3 and len(found.sigmas) == 8
    assert f"{found.milliseconds['computed']:8.2f} ms" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tune",), "give a goal: --psnr, --ssim, --lpips or --speedup"),
        (("tune", "--psnr", 200), "psnr must lie in 5..90"),
        (("tune", "--psnr", 30, "--speedup", 2), "found psnr, speedup"),
        (("tune", "--psnr", 30, "--prompts", "none.txt"), "cannot read prompts from none.txt"),
        (("tune", "--psnr", 30, "--steps", 4), "4 steps leaves nothing to tune"),
        (("report", "--plan", "none.json"), "cannot read the plan"),
        (("trace", "--model", "no-model"), "unknown model 'no-model'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, args, message):
    code, out, err = run(*args)
    assert code == 2 and out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("blockcache:")]
    assert message in line and [path.name for path in Path().iterdir()] == ["prompts.txt"]
