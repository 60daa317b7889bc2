"""What users get: a wheel and an sdist with every room and the embedded models inside."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = "blockcache/pipelines/embedded/"
DATA = {".json", ".safetensors", ".png", ".md"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def build(source: Path, target: Path, kind: str) -> Path:
    """A wheel or an sdist of `source`, with the tools already installed: no network."""
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}"]
    run(*command, "--outdir", target, source, cwd=source)
    (built,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, links kept: what one build leaves behind, a later one would pick up."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skip)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("sdist"), "sdist")


def expected(checkout: Path) -> set[str]:
    """Every module of ours by its installed path, and the files beside the embedded models."""
    names = {"blockcache/py.typed"}
    for room in ("blockcache", "kernels", "pipelines", "demo"):
        for path in (checkout / room).rglob("*"):
            relative = path.resolve().relative_to(checkout)
            if relative.parts[0] != "blockcache":
                relative = Path("blockcache", relative)
            name = relative.as_posix()
            is_data = name.startswith(EMBEDDED) and path.suffix in DATA
            if path.is_file() and (path.suffix == ".py" or is_data):
                names.add(name)
    return names


def test_wheel_holds_every_room_and_the_models(checkout: Path, wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    installed = {name for name in names if ".dist-info/" not in name}
    missing = expected(checkout) - installed
    assert not missing, sorted(missing)
    assert {PurePosixPath(name).parts[0] for name in installed} == {"blockcache"}
    unwanted = {name for name in installed if "__pycache__" in name or name.endswith(".lock")}
    assert not unwanted
    assert any(name.startswith(EMBEDDED) and name.endswith(".safetensors") for name in installed)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_holds_what_the_wheel_needs(checkout: Path, sdist: Path):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    missing = (expected(checkout) | {"LICENSE", "README.md", "pyproject.toml"}) - names
    assert not missing, sorted(missing)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_copy_works_elsewhere(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    """Installed without its dependencies, imported from another folder, with its console script."""
    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(
        *install,
        *("--no-build-isolation", "--target", target, request.getfixturevalue(kind)),
        cwd=tmp_path,
    )
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import blockcache, blockcache.plan, blockcache.kernels.linear_combine
import blockcache.pipelines.cli
from pathlib import Path
modules = [m for n, m in sys.modules.items() if n.partition(".")[0] == "blockcache"]
outside = [m.__name__ for m in modules if not m.__spec__.submodule_search_locations
           and not Path(m.__file__).is_relative_to({str(target)!r})]
print(outside, callable(blockcache.pipelines.cli.main))
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path) == "[] True\n"
    assert (target / "bin" / "blockcache").is_file()
    assert list((target / EMBEDDED).rglob("*.safetensors"))
