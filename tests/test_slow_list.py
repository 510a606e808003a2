"""Every line of slow.txt names a test: one that was renamed would run in `make test` again."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_line_names_a_test():
    lines = (TESTS / "slow.txt").read_text().splitlines()
    assert lines == sorted(set(lines))
    known = {}
    for line in lines:
        path, name = line.partition("[")[0].split("::")
        if path not in known:
            tree = ast.parse((TESTS.parent / path).read_text())
            known[path] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in known[path], line
