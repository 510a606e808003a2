"""`ccmim report`: runs side by side in one HTML file, finished or not."""

from pathlib import Path

from ccmim_fast.config.parser import Parser, whole_number
from ccmim_fast.errors import say
from ccmim_fast.report.compare import compare_runs

_HELP = """
Write one offline HTML page that compares runs: losses, throughput and the other figures of metrics.jsonl as curves;
scores, masks and reconstructions of a few of the run's images by each of its checkpoints; evaluations
(eval/*/result.json, by ccmim eval); settings other than the first run's and than the defaults; environments. Runs may
be going on, stopped or damaged: the page says so. Nothing in a run changes. The page needs no network, no script and no
other file.
"""


def report(argv: list[str]) -> None:
    """Write the page, and print what is on it."""
    parser = Parser("ccmim report", _HELP)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; the first is compared with")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--title", default="", help="title of the page; if not given: the runs' names")
    parser.add_argument("--images", type=whole_number(0, 64), default=4, help="images drawn")
    parser.add_argument("--moments", type=whole_number(0, 64), default=5, help="checkpoints drawn; 0: no pictures")
    parser.add_argument("--data", default="", metavar="ROOT", help="images to draw, where the run's own are not here")
    given = parser.parse_args(argv)
    count, remarks = compare_runs(**vars(given))
    size = given.out.stat().st_size / 1e6
    for line in (f"{given.out}: {count} run{'s' * (count > 1)}, {size:.1f} MB", *remarks):
        say(line)
