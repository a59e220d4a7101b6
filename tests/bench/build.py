# SPDX-License-Identifier: GPL-2.0
"""Times `pristine image build`, `casync make` and `zstd` on one disk image.

    build.py PRISTINE IMAGE ROUNDS OUTPUT.json

Each round runs every tool once, in turn, into a fresh directory on the same disk, with the image in the page cache.
"MiB/s" is of the whole image, holes and free blocks included, for every tool. `zstd` and `casync` store what the
file system calls free; `pristine --keep-free` does too.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time


def size_of(path):
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(
        os.path.getsize(os.path.join(root, name))
        for root, _, names in os.walk(path)
        for name in names
    )


def main():
    pristine, image, rounds, output = sys.argv[1:5]
    cores = len(os.sched_getaffinity(0))
    mib = os.path.getsize(image) / 2**20
    build = [pristine, "image", "build", image, "--quiet", "-o"]
    tools = {
        f"zstd -T{cores}": lambda to: ["zstd", "-q", f"-T{cores}", image, "-o", to + "/image.zst"],
        "casync make": lambda to: ["casync", "make", "--store=" + to + "/s.castr", to + "/image.caibx", image],
        "pristine": lambda to: build + [to + "/store"],
        "pristine --level 3": lambda to: build + [to + "/store", "--level", "3"],
        "pristine --keep-free": lambda to: build + [to + "/store", "--keep-free"],
    }
    work = os.path.dirname(output)
    times = {name: [] for name in tools}
    sizes = {}
    again = []
    with open(image, "rb") as file:
        while file.read(1 << 24):
            pass
    for _ in range(int(rounds)):
        for name, command in tools.items():
            with tempfile.TemporaryDirectory(dir=work) as to:
                begin = time.monotonic()
                subprocess.run(command(to), check=True, stdout=subprocess.DEVNULL)
                times[name].append(time.monotonic() - begin)
                sizes[name] = size_of(to)
                if name == "pristine":
                    # The same image once more into the same store: all of it is there.
                    begin = time.monotonic()
                    subprocess.run(command(to), check=True, stdout=subprocess.DEVNULL)
                    again.append(time.monotonic() - begin)
                    assert size_of(to) == sizes[name]
    times["pristine, again"], sizes["pristine, again"] = again, 0
    base = f"zstd -T{cores}"
    zstd = statistics.median(times[base])
    result = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        result[name] = {
            "mib_s": round(mib / median, 1),
            "seconds": round(median, 2),
            "bytes": sizes[name],
            "to_zstd": round(zstd / median, 2),
        }
    with open(output, "w") as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    print(f"{'':<24}{'MiB/s':>9}{'to zstd':>9}{'bytes':>14}")
    for name, row in result.items():
        print(f"{name:<24}{row['mib_s']:>9}{row['to_zstd']:>9}{row['bytes']:>14,}")


if __name__ == "__main__":
    if not shutil.which("casync"):
        sys.exit("casync is missing")
    main()
