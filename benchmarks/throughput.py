"""Training steps of ours and of others, side by side in one run: images per second, memory, arithmetic, loss.

    ccmim bench throughput [--only NAME ...] [--peer FILE.py:FUNCTION ...] [--section.key=value ...]

Each contender runs in a process of its own, one at a time, in rounds: all of them once, then all of them again. All
have the same batch of random uint8 images on the device, and torch's fused AdamW. A ratio is taken round by round.
Writes benchmarks/results/throughput-<date>-<device>-<precision>.json, .md and .png.

A peer is any function `build(arch, images_BHWC, precision)`, to be given as --peer path.py:build:
    arch: timm's name of the encoder, such as "vit_base_patch16_224".
    images_BHWC: [B, H, W, 3] uint8, on the device to be used. What the peer's own loader would make of them (float,
        normalised, channels first) may be made here: it is not timed.
    precision: "fp32", "bf16" or "fp16"; autocast and loss scaling are the peer's.
It returns a function without arguments that takes one whole training step on all of these images (forward, backward,
optimizer, gradients zeroed), does not wait for the device, and returns the loss, a detached scalar tensor. The file's
folder is on the import path; its imports come before memory is measured. Examples: benchmarks/peers/.
"""

import sys
from argparse import Namespace
from pathlib import Path

import command_line
import pages
from contenders import CONTENDERS, EXPECTED, Contender, as_expected
from measure import Figures
from rounds import over_rounds, run_rounds

from ccmim_fast.config.keys import nearest
from ccmim_fast.errors import ConfigError, MachineError


def parse(arguments: list[str]) -> Namespace:
    made = command_line.parser("throughput", __doc__.split("\n")[0])
    made.add_argument("--only", nargs="+", metavar="NAME", default=[], help=f"of {', '.join(CONTENDERS)}")
    made.add_argument("--peer", action="append", default=[], metavar="FILE.py:FUNCTION", help="see the script's head")
    made.add_argument("--seconds", type=float, default=30.0, help="measured per contender, over all rounds")
    return command_line.parse(made, arguments)


def chosen(options: Namespace) -> list[Contender]:
    """Who takes part, in the order asked for; who is not installed is left out with a line, unless asked for by name.

    Raises:
        ConfigError: no such contender, or no such file.
        MachineError: one that was asked for is not installed.
    """
    for name in options.only:
        if name not in CONTENDERS:
            raise ConfigError(f"--only {name}: no such contender; nearest: {nearest(name, CONTENDERS)}")
    wanted = [CONTENDERS[name] for name in options.only] if options.only or options.peer else list(CONTENDERS.values())
    # Its own precision is why it is there: where all have it, it is another's double.
    wanted = [c for c in wanted if c.name in options.only or c.precision != options.precision]
    for contender in wanted:
        if not contender.installed:
            line = f"{contender.name}: not installed; {contender.install}"
            if contender.name in options.only:
                raise MachineError(line)
            print(line)
    found = [c for c in wanted if c.installed] + [outside(where) for where in options.peer]
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


def row_of(contender: Contender, rounds: list[Figures], options: Namespace, peak_flops: float) -> dict:
    """One row of the result, without its ratios."""
    rate = over_rounds([figures.images_per_second for figures in rounds])
    flops = rounds[0].flops_per_image
    design = EXPECTED.get(contender.name, {}).get(options.arch)
    # The design's figures are for 224 pixels, and for the presets as they are.
    if design is not None and (options.image_size != 224 or (options.settings and not contender.peer)):
        design = None
    deviation = None if design is None else flops / 1e9 / design - 1
    return {
        "name": contender.name,
        "ours": not contender.measured_against,
        "precision": contender.precision or options.precision,
        "settings": contender.settings + options.settings if not contender.peer else [],
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


def rows_of(taking_part: list[Contender], found: dict[str, list[Figures] | str], options: Namespace) -> list[dict]:
    """All rows, each with its ratio to every peer that finished, and to the naive step."""
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
        row["ratios"] = {
            peer.name: over_rounds([a.images_per_second / b.images_per_second for a, b in zip(own, found[peer.name])])
            for peer in finished
            if peer.measured_against and peer is not contender
        }
        rows.append(row)
    return rows


def body(result: dict) -> str:
    """The table in Markdown."""
    measured = [row for row in result["rows"] if "error" not in row]
    against = [row["name"] for row in measured if any(row["name"] in other["ratios"] for other in measured)]
    header = ["step", "img/s", "peak GB", "GFLOP/img", "design", "MFU", *(f"x {n}" for n in against), "loss (steps)"]
    lines = [pages.table([_line(row, against) for row in measured], header)]
    lines += [f"{row['name']}: {row['error']}" for row in result["rows"] if "error" in row]
    lines += [f"{r['name']}: GFLOP/img are not the design's" for r in measured if r["as_expected"] is False]
    return "\n\n".join(lines)


def _line(row: dict, against: list[str]) -> list[str]:
    design = ""
    if row["design_gflop_per_image"] is not None:
        mark = "" if row["as_expected"] else " !"
        design = f"{row['design_gflop_per_image']} ({row['deviation']:+.1%}){mark}"
    ratios = [pages.spread(row["ratios"][name], 2) if name in row["ratios"] else "" for name in against]
    return [
        row["name"],
        pages.spread(row["images_per_second"], 2),
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['gflop_per_image']:.1f}",
        design,
        f"{row['mfu']:.0%}",
        *ratios,
        f"{row['first_loss']:.3f} -> {row['last_loss']:.3f} ({row['steps']})",
    ]


def notes(result: dict) -> str:
    rates = {row["precision"]: row["matmul_tflop_per_s"] for row in result["rows"] if "error" not in row}
    said = ", ".join(f"{rate:.3g} TFLOP/s in {precision}" for precision, rate in rates.items())
    return (
        f"{pages.size_of(result)}: whole training steps on random images, each contender in a process of its own, "
        f"{result['seconds']:g} s over {result['rounds']} interleaved rounds, at least a step in each, warm-up apart; "
        "medians, in brackets the least and the largest round. Ratios are taken round by round. The peers get float "
        "images made beforehand. `peak GB`: memory beyond that before the model was built. `design`: what the design "
        "counts for the algorithm without any of our switches; ours may be below it, all else is marked with !. "
        f"`MFU`: against the best large matmul of this run, {said}. Losses show that every step learns; those of "
        "different methods are different things."
    )


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    taking_part = chosen(options)
    seconds = options.seconds / options.rounds
    jobs = {c.name: command_line.job_of(c, options, seconds=seconds) for c in taking_part}
    result = {
        "environment": pages.environment("throughput", arguments, options),
        **{name: getattr(options, name) for name in ("arch", "image_size", "batch", "precision", "rounds", "seconds")},
    }
    prefix = pages.prefix_of("throughput", options, result["environment"])
    result["rows"] = rows_of(taking_part, run_rounds(jobs, options.rounds), options)
    print(f"\n{body(result)}\n")
    page = pages.page("Throughput", result, notes(result), body(result))
    measured = [row for row in result["rows"] if "error" not in row]
    pages.write(result, prefix, page, lambda path: pages.bars(path, result, measured))
    print(f"{prefix}.md, .json, .png")
    return 0 if len(measured) == len(result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(command_line.run_main(main, sys.argv[1:]))
