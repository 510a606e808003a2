"""docs/settings.md is what the settings say of themselves."""

import re
import runpy
from pathlib import Path

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.keys import settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_current():
    made = runpy.run_path(str(PAGE.with_suffix(".py")))["page"]()
    assert made == PAGE.read_text(encoding="utf-8"), "run `python docs/settings.py`"


def test_every_setting_has_a_row_of_six_cells():
    before, after = PAGE.read_text(encoding="utf-8").split("\n## Evaluation\n")
    for text, known in ((before, settings()), (after, settings(EvalConfig))):
        rows = [line for line in text.splitlines() if line.startswith("| `")]
        assert [row.split("`")[1] for row in rows] == list(known)
        assert all(len(re.split(r"(?<!\\)\|", row)) == 8 for row in rows)
        assert all(cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)[1:-1])
