"""The page of the settings in the docs has all of them."""

import re
import runpy
from pathlib import Path

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.keys import settings

SCRIPT = Path(__file__).parents[2] / "docs" / "settings.py"


def test_every_setting_has_a_row_of_six_cells():
    before, after = runpy.run_path(str(SCRIPT))["page"]().split("\n## Evaluation\n")
    for text, known in ((before, settings()), (after, settings(EvalConfig))):
        rows = [line for line in text.splitlines() if line.startswith("| `")]
        rows = [row for row in rows if row.count("|") > 3]  # not those of earlier versions
        assert [row.split("`")[1] for row in rows] == list(known)
        assert all(len(re.split(r"(?<!\\)\|", row)) == 8 for row in rows)
        assert all(cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)[1:-1])
