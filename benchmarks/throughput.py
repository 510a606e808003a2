"""Training steps of ours and of others, side by side in one run: images per second, memory, arithmetic, loss.

    ccmim bench throughput [--only NAME ...] [--peer FILE.py:FUNCTION ...] [--section.key=value ...]

Each contender runs in a process of its own, one at a time, in rounds: all of them once, then all of them again. All
have the same batch of random uint8 images on the device, and AdamW. A ratio is taken round by round. A NAME may end in
a precision of its own, and one of ours in a commit, whose step is then measured beside the present one's:
`ccmim-bank-fp32@ac1f32c`.
Writes benchmarks/results/throughput-<date>-<device>-<precision>.json, .md and .png.

A peer is any function `build(arch, images_BHWC, precision)`, to be given as --peer path.py:build:
    arch: timm's name of the encoder, such as "vit_base_patch16_224".
    images_BHWC: [B, H, W, 3] uint8, on the device to be used. What the peer's own loader would make of them (float,
        normalised, channels first) may be made here: it is not timed.
    precision: "fp32", "bf16" or "fp16"; autocast and loss scaling are the peer's.
It returns a function without arguments that takes one whole training step on all of these images (forward, backward,
optimizer, gradients zeroed), does not wait for the device, and returns the loss, a detached scalar tensor. The file's
folder is on the import path; its imports come before memory is measured. Where the file has a function
`forms(precision)`, the step can be run in several forms: it returns further keyword arguments of `build`, each with the
values to try, the default first, and the fastest form is measured (forms.py). Examples: benchmarks/peers/.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import command_line
import commits
import pages
import throughput_page
from contenders import CONTENDERS, DEFAULT, Contender, as_expected, contender_of
from forms import Best, best
from measure import Figures, Job
from rounds import over_rounds, run_rounds

from ccmim_fast.errors import ConfigError, MachineError


def parse(arguments: list[str]) -> Namespace:
    made = command_line.parser("throughput", __doc__.split("\n")[0])
    names = f"of {', '.join(CONTENDERS)}; -fp32, -bf16 or -fp16 after one: in that precision; @COMMIT after one of ours"
    made.add_argument("--only", nargs="+", metavar="NAME", default=[], help=names)
    made.add_argument("--peer", action="append", default=[], metavar="FILE.py:FUNCTION", help="see the script's head")
    made.add_argument("--seconds", type=float, default=30.0, help="measured per contender, over all rounds")
    made.add_argument(
        "--forms",
        choices=["best", "default"],
        default="best",
        help="of peers: the fastest of their forms, searched before the rounds, or the first one",
    )
    return command_line.parse(made, arguments)


def chosen(options: Namespace) -> list[Contender]:
    """Who takes part, in the order asked for; who is not installed has a line for a row, unless asked for by name.

    Raises:
        ConfigError: no such contender, no such file, or no such commit.
        MachineError: one that was asked for is not installed, or commits cannot be read.
    """
    wanted = [contender_of(name) for name in (options.only or (() if options.peer else DEFAULT))]
    # Its own precision is why it is there: where all have it, it is another's double.
    wanted = [c for c in wanted if options.only or c.precision != options.precision]
    for contender in wanted if options.only else ():
        if not contender.installed:
            raise MachineError(f"{contender.name}: {contender.absent}")
    wanted = [c._replace(commit=commits.full_name(c.commit)) if c.commit else c for c in wanted]
    found = wanted + [outside(where) for where in options.peer]
    twice = [c.name for index, c in enumerate(found) if c.name in [other.name for other in found[:index]]]
    if twice:
        raise ConfigError(f"{twice[0]}: is there twice; one line for each name is the limit")
    return found


def outside(where: str) -> Contender:
    """The contender that `--peer` names, called like its file and function."""
    path, colon, name = where.rpartition(":")
    if not colon or not name.isidentifier() or not Path(path).is_file():
        raise ConfigError(f"--peer={where}: no such file; write --peer path.py:function")
    return Contender(f"{Path(path).name}:{name}", peer=f"{Path(path).resolve()}:{name}")


def in_best_forms(jobs: dict[str, Job], options: Namespace) -> dict[str, Best | str]:
    """The form of each peer, by its name; a line for a peer that runs in none."""
    found = {}
    for name, job in jobs.items():
        if job.peer and options.forms == "best":
            found[name] = best(job)
            print(f"{name}: {found[name] if isinstance(found[name], str) else found[name].line()}", flush=True)
    return found


def row_of(contender: Contender, rounds: list[Figures], options: Namespace, peak_flops: float) -> dict:
    """One row of the result, without its ratios."""
    rate = over_rounds([figures.images_per_second for figures in rounds])
    flops = rounds[0].flops_per_image
    design = contender.design.get(options.arch)
    as_it_is = contender.peer or contender.commit
    # The design's figures are for 224 pixels, and for the presets as they are.
    if options.image_size != 224 or (options.settings and not as_it_is):
        design = None
    deviation = None if design is None else flops / 1e9 / design - 1
    return {
        "name": contender.name,
        "ours": not contender.peer and not contender.commit and not contender.without,
        "commit": contender.commit,
        "precision": contender.precision or options.precision,
        "settings": contender.settings + ([] if as_it_is else options.settings),
        "without": list(contender.without),
        "differs": contender.differs,
        "off": contender.off,
        "images_per_second": rate,
        "peak_bytes": max(figures.peak_bytes for figures in rounds),
        "gflop_per_image": flops / 1e9,
        "design_gflop_per_image": design,
        "deviation": deviation,
        "as_expected": None if deviation is None else as_expected(contender, deviation),
        "mfu": rate["median"] * flops / peak_flops,
        "first_loss": rounds[-1].losses[0],
        "last_loss": rounds[-1].losses[-1],
        "steps": len(rounds[-1].losses),
    }


def rows_of(
    taking_part: list[Contender],
    found: dict[str, list[Figures] | str],
    options: Namespace,
    forms: dict[str, Best | str] = {},  # noqa: B006 (never changed)
) -> list[dict]:
    """All rows, each with its ratios to every other one that finished."""
    finished = [c for c in taking_part if not isinstance(found[c.name], str)]
    peak_flops = {}
    for contender in finished:
        precision = contender.precision or options.precision
        rates = [figures.matmul_flops for figures in found[contender.name]]
        peak_flops[precision] = max(*rates, peak_flops.get(precision, 0.0))
    rows = []
    for contender in taking_part:
        if contender not in finished:
            rows.append({"name": contender.name, "error": found[contender.name]})
            continue
        own = found[contender.name]
        row = row_of(contender, own, options, peak_flops[contender.precision or options.precision])
        row["matmul_tflop_per_s"] = peak_flops[row["precision"]] / 1e12
        row["measured_against"] = contender.measured_against
        row["form"] = forms[contender.name]._asdict() if contender.name in forms else None
        others = {other.name: found[other.name] for other in finished if other is not contender}
        row["ratios"] = {
            name: over_rounds([a.images_per_second / b.images_per_second for a, b in zip(own, rounds)])
            for name, rounds in others.items()
        }
        row["memory_ratios"] = {
            name: row["peak_bytes"] / max(1, *(figures.peak_bytes for figures in rounds))
            for name, rounds in others.items()
        }
        rows.append(row)
    return rows


def measured(taking_part: list[Contender], options: Namespace) -> list[dict]:
    """The rows of the result: forms of the peers first, then the rounds."""
    seconds = options.seconds / options.rounds
    absent = {c.name: c.absent for c in taking_part if not c.installed}
    for name, why in absent.items():
        print(f"{name}: {why}")
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for contender in (c for c in taking_part if c.installed):
            root = str(commits.unpack(contender.commit, Path(folder))) if contender.commit else ""
            jobs[contender.name] = command_line.job_of(contender, options, seconds=seconds, root=root)
        forms = in_best_forms(jobs, options)
        found = absent | {name: form for name, form in forms.items() if isinstance(form, str)}
        able = {
            name: job._replace(form=forms[name].form if name in forms else {})
            for name, job in jobs.items()
            if name not in found
        }
        return rows_of(taking_part, found | run_rounds(able, options.rounds), options, forms)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    taking_part = chosen(options)
    result = {
        "environment": pages.environment("throughput", arguments, options),
        **{name: getattr(options, name) for name in ("arch", "image_size", "batch", "precision", "rounds", "seconds")},
        "forms": options.forms,
    }
    prefix = pages.prefix_of("throughput", options, result["environment"])
    result["rows"] = measured(taking_part, options)
    body = throughput_page.body(result)
    print(f"\n{body}\n")
    finished = [row for row in result["rows"] if "error" not in row]
    page = pages.page("Throughput", result, throughput_page.notes(result), body)
    pages.write(result, prefix, page, lambda path: pages.bars(path, result, finished))
    print(f"{prefix}.md, .json, .png")
    return 0 if len(finished) == sum(contender.installed for contender in taking_part) else 1


if __name__ == "__main__":
    sys.exit(command_line.run_main(main, sys.argv[1:]))
