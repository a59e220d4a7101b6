# SPDX-License-Identifier: GPL-2.0
"""Prints the functions in which a job's instructions went: profile-table.py DIRECTORY JOB"""

import base64
import bisect
import collections
import gzip
import os
import re
import sys

LINES = int(os.environ.get("LINES_SHOWN", 60))


def symbols(log):
    """The kernel's symbols as the machine printed them: packed, as to print them is slow."""
    with open(log, errors="replace") as file:
        packed = "".join(match[1] for match in (re.search(r"SYM (\S+)", line) for line in file) if match)
    found = []
    for line in gzip.decompress(base64.b64decode(packed)).decode().splitlines():
        match = re.match(r"([0-9a-f]{16}) [tTwWrR] (\S+)(\s+\[\S+\])?", line)
        if match and int(match[1], 16):
            found.append((int(match[1], 16), short(match[2]) + (match[3] or "").strip()))
    found.sort()
    return [a for a, _ in found], [n for _, n in found]


def short(name):
    """The last parts of a mangled Rust name: each is preceded by its length, and perhaps by a disambiguator."""
    if not name.startswith("_R"):
        return name
    parts, at = [], 0
    name = re.sub(r"Cs[0-9a-zA-Z]+_", "C", name)
    while match := re.compile(r"[A-Z_]*?(?:s[0-9a-zA-Z]*_)?[A-Zp-z_]*?(\d+)_?").search(name, at):
        at = match.end()
        length = int(match[1])
        parts.append(name[at:at + length])
        at += length
    return "::".join(p for p in parts[-3:] if p) or name


def counts(path, addresses, names):
    total = collections.Counter()
    with open(path) as file:
        for line in file:
            address, executed = line.split()
            address = int(address, 16)
            if address < 1 << 63:
                total["(user space)"] += int(executed)
                continue
            total[names[max(bisect.bisect_right(addresses, address) - 1, 0)]] += int(executed)
    return total


def main():
    out, job = sys.argv[1:]
    busy = counts(os.path.join(out, "busy.counts"), *symbols(os.path.join(out, "busy.log")))
    busy.subtract(counts(os.path.join(out, "idle.counts"), *symbols(os.path.join(out, "idle.log"))))
    with open(os.path.join(out, "busy.log")) as file:
        ios = int(re.search(rf"^# ios {job} (\d+)", file.read(), re.M)[1])
    print(f"{job}: {sum(busy.values()) / ios:,.0f} instructions per I/O, by function")
    for name, executed in busy.most_common(LINES):
        print(f"{executed / ios:>12,.1f}  {name}")


main()
