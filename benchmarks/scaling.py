"""This benchmark trains two processes together and beside each other: it separates communication from the machine.

    ccmim bench scaling [--arch ...] [--batch 16] [--rounds 9] [--section.key=value ...]

It times whole training steps on this CPU, with gloo over loopback and one thread a process. Each round times one
process alone; two independent processes at the same time (they share cores, caches and memory: this loss is no
communication); and two ranks with DDP. Weak scaling has `--batch` images in each process, strong scaling half of them.
Bytes are counted in the run and compared with benchmarks/cluster.py.
Results: benchmarks/results/scaling-<date>-<device>.md, .json.
"""

import math
import os
import sys
from argparse import Namespace

import cluster
import command_line
import pages
from ranks import Team, config_of
from rounds import over_rounds

from ccmim_fast.errors import ConfigError, MachineError

RANKS = 2
ACCUMULATE = (1, 4)  # micro-batches of the steps whose bytes are counted


def variants(batch: int) -> dict[str, tuple[bool, int, int]]:
    """Return the variants by name: (as ranks of one group or independent, number of processes, images of each)."""
    return {
        "one process": (False, 1, batch),
        "weak: two apart": (False, RANKS, batch),
        "weak: two ranks": (True, RANKS, batch),
        "strong: two apart": (False, RANKS, batch // RANKS),
        "strong: two ranks": (True, RANKS, batch // RANKS),
    }


def measured(apart: Team, together: Team, options: Namespace) -> dict:
    """Return img/s and CPU seconds per image of each variant and round, losses, and seconds of the all-reduce alone."""
    chosen = variants(options.batch)
    for team, _, images in chosen.values():
        (together if team else apart).ask("steps", images, 2)  # the optimizer's state is made, malloc learns its sizes
    count = together.ask("facts")[0]["parameters"]
    together.ask("all_reduce", count)
    found = {"all_reduce_s": [], **{what: {name: [] for name in chosen} for what in ("rates", "cpu_s", "losses")}}
    for turn in range(options.rounds):
        for name, (team, processes, images) in chosen.items():
            answers = (together if team else apart).ask("steps", images, options.steps, only=processes)
            trained = images * options.steps
            rate = sum(trained / seconds for seconds, _, _ in answers)
            found["rates"][name].append(rate)
            found["cpu_s"][name].append(sum(computed for _, computed, _ in answers) / (processes * trained))
            found["losses"][name] += answers[0][2]
            print(f"round {turn + 1}: {name}: {rate:.2f} img/s", flush=True)
        found["all_reduce_s"].append(max(together.ask("all_reduce", count)))
    for name, losses in found["losses"].items():
        if not all(map(math.isfinite, losses)):
            raise MachineError(f"{name}: a loss is not finite")
        found["losses"][name] = [losses[0], losses[-1]]
    return found


def sent(together: Team, batch: int, accumulate: int) -> list[dict]:
    """Return calls and bytes of a step by collective, counted and on paper, for `accumulate` micro-batches."""
    (calls, sizes), *others = together.ask("counted", batch, accumulate)
    if any(other != (calls, sizes) for other in others):
        raise MachineError("ranks sent different amounts")
    facts = together.ask("facts")[0]
    on_paper = {"accumulate": accumulate, "cells": facts["cells"]}
    paper = cluster.traffic(facts["parameters"], facts["width"], batch, RANKS, **on_paper)
    rows = []
    for op in sorted({*calls, *(one.op for one in paper)}):
        parts = [one for one in paper if one.op == op]
        row = {"accumulate": accumulate, "op": op, "what": ", ".join(one.what for one in parts)}
        row |= {"calls": calls.get(op, 0), "bytes": sizes.get(op, 0)}
        rows.append(row | {"paper_bytes": sum(one.size for one in parts)})
    return rows


def rows_of(rates: dict[str, list[float]], cpu_s: dict[str, list[float]]) -> list[dict]:
    """Return each variant's rates and CPU seconds; its share of the ideal, and that of ranks of two processes apart."""
    one, rows = rates["one process"], []
    for name, own in rates.items():
        processes = 1 if name == "one process" else RANKS
        row = {"name": name, "rate": over_rounds(own), "cpu_s": over_rounds(cpu_s[name])}
        row["of_ideal"] = over_rounds([a / (processes * b) for a, b in zip(own, one)])
        apart = rates.get(name.replace("two ranks", "two apart"))
        if name.endswith("two ranks"):
            row["of_apart"] = over_rounds([a / b for a, b in zip(own, apart)])
        rows.append(row)
    return rows


def body(result: dict) -> str:
    batch = result["batch"]
    lines = []
    for row in result["rows"]:
        _, processes, images = variants(batch)[row["name"]]
        of_apart = pages.spread(row["of_apart"], 2) if "of_apart" in row else ""
        first, last = result["losses"][row["name"]]
        lines.append(
            [
                row["name"],
                f"{processes} x {images}",
                pages.spread(row["rate"], 2),
                pages.spread(row["of_ideal"], 2),
                of_apart,
                pages.spread(row["cpu_s"], 3),
                f"{first:.3f} -> {last:.3f}",
            ]
        )
    speed = pages.table(lines, ["", "images", "img/s", "of ideal", "of two apart", "CPU s per image", "loss"])
    volume = [
        [
            f"`{row['op']}`: {row['what']}",
            str(row["accumulate"]),
            str(row["calls"]),
            f"{row['bytes']:,}",
            f"{row['paper_bytes']:,.0f}",
        ]
        for row in result["sent"]
    ]
    header = ["a rank's step", "micro-batches", "calls", "bytes counted", "bytes on paper"]
    return "\n\n".join([speed, pages.table(volume, header)])


def notes(result: dict) -> str:
    alone = pages.spread({key: 1e3 * value for key, value in result["all_reduce"].items() if key != "rounds"}, 0)
    before, after = result["load"]
    return (
        f"{pages.size_of(result)}, {result['environment']['threads']} thread a process, gloo over loopback: whole "
        f"training steps, {result['rounds']} rounds of {result['steps']} in turn; medians, in brackets the least and "
        "the largest round; ratios are taken round by round. `of ideal`: of so many times one process. `two apart` "
        "know nothing of each other: what they lack is cores, caches and memory that they share, and `of two apart` is "
        "what communication leaves. CPU seconds are those of a process's threads, gloo's too, without waiting: other "
        f"work on the machine changes them least. Summing the gradients alone, with nothing beside it: {alone} ms. "
        f"Load of the machine before and at the end: {before:.1f} and {after:.1f} on {os.cpu_count()} cores."
    )


def parse(arguments: list[str]) -> Namespace:
    made = command_line.parser("scaling", __doc__.split("\n")[0])
    made.set_defaults(arch="vit_small_patch16_224", rounds=9, threads=1, device="cpu")
    made.add_argument("--steps", type=int, default=1, help="of a round")
    options = command_line.parse(made, arguments)
    if options.device != "cpu":
        raise ConfigError(f"{made.prog}: --device={options.device}: its processes share a CPU; use --device cpu")
    if options.batch % RANKS or options.batch < 2 * RANKS:
        raise ConfigError(f"{made.prog}: --batch={options.batch}: must be even and at least {2 * RANKS}")
    if options.steps < 1:
        raise ConfigError(f"{made.prog}: --steps={options.steps}: must be at least 1")
    config_of(options, RANKS)  # a mistake is found before any process is started
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    result = {
        "environment": pages.environment("scaling", arguments, options),
        **{name: getattr(options, name) for name in ("arch", "image_size", "batch", "precision", "rounds", "steps")},
    }
    load = os.getloadavg()[0]
    apart, together = (Team(RANKS, options, as_ranks) for as_ranks in (False, True))
    try:
        found = measured(apart, together, options)
        result["sent"] = [row for count in ACCUMULATE for row in sent(together, options.batch, count)]
    finally:
        apart.close()
        together.close()
    result |= {"rows": rows_of(found["rates"], found["cpu_s"]), "all_reduce": over_rounds(found["all_reduce_s"])}
    result |= {"losses": found["losses"], "load": [load, os.getloadavg()[0]]}
    prefix = pages.prefix_of("scaling", options, result["environment"])
    print(f"\n{body(result)}\n")
    pages.write(result, prefix, pages.page("Two processes", result, notes(result), body(result)), lambda path: None)
    print(f"{prefix}.md, .json")
    return 0 if all(row["bytes"] == row["paper_bytes"] for row in result["sent"]) else 1


if __name__ == "__main__":
    sys.exit(command_line.run_main(main, sys.argv[1:]))
