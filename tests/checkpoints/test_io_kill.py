"""A writer killed at any moment leaves a folder in which the newest complete checkpoint is found."""

import json
import subprocess
import sys

import pytest

# Runs in a fresh interpreter, which forks a writer for each n that kills itself at its n-th file operation. An audit
# hook sees open, mkdir, rename and removal; fsync and write have no audit event and are wrapped. The parent then looks.
KILLER = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from ccmim_fast.checkpoints import io

def state_of(value):
    return {"weight": torch.full((300,), float(value)), "value": value}

def die_at(n):
    seen = 0
    def event(name):
        nonlocal seen
        seen += 1
        if seen == n:
            (base / "died_at").write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)
    write, fsync = io.Hashed.write, os.fsync
    def half_writes(self, data):
        event("before a write")
        half = len(data) // 2
        write(self, data[:half])
        self.flush()
        event("within a write")
        return half + write(self, data[half:])
    def counted_fsync(descriptor):
        event("fsync")
        fsync(descriptor)
    io.Hashed.write, os.fsync = half_writes, counted_fsync
    kinds = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
    active = True
    def hook(name, args):
        nonlocal active
        if active and name in kinds:
            active = seen + 1 != n  # the note that it dies is no operation of the writer
            event(name)
    sys.addaudithook(hook)

base, step, keep = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
template, folder = base / "template", base / "folder"
for old in (1, 2):
    io.save(template, old, state_of(old), keep=5)
n, found = 0, []
while True:
    n += 1
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    (base / "died_at").unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        die_at(n)
        io.save(folder, step, state_of(9), keep=keep, for_good=True)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    left = [path.name for path in folder.glob(".*") if path.name != ".lock"]
    path, state, problems = io.newest(folder)
    after = [path.name for path in folder.glob(".*") if path.name != ".lock"]
    for visible in io.checkpoints(folder):
        assert (visible / io.KEPT).exists() == (io.load(visible)["value"] == 9)
    died_at = (base / "died_at").read_text() if killed else "end"
    found.append([died_at, left, path.name, state["value"], problems, after])
    if not killed:
        break
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("step", "keep", "old"), [(3, 1, "step_00000002"), (2, 2, "step_00000002")], ids=["new step, prunes", "replaces"]
)
def test_kill_at_every_write_step(tmp_path, step, keep, old):
    command = [sys.executable, "-c", KILLER, str(tmp_path), str(step), str(keep)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kinds = {died_at for died_at, *_ in found}
    assert kinds >= {"open", "os.mkdir", "os.rename", "fsync", "before a write", "within a write", "os.remove", "end"}
    assert any(left for _, left, *_ in found), "no kill left anything behind: the test tests nothing"
    new = f"step_{step:08d}"
    seen_new = False
    for died_at, left, name, value, problems, after in found:
        assert problems == [], died_at
        assert after == [], (died_at, left)
        assert (name, value) in ((old, 2), (new, 9)), died_at
        assert value == 9 or not seen_new, "the new checkpoint was there and is gone"
        seen_new = value == 9
    assert seen_new
    assert found[-1][0] == "end"
