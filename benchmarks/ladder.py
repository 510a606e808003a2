"""From the step as the algorithm is written down to ours: one optimisation switched on at a time.

    ccmim bench ladder [--preset NAME] [--section.key=value ...]

The algorithm is one and the same on every rung: ccMIM with scores by Eq. 4 at the first block, where every saving has
something to do (`--preset` takes another). Every rung starts from the same weights, takes equally many steps on the
same images, and must end at the same loss, up to rounding. What changes the rounding (bf16, compiled code) comes last.
Rungs are measured in rounds, each in a process of its own; speed-ups are taken round by round.
Writes benchmarks/results/ladder-<date>-<device>-<precision>.json, .md and .png.
"""

import sys
from argparse import Namespace
from typing import NamedTuple

import command_line
import pages
from contenders import Contender
from measure import Figures
from naive import SAVINGS
from rounds import over_rounds, run_rounds

from ccmim_fast.config.keys import nearest
from ccmim_fast.config.load import presets
from ccmim_fast.errors import ConfigError

# Relative difference of the last losses of two rungs. AdamW's first steps follow the gradient's sign, so rounding moves
# the weights of tiny gradients by whole steps. Seen with ViT-Ti after five steps on a CPU: masked_only 0, bf16 7.5e-3.
TOLERANCE = 1e-3
ROUGH = 2e-2  # where the rounding differs: 8 bits of mantissa


class Rung(NamedTuple):
    """A rung adds `settings` and a `saving` to the rung before it.

    `rounding`: whether these change how numbers are rounded.
    """

    name: str
    settings: list[str]
    precision: str
    rounding: bool = False
    saving: str = ""


def rungs(precision: str) -> list[Rung]:
    """List the rungs: from no saving to all; then what changes the rounding, from fp32 to the precision asked for."""
    found = [Rung("naive", ["--train.compile=off", "--teacher.precision=same"], "fp32")]
    found += [Rung(f"+ {name}", [], "fp32", saving=name) for name in SAVINGS]
    if precision != "fp32":
        found.append(Rung(f"+ {precision}", [], precision, rounding=True))
    found.append(Rung("+ compile", ["--train.compile=step"], precision, rounding=True))
    return found


def parse(arguments: list[str]) -> Namespace:
    made = command_line.parser("ladder", __doc__.split("\n")[0])
    made.add_argument("--preset", default="ccmim_vit_base_eq4", help="the algorithm: one of configs/")
    made.add_argument("--steps", type=int, help="measured in every round; default 2 on a CPU, 50 on CUDA")
    options = command_line.parse(made, arguments)
    if options.preset not in presets():
        raise ConfigError(f"--preset={options.preset}: no such preset; nearest: {nearest(options.preset, presets())}")
    if options.steps is None:
        options.steps = 50 if options.device == "cuda" else 2
    if options.steps < 1:
        raise ConfigError(f"--steps={options.steps}: must be at least 1")
    return options


def contenders_of(climbed: list[Rung], preset: str) -> list[Contender]:
    """Each rung with its own settings and those of all rungs below it."""
    found, given, lacking = [], [f"--config={preset}"], list(SAVINGS)
    for rung in climbed:
        given = [*given, *rung.settings]
        lacking = [name for name in lacking if name != rung.saving]
        found.append(Contender(rung.name, given, precision=rung.precision, without=tuple(lacking)))
    return found


def rows_of(climbed: list[Rung], found: dict[str, list[Figures] | str]) -> list[dict]:
    """One row a rung. A rung's loss is compared with the naive one's."""
    rows, naive, before = [], None, None
    for rung in climbed:
        own = found[rung.name]
        if isinstance(own, str):
            rows.append({"name": rung.name, "error": own})
            continue
        naive, before = naive or own, before or own
        loss, first = own[-1].losses[-1], naive[-1].losses[-1]
        difference = abs(loss - first) / (abs(first) or 1)  # zero: on a device that computes nothing
        rows.append(
            {
                "name": rung.name,
                "ours": rung is not climbed[0],
                "settings": rung.settings,
                "saving": rung.saving,
                "precision": rung.precision,
                "changes_rounding": rung.rounding,
                "images_per_second": over_rounds([f.images_per_second for f in own]),
                "peak_bytes": max(f.peak_bytes for f in own),
                "gflop_per_image": own[0].flops_per_image / 1e9,
                "over_naive": _ratio(own, naive),
                "over_before": _ratio(own, before),
                "steps": len(own[-1].losses),
                "loss": loss,
                "loss_difference": difference,
                "same_loss": difference <= (ROUGH if rung.rounding else TOLERANCE),
            }
        )
        before = own
    return rows


def _ratio(ours: list[Figures], theirs: list[Figures]) -> dict:
    return over_rounds([a.images_per_second / b.images_per_second for a, b in zip(ours, theirs)])


def body(result: dict) -> str:
    """The table in Markdown."""
    header = ["rung", "img/s", "x naive", "x rung before", "peak GB", "GFLOP/img", "loss", "difference"]
    measured = [row for row in result["rows"] if "error" not in row]
    lines = [pages.table([_line(row) for row in measured], header)]
    lines += [f"{row['name']}: {row['error']}" for row in result["rows"] if "error" in row]
    lines += [f"{r['name']}: not the loss of the naive step" for r in measured if not r["same_loss"]]
    return "\n\n".join(lines)


def _line(row: dict) -> list[str]:
    return [
        row["name"],
        pages.spread(row["images_per_second"], 2),
        pages.spread(row["over_naive"], 2),
        pages.spread(row["over_before"], 2),
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['gflop_per_image']:.1f}",
        f"{row['loss']:.6f}",
        f"{row['loss_difference']:.1e}" + ("" if row["same_loss"] else " !"),
    ]


def notes(result: dict) -> str:
    return (
        f"{result['arch']}, {result['image_size']} px, batch {result['batch']}: preset `{result['preset']}`, the same "
        f"algorithm on every rung. {result['steps']} steps after the warm-up in each of {result['rounds']} interleaved "
        "rounds, every rung in a process of its own; medians, in brackets the least and the largest round; ratios are "
        f"taken round by round. `loss` after equally many steps from the same weights; `difference` is relative to the "
        f"naive step's and must be below {TOLERANCE:g}, or {ROUGH:g} where the rounding changes; beyond it is marked "
        "with !. `peak GB`: memory beyond that before the model was built."
    )


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    climbed = rungs(options.precision)
    result = {
        "environment": pages.environment("ladder", arguments, options),
        **{name: getattr(options, name) for name in ("arch", "image_size", "batch", "precision", "rounds")},
        **{name: getattr(options, name) for name in ("preset", "steps")},
    }
    jobs = {
        contender.name: command_line.job_of(contender, options, seconds=0, steps=options.steps)
        for contender in contenders_of(climbed, options.preset)
    }
    prefix = pages.prefix_of("ladder", options, result["environment"])
    result["rows"] = rows_of(climbed, run_rounds(jobs, options.rounds))
    print(f"\n{body(result)}\n")
    measured = [row for row in result["rows"] if "error" not in row]
    page = pages.page("Ladder", result, notes(result), body(result))
    pages.write(result, prefix, page, lambda path: pages.bars(path, result, measured))
    print(f"{prefix}.md, .json, .png")
    return 0 if all(row.get("same_loss") for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(command_line.run_main(main, sys.argv[1:]))
