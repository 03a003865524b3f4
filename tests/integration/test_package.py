"""The sdist and the wheel that is built from it: what they hold, and that they do without the repository."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import llavanext_cli

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_the_package_and_the_presets_and_nothing_else(built_wheel):
    with zipfile.ZipFile(built_wheel) as wheel:
        names = set(wheel.namelist())
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llavanext_cli").rglob("*.py")}
    presets = {f"llavanext_cli/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "presets").rglob("*.yaml")}
    assert package == modules | presets | {"llavanext_cli/py.typed"}
    assert built_wheel.name == f"llavanext_cli-{llavanext_cli.__version__}-py3-none-any.whl"


def test_the_sdist_holds_what_it_takes_to_test_it(built_wheel):
    (sdist,) = built_wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "README.zh-CN.md", "LICENSE", "CHANGELOG.md"} <= names
    assert {"presets/video-7b-stage2.yaml", "tests/conftest.py", "completions/llavanext.zsh"} <= names


def test_the_changelog_knows_the_version():
    assert f"\n## [{llavanext_cli.__version__}] - 20" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_alone_lists_its_presets(wheel_environment, tmp_path):
    where = "import llavanext_cli, sys; sys.stdout.write(llavanext_cli.__file__)"
    file = run([sys.executable, "-c", where], wheel_environment, tmp_path)
    assert Path(file).is_relative_to(wheel_environment["PYTHONPATH"])
    listed = run([sys.executable, "-m", "llavanext_cli", "presets", "list"], wheel_environment, tmp_path)
    assert "video-7b-stage2" in listed


def run(command: list[str], environment: dict[str, str], folder: Path) -> str:
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout
