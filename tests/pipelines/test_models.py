import json
import re
from pathlib import Path

import diffusers
import pytest
import torch

from blockcache.pipelines import models
from blockcache.pipelines.models import ModelError


@pytest.fixture
def folder(build_tiny, tmp_path) -> Path:
    """A Flux pipeline as a folder."""
    build_tiny("flux", layers=1).pipe.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_the_embedded_model_comes_with_call_and_prompts():
    found = models.find("tiny-image")
    assert found.is_local and Path(found.source).is_dir()
    assert found.call["height"] == found.call["width"] == 64
    assert len(set(found.prompts)) == 8
    assert all(re.fullmatch(r"a .* on a \w+ background", prompt) for prompt in found.prompts)


def test_a_folder_is_loaded_with_its_settings(folder):
    (folder / "blockcache.json").write_text('{"height": 32, "guidance_scale": 1.0}')
    found = models.find(str(folder))
    assert (found.name, found.prompts) == ("mine", ())
    assert found.call == {"height": 32, "guidance_scale": 1.0}
    pipe = models.load(found, torch.device("cpu"))
    assert type(pipe).__name__ == "FluxPipeline" and pipe.dtype == torch.float32
    assert models.load(found, torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_wins_over_a_hub_id_of_the_same_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert models.find(f"{folder.parent.name}/mine").is_local


def test_a_hub_id_is_not_looked_up_before_it_is_loaded():
    found = models.find("somebody/something-1.0")
    assert not found.is_local and found.source == "somebody/something-1.0"


def test_offline_is_one_clear_line():
    with pytest.raises(ModelError, match="cannot load 'somebody/nothing' from the hub.*offline"):
        models.load(models.find("somebody/nothing"), torch.device("cpu"))


@pytest.mark.parametrize("name", ["tiny-imaeg", "", "a/b/c", "../nowhere", "/nowhere/at/all"])
def test_unknown_names_say_what_is_known(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path / ".")
    if name == "":
        with pytest.raises(ModelError, match="model_index.json"):
            models.find(name)
        return
    with pytest.raises(ModelError, match="unknown model.*tiny-image.*folder.*hub id"):
        models.find(name)


def test_what_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no model_index.json"):
        models.find(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="found a file"):
        models.find(str(tmp_path / "file"))


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\x00"])
def test_bad_settings_are_refused(folder, text):
    (folder / "blockcache.json").write_text(text)
    with pytest.raises(ModelError, match="blockcache.json"):
        models.find(str(folder))


def test_broken_weights_are_one_clear_line(folder):
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"cannot load the pipeline in .*mine"):
        models.load(models.find(str(folder)), torch.device("cpu"))


def test_an_index_that_is_no_json_is_one_clear_line(folder):
    (folder / "model_index.json").write_text("not json")
    with pytest.raises(ModelError, match="cannot load"):
        models.load(models.find(str(folder)), torch.device("cpu"))


def test_devices():
    assert models.device_for("cpu") == torch.device("cpu")
    assert models.device_for(None).type in ("cpu", "cuda")
    with pytest.raises(ModelError, match="'toaster'"):
        models.device_for("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="'cuda'"):
            models.device_for("cuda")


def test_the_families_are_those_the_tests_run(tiny):
    assert type(tiny.pipe).__name__ in {family.pipeline for family in models.FAMILIES}
    assert all(hasattr(diffusers, family.pipeline) for family in models.FAMILIES)


def test_the_embedded_folder_is_complete():
    folder = Path(models.find("tiny-image").source)
    index = json.loads((folder / "model_index.json").read_text())
    parts = [k for k, v in index.items() if isinstance(v, list) and v[0] is not None]
    assert all((folder / part).is_dir() for part in parts)
