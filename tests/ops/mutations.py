"""Plant faults in the kernels, one at a time, and see each caught by a test. Run by hand, minutes:

    python tests/ops/mutations.py [--only TEXT]

A fault is a mark of the test that catches it: `pytest.mark.fault(what, old, new)`, where the text `old` of the op's
file in `triton_impl/` becomes `new`; `file=` names another file of the package. The package and its tests are copied to
a temporary folder first; the checkout is not touched. Tests marked slow catch faults too. Exit status 1 if a fault
survives, or if its text is no longer in the file exactly once.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
KERNELS = Path("kernels", "ccmim_kernels")


class Fault(NamedTuple):
    """This class is a planted fault: `old` in `file` becomes `new`, and `test` (file::function) fails."""

    what: str
    old: str
    new: str
    file: Path
    test: str

    def text_is_there_once(self, root: Path) -> bool:
        return (root / self.file).read_text().count(self.old) == 1

    def is_caught(self, copy: Path) -> bool:
        """Return True if the test fails on the fault; `copy` is as before afterwards."""
        path = copy / self.file
        sound = path.read_text()
        path.write_text(sound.replace(self.old, self.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", self.test]
        paths = {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env={**os.environ, **paths}, capture_output=True, check=False)
        path.write_text(sound)
        # 1: tests ran and some failed. Anything else (none selected, pytest's own error) is no catch.
        return done.returncode == 1


def faults() -> Iterator[Fault]:
    """Read the marks of all tests of the ops."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        op = path.stem.removeprefix("test_")
        for node in ast.parse(path.read_text()).body:
            for mark in getattr(node, "decorator_list", []):
                if ast.unparse(mark).startswith("pytest.mark.fault("):
                    what, old, new = map(ast.literal_eval, mark.args)
                    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in mark.keywords}
                    file = KERNELS / named.get("file", f"triton_impl/{op}.py")
                    yield Fault(what, old, new, file, f"{path.relative_to(ROOT)}::{node.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="faults whose description or file holds this text")
    only = parser.parse_args().only
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("kernels", "ccmim_fast", "configs", "tests", "benchmarks", "pyproject.toml"):
            copy_of = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy_of(ROOT / part, copy / part)
        for fault in faults():
            if only not in fault.what and only not in str(fault.file):
                continue
            caught = fault.text_is_there_once(copy) and fault.is_caught(copy)
            word = "caught" if caught else "SURVIVED" if fault.text_is_there_once(copy) else "TEXT NOT FOUND"
            wrong += not caught
            print(f"{word:14} {fault.file.stem:18} {fault.what}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
