"""How the index of a set of images grows: bytes, time to open, memory, time to find a sample, on made rows.

    python benchmarks/index_growth.py [ROWS ...]        # default: 1,281,167 (ImageNet), 10 and 100 million

Rows are made column by column, as long as ImageNet's; 100 million take 10 GB of memory and of disk. The size per row is
what `write_index` gives too (tests/data/test_scan.py). Prints a table for benchmarks/results.
"""

# N rows

import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import pages
import pyarrow as pa

from ccmim_fast.data.index.index_file import SCHEMA, Index, write_table
from ccmim_fast.data.stream.permutation import epoch_order

IMAGENET = 1_281_167
PER_CLASS = 1300
NAME = "n01440764/n01440764_00000000.JPEG"


def made_table(rows: int) -> pa.Table:
    """The columns of so many files, all usable."""
    numbers_N = np.arange(rows)
    names_NC = np.tile(np.frombuffer(NAME.encode(), dtype=np.uint8), (rows, 1))
    for place in range(8):
        names_NC[:, 27 - place] = ord("0") + numbers_N // 10**place % 10
    offsets_N = pa.py_buffer(np.arange(0, (rows + 1) * len(NAME), len(NAME), dtype=np.int64))
    location = pa.Array.from_buffers(pa.large_binary(), rows, [None, offsets_N, pa.py_buffer(names_NC)])
    ones = {"orientation", "plain"}
    columns = []
    for field in SCHEMA:
        if field.name == "location":
            columns.append(location)
        elif field.name == "size":
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(np.tile(np.int32([375, 500]), rows)), 2))
        elif field.name == "mode":
            columns.append(pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.uint8)), pa.array(["RGB"])))
        elif field.name == "reason":
            columns.append(pa.nulls(rows, field.type))
        else:
            value = {"container": -1, "bytes": 110_000}.get(field.name, int(field.name in ones))
            whole = numbers_N // PER_CLASS if field.name == "label" else np.full(rows, value)
            columns.append(pa.array(whole.astype(field.type.to_pandas_dtype())))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def measure(rows: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "index.arrow")
        said = {"root": "", "origin": "", "channels": 3, "containers": [], "watched": {}, "notes": []}
        start = time.perf_counter()
        write_table(path, made_table(rows), {**said, "class_names": [str(c) for c in range(rows // PER_CLASS + 1)]})
        written = time.perf_counter() - start
        size = os.path.getsize(path)
        # In a process of its own: what opening and reading take, without what writing took.
        done = subprocess.run([sys.executable, __file__, "--open", path], capture_output=True, text=True, check=True)
    return [f"{rows:,}", f"{size / 1e6:,.0f}", f"{size / rows:.1f}", f"{written:.1f}", *done.stdout.split()]


def opened(path: str) -> str:
    """Milliseconds to open, resident megabytes that takes, microseconds to find a sample, to tell a place's sample."""
    import gc

    gc.collect()
    before = resident()
    start = time.perf_counter()
    index = Index(path)
    milliseconds = (time.perf_counter() - start) * 1e3
    after = resident()
    numbers = np.random.default_rng(0).integers(0, len(index), 2000)
    start = time.perf_counter()
    for number in numbers.tolist():
        index.location(number), index.sizes_N2[number], index.bytes_N[number]
    found = (time.perf_counter() - start) / len(numbers) * 1e6
    start = time.perf_counter()
    epoch_order(0, 1, len(index), numbers)
    placed = (time.perf_counter() - start) / len(numbers) * 1e6
    return f"{milliseconds:.1f} {after - before:.1f} {found:.1f} {placed:.2f}"


def resident() -> float:
    """Megabytes of this process's memory that no file backs."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1e3


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--open"]:
        print(opened(arguments[1]))
        return 0
    lines = [measure(int(rows.replace("_", ""))) for rows in arguments or [str(IMAGENET), "10000000", "100000000"]]
    header = ["rows", "MB", "bytes a row", "made and written s", "open ms", "memory MB", "find us", "place us"]
    print(pages.table(lines, header))
    print(f"\npeak memory of making them: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
