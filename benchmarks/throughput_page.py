"""What `ccmim bench throughput` writes of its result: the steps, their ratios, and what is to be known of them."""

import pages


def body(result: dict) -> str:
    """The tables in Markdown, and a line for whatever is not as it should be."""
    rows = [row for row in result["rows"] if "error" not in row]
    against = [row["name"] for row in rows if row["measured_against"]]
    header = ["step", "img/s", "peak GB", "GFLOP/img", "design", "MFU", "loss (steps)", "form"]
    parts = [pages.table([_line(row) for row in rows], header)]
    if len(rows) > 1 and against:
        speed = [[row["name"], *(_ratio(row, name) for name in against)] for row in rows]
        memory = [[row["name"], *(_share(row, name) for name in against)] for row in rows]
        parts += ["Speed, as a multiple of that of:", pages.table(speed, ["step", *against])]
        parts += ["Peak memory, as a share of that of:", pages.table(memory, ["step", *against])]
    parts += [f"{row['name']}: {row['error']}" for row in result["rows"] if "error" in row]
    parts += [f"{row['name']}: GFLOP/img are not the design's" for row in rows if row["as_expected"] is False]
    parts += [f"{row['name']}: its loss has not fallen" for row in rows if not row["last_loss"] < row["first_loss"]]
    parts += [f"{row['name']} differs from mae-8: {row['differs']}" for row in rows if row["differs"]]
    parts += [f"{row['name']} was tried in these forms: {tried}" for row in rows if (tried := _tried(row["form"]))]
    return "\n\n".join(parts)


def _line(row: dict) -> list[str]:
    design = ""
    if row["design_gflop_per_image"] is not None:
        mark = "" if row["as_expected"] else " !"
        design = f"{row['design_gflop_per_image']} ({row['deviation']:+.1%}){mark}"
    return [
        row["name"],
        pages.spread(row["images_per_second"], 2),
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['gflop_per_image']:.1f}",
        design,
        f"{row['mfu']:.0%}",
        f"{row['first_loss']:.3f} -> {row['last_loss']:.3f} ({row['steps']})",
        form_of(row),
    ]


def form_of(row: dict) -> str:
    """What a peer got, or which commit of ours it is; empty for the others, and in results of earlier versions."""
    if row.get("commit"):
        return f"commit {row['commit'][:12]}"
    form = (row.get("form") or {}).get("form", {})
    return ", ".join(f"{name} {value}" for name, value in form.items())


def _ratio(row: dict, name: str) -> str:
    return pages.spread(row["ratios"][name], 2) if name in row["ratios"] else ""


def _share(row: dict, name: str) -> str:
    return f"{row['memory_ratios'][name]:.2f}" if name in row["memory_ratios"] else ""


def _tried(form: dict | None) -> str:
    """`weights: fp32 310 ms, bf16 250 ms; not compile=model: ...`."""
    if form is None:
        return ""
    said = [
        f"{name}: " + ", ".join(f"{value} {ms:.0f} ms" for value, ms in times.items())
        for name, times in form["milliseconds"].items()
    ]
    return "; ".join([*said, *(f"not {which}: {why}" for which, why in form["dropped"].items())])


def notes(result: dict) -> str:
    rates = {row["precision"]: row["matmul_tflop_per_s"] for row in result["rows"] if "error" not in row}
    said = ", ".join(f"{rate:.3g} TFLOP/s in {precision}" for precision, rate in rates.items())
    return (
        f"{pages.size_of(result)}: whole training steps on random images, each contender in a process of its own, "
        f"{result['seconds']:g} s over {result['rounds']} interleaved rounds, at least a step in each, warm-up apart; "
        "medians, in brackets the least and the largest round. Ratios are taken round by round. The peers get float "
        "images made beforehand, fused AdamW, and on a CPU memory that is kept from step to step. `form`: what a peer "
        "is fastest with, measured before the rounds. `naive...`: everything of ours off. `peak GB`: memory beyond "
        "that before the model was built. `design`: what the design "
        "counts for the algorithm without any of our switches; ours may be below it, all else is marked with !. "
        f"`MFU`: against the best large matmul of this run, {said}. Losses show that every step learns; those of "
        "different methods are different things."
    )
