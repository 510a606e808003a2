"""The wheel: two top-level names, the presets and the page template inside, and a command that works from it."""

import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
REQUIREMENTS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the files git knows, so that a stale build folder cannot help."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and name.split("/")[0] in (
            "ccmim_fast",
            "kernels",
            "configs",
            "setup.py",
            "pyproject.toml",
        ):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_two_top_level_names(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {n for n in names if not n.endswith(".dist-info")} == {"ccmim_fast", "ccmim_kernels"}


def test_presets_and_template_are_inside(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = ROOT / "configs"
    presets = {f"ccmim_fast/configs/{path.relative_to(configs)}" for path in configs.rglob("*.yaml")}
    assert presets
    assert presets <= names
    assert {"ccmim_fast/report/page.html", "ccmim_fast/export/card.md"} <= names


def test_no_dependency_on_the_other_apex(wheel):
    metadata = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    required = [
        line for line in zipfile.ZipFile(wheel).read(metadata).decode().splitlines() if line.startswith("Requires-Dist")
    ]
    assert required
    assert not any("apex" in line for line in required)


def test_installed_command_works_without_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)],
        check=True,
        capture_output=True,
    )
    code = "import sys, ccmim_fast.cli as cli; print(cli.__file__); sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "pretrain", "--config", "ccmim_vit_base_eq4", "--print_config"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert "source: first" in done.stdout


@pytest.fixture(scope="module")
def declared():
    """What setup.py tells setuptools."""
    told = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", told.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return told


def test_the_oldest_environment_has_the_lower_bounds(declared):
    """Of every package that the program, its extras and its tests need, but for the tools and GPUs of today."""
    lines = (ROOT / "requirements" / "oldest.txt").read_text().splitlines()
    pins = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if line[0] != "#"}
    extras = declared["extras_require"]
    needed = [one for name in extras if name not in ("cuda13", "pascal", "tiff") for one in extras[name]]
    for requirement in map(Requirement, [*declared["install_requires"], *needed]):
        (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
        name = canonicalize_name(requirement.name)
        if name != "ruff":
            assert Version(pins[name]) == Version(bound), requirement


def test_every_place_names_the_same_python(declared):
    least = declared["python_requires"].removeprefix(">=")
    told = {
        name: re.findall(r"[Pp]ython (3\.\d+)", (ROOT / name).read_text())
        for name in ("README.md", "docs/index.md", *(f"requirements/{path.name}" for path in REQUIREMENTS))
    }
    assert {name: {*found} for name, found in told.items()} == {name: {least} for name in told}
    assert f'target-version = "py{least.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
    assert sys.version_info[:2] >= tuple(map(int, least.split(".")))
