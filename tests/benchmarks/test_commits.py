"""A step of another commit, beside the present one: what it is told, and what is said where it cannot be measured."""

import json
import subprocess

import pytest

from ccmim_fast.errors import ConfigError, MachineError

# As an old benchmark may be: it knows none of the newer fields, and prints other things before its answer.
MEASURE = """
import json, os, sys
from typing import NamedTuple
class Job(NamedTuple):
    settings: list
    batch: int
    WITHOUT
if __name__ == "__main__":
    job = Job(**json.load(sys.stdin))._asdict()
    print("a line of a library")
    seen = [os.environ["PYTHONPATH"].split(os.pathsep)[0], os.environ["XDG_CACHE_HOME"], job]
    open(os.path.join(os.environ["SEEN"]), "w").write(json.dumps(seen))
    if job["settings"] == ["--config=unknown"]:
        print("ccmim: no such preset", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(dict(images_per_second=2.0, peak_bytes=5, flops_per_image=1e9, matmul_flops=1e12, losses=[1.0])))
"""


@pytest.fixture
def commits(module):
    return module("commits")


@pytest.fixture
def clone(commits, tmp_path, monkeypatch):
    """A function that commits a file of benchmarks/ in a repository of its own, and returns the commit."""
    root = tmp_path / "clone"
    (root / "benchmarks").mkdir(parents=True)
    monkeypatch.setattr(commits, "ROOT", root)
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)

    def commit(name, text):
        (root / "benchmarks" / name).write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", "x"], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    return commit


@pytest.mark.parametrize("field", ["without", "peer"])
def test_another_commit_is_measured_by_its_own_script(commits, module, clone, tmp_path, monkeypatch, field):
    """It is told what it knows, be it required there or not, and nothing else."""
    name = clone("measure.py", MEASURE.replace("WITHOUT", f"{field}: object"))
    clone("measure.py", "raise SystemExit('a later one')")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    assert commits.full_name(name[:7]) == name
    root = commits.unpack(name, tmp_path)
    assert commits.unpack(name, tmp_path) == root  # of two contenders of a commit
    measure = module("measure")
    job = measure.Job(["--config=mae_vit_base"], "", "arch", 2, 32, "cpu", "fp32", 1, 0.1, root=str(root))
    assert measure.measure(job) == measure.Figures(2.0, 5, 1e9, 1e12, [1.0])
    path, cache, told = json.loads((tmp_path / "seen.json").read_text())
    assert path == str(root)
    assert cache == str(root / ".cache")
    assert told == {"settings": ["--config=mae_vit_base"], "batch": 2, field: getattr(job, field)}
    # What the commit does not know is its row's line; what this one does not know ends the command.
    assert measure.measure(job._replace(settings=["--config=unknown"])) == "ccmim: no such preset"


def test_settings_given_are_the_present_ones(module):
    """They may be newer than the commit."""
    command_line, contenders = module("command_line"), module("contenders")
    options = module("throughput").parse(["--device=cpu", "--precision=fp32", "--mask.ratio=0.5"])
    then = contenders.contender_of("mae-8-bf16@HEAD")
    assert (then.commit, then.precision, then.name) == ("HEAD", "bf16", "mae-8-bf16@HEAD")
    assert then.measured_against
    job = command_line.job_of(then, options, seconds=1.0)
    assert job.settings == ["--config=mae_vit_base"]
    assert job.precision == "bf16"
    assert (
        command_line.job_of(contenders.contender_of("mae-8"), options, seconds=1.0).settings[-1] == "--mask.ratio=0.5"
    )


def test_what_cannot_be_measured_is_said_before_anything_is(commits, clone, tmp_path, monkeypatch):
    empty = clone("other.py", "")
    with pytest.raises(ConfigError, match=r"^@HEAD: that commit has no benchmarks/measure.py"):
        commits.full_name("HEAD")
    assert len(empty) == 40
    lacking = clone("measure.py", "import no_such_package.of_old")
    with pytest.raises(
        MachineError, match=r"needs no_such_package, which is not installed; pip install no_such_package"
    ):
        commits.unpack(lacking, tmp_path)
    failing = clone("measure.py", "raise RuntimeError('of old\\nand new')")
    with pytest.raises(MachineError, match="^@" + failing[:12] + ": that commit fails: and new$"):
        commits.unpack(failing, tmp_path)
    with pytest.raises(ConfigError, match="no such commit"):
        commits.full_name("0" * 40)
    monkeypatch.setattr(commits, "ROOT", tmp_path / "nowhere")
    with pytest.raises(MachineError, match="is no clone"):
        commits.full_name("HEAD")
    monkeypatch.setattr(commits.shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match="needs git"):
        commits.full_name("HEAD")
