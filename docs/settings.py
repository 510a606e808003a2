"""mkdocs hook: the page settings.md of the site is made of what the settings say of themselves.

`python docs/settings.py` prints it.
"""

import re
from typing import get_args, get_origin

from mkdocs.structure.files import File

from ccmim_fast.config.evaluation import EvalConfig
from ccmim_fast.config.keys import REMOVED, RENAMED, Setting, sections, settings, show
from ccmim_fast.config.schema import Config
from ccmim_fast.config.units import Scheduled

HEAD = """# Settings

A setting is `--section.name=value` on the command line, and `name: value` below `section:` in a file for `--config`.
The command line counts more than the file, and the file more than the defaults here; a preset in `configs/` is such a
file. `--print_config` prints what they come to. Lists are written `[224, 224]`.

*Source* says where the default is from: the paper is ccMIM (ICLR 2023), "ours" is a choice of this project.
*Resume* says what a run that goes on may change: `free` changes no result but for rounding, `asked` makes it another
run and needs `--allow-change`, `shape` does not fit the weights and is refused.
"""
PARTS = {
    "Pretraining": (Config, "For `ccmim pretrain`, `demo`, `submit`, `ablate`, `import` and `eval masks`."),
    "Evaluation": (EvalConfig, "For `ccmim eval`; the figures of a protocol are a preset in `configs/eval/`."),
}
KINDS = {int: "whole number", float: "number", str: "text"}
MOST = f", {2**31 - 1}]"  # the end of whole numbers that have no end of their own


def on_files(files, config):
    """Add the page."""
    files.append(File.generated(config, "settings.md", content=page()))
    return files


def page() -> str:
    """Return the text of the page."""
    parts = [HEAD]
    for title, (schema, about) in PARTS.items():
        parts.append(f"\n## {title}\n\n{about}\n")
        for section in ("", *sections(schema)):
            own = {key: one for key, one in settings(schema).items() if key.rpartition(".")[0] == section}
            parts.append(f"\n### {title}: {section}\n\n{table(own)}" if section else f"\n{table(own)}")
    parts.append("\n## Settings of earlier versions\n\nFiles and checkpoints that hold one of these still load.\n\n")
    parts.append("| setting | now |\n|---|---|\n")
    for key, (value, why) in REMOVED.items():
        parts.append(f"| {key} | removed: {why}{'' if value is None else f'; only {value} loads'} |\n")
    return "".join([*parts, *(f"| {old} | `{new}` |\n" for old, new in RENAMED.items())])


def table(of: dict[str, Setting]) -> str:
    """Return a table of settings, a row each."""
    rows = ["| setting | default | takes | meaning | source | resume |", "|---|---|---|---|---|---|"]
    for key, one in of.items():
        meaning = re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", one.help)
        cells = (f"`{key}`", f"`{show(one.default)}`", takes(one), meaning, one.source, one.on_resume)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def takes(one: Setting) -> str:
    """Return in words which values a setting takes."""
    if one.choices:
        return ", ".join(f"`{choice}`" for choice in one.choices)
    if one.kind == Scheduled:
        return f"{one.unit.name} in {one.unit.within}, or a list of 2: of the first and the last epoch"
    item, *others = get_args(one.kind) if get_origin(one.kind) is tuple else (one.kind,)
    count = "list: " if others == [...] else f"list of {1 + len(others)}: " if others else ""
    unit = one.unit.name if one.unit.name not in ("", "number") else KINDS[item]
    within = one.unit.within
    if within.endswith(MOST):
        return f"{count}{unit}, from {within[1 : -len(MOST)]} on"
    return f"{count}{unit}{f' in {within}' if within else ''}"


if __name__ == "__main__":
    print(page())
