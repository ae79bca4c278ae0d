"""The wheel that a user gets: what is in it, how large it is, and that it works away from the repository."""

import ast
import email.message
import email.parser
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tl_looped"


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command outside the repository and returns what it prints; its errors are in the test's failure."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the build backend is not installed: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def requirements(wheel: Path) -> dict[str, Requirement]:
    """What the wheel says it needs, without the extras, by name."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata: email.message.Message = email.parser.Parser().parsestr(archive.read(name).decode())
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return {need.name: need for need in needed if need.marker is None}


@pytest.fixture(scope="module")
def clean_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it, and its dependencies borrowed from the running one by a .pth file.

    Paths that come from a .pth file have their own .pth files ignored, so an editable install does not come along.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    run(*pip, wheel, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    borrowed = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site_packages / "dependencies.pth").write_text("\n".join(borrowed) + "\n")
    return folder


def test_wheel_has_every_file_of_the_package(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("tl_looped/")}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert "tl_looped/py.typed" in packed
    assert any(name.startswith("tl_looped/training/checkpoints/") and name.endswith(".safetensors") for name in packed)


def test_wheel_is_small(wheel: Path):
    assert wheel.stat().st_size <= 5_000_000


def test_wheel_pins_transformer_lens(requirements: dict[str, Requirement]):
    assert requirements["transformer-lens"] == Requirement("transformer-lens>=4.3,<5")


def test_requirements_are_met_here(requirements: dict[str, Requirement]):
    unmet = [str(need) for name, need in requirements.items() if importlib.metadata.version(name) not in need.specifier]
    assert unmet == []


def test_probes_are_an_extra(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    assert "Requires-Dist: scikit-learn" in metadata and "extra == 'probes'" in metadata.replace('"', "'")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not find the modules of most distributions")
def test_every_import_is_a_requirement(requirements: dict[str, Requirement]):
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"tl_looped"}
    distributions = importlib.metadata.packages_distributions()
    missing = {
        module
        for module in foreign
        if not {name.lower().replace("_", "-") for name in distributions.get(module, [])} & set(requirements)
    }
    assert missing == set()


def test_import_away_from_the_repository(clean_venv: Path, tmp_path: Path):
    code = "import tl_looped; print(tl_looped.__file__)"
    printed = run(clean_venv / "bin" / "python", "-c", code, cwd=tmp_path)
    assert clean_venv in Path(printed.strip().splitlines()[-1]).parents


def test_command_away_from_the_repository(clean_venv: Path, tmp_path: Path):
    printed = run(clean_venv / "bin" / "tl-looped", "--help", cwd=tmp_path)
    assert "report" in printed
