"""Contenders in turn, once a round, so that whatever slows the machine for a while slows them all."""

import statistics

from measure import Figures, Job, measure


def run_rounds(jobs: dict[str, Job], rounds: int) -> dict[str, list[Figures] | str]:
    """The figures of every round by contender; of one that fails, the line that says why, and no further round."""
    found: dict[str, list[Figures] | str] = {name: [] for name in jobs}
    for turn in range(rounds):
        for name, job in jobs.items():
            if isinstance(found[name], str):
                continue
            figures = measure(job._replace(count=turn == 0))
            if isinstance(figures, str):
                found[name] = figures
                print(f"round {turn + 1}: {name}: {figures}", flush=True)
            else:
                found[name].append(figures)
                print(f"round {turn + 1}: {name}: {figures.images_per_second:.2f} img/s", flush=True)
    return found


def over_rounds(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}
