"""Writes the README's performance tables from the newest committed results of `ccmim bench throughput`.

    python benchmarks/readme_table.py

One table for each kind of device (a GPU by its name, CPUs together) and precision that there is a result of; what git
does not know of is left out.
"""

import json
import subprocess
from pathlib import Path

import pages
import throughput_page

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- performance: begin -->\n", "<!-- performance: end -->\n"
AGAINST = ("transformers", "stable-pretraining", "lightly", "mae-8", "naive")  # a column each, of those in the result
OFF = "all off"  # the same method with everything of ours off


def newest() -> list[Path]:
    """The newest committed result of each kind of device and precision, in the order of their names."""
    pattern = "benchmarks/results/throughput-*.json"
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {}
    for path in map(ROOT.joinpath, listed.stdout.split()):
        result = json.loads(path.read_text())
        key = (result["environment"]["device"].partition(",")[0], result["precision"])
        if key not in found or result["environment"]["time"] > found[key][0]:
            found[key] = (result["environment"]["time"], path)
    return sorted(path for _, path in found.values())


def region(paths: list[Path]) -> str:
    """What stands between the README's two marks."""
    if not paths:
        return "\nNothing was measured yet: `make bench`.\n\n"
    return "\n" + "\n\n".join(section(path) for path in paths) + "\n\n"


def section(path: Path) -> str:
    result = json.loads(path.read_text())
    environment = result["environment"]
    threads = f", {environment['threads']} threads" if "threads" in environment else ""
    facts = f"torch {environment['torch']}, commit {environment['commit']}, {environment['time'][:10]}"
    page = path.with_suffix(".md").relative_to(ROOT)
    rows = [row for row in result["rows"] if "error" not in row]
    against = [name for name in AGAINST if any(_over(row, name) is not None for row in rows)]
    against += [OFF] * any(_over(row, OFF) is not None for row in rows)
    told = any(throughput_page.form_of(row) for row in rows)
    header = ["step", "img/s", *(f"x {name}" for name in against), "peak GB", "GFLOP/img", "MFU", *["form"] * told]
    title = f"{pages.size_of(result)}; {environment['device']}{threads}; {facts} ([all figures]({page})):"
    return f"{title}\n\n{pages.table([_line(row, against, told) for row in rows], header)}"


def _over(row: dict, name: str) -> dict | None:
    """A row's ratio to a contender; to the row's own one for `OFF`."""
    return row["ratios"].get(row.get("off") if name == OFF else name)


def _line(row: dict, against: list[str], told: bool) -> list[str]:
    ratios = [_over(row, name) for name in against]
    return [
        row["name"],
        pages.spread(row["images_per_second"], 2),
        *("" if ratio is None else f"{ratio['median']:.2f}" for ratio in ratios),
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['gflop_per_image']:.1f}",
        f"{row['mfu']:.0%}",
        *[throughput_page.form_of(row)] * told,
    ]


def rewritten(readme: str, inside: str) -> str:
    """`readme` with `inside` between its marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: {BEGIN.strip()} and {END.strip()} must both be there, in this order")
    return before + begin + inside + end + after


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(), region(newest())))
