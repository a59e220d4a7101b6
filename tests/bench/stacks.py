# SPDX-License-Identifier: GPL-2.0
"""What the benchmarks compare: device-mapper stacks on memory disks."""

import json
import subprocess
import sys

PRISTINE = "build/userspace/pristine"
MIB = 1 << 20
# `pristine_stale` is a device of which most is stale, but not what the jobs use, unless it is their first touch; `pristine_undo`
# keeps the originals of what changes.
STACKS = ["raw", "linear", "era", "snapshot", "clone", "pristine", "pristine_stale", "pristine_undo"]


def run(*command, quiet=False):
    """Runs a command; unless `quiet`, its failure ends the benchmark."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and not quiet:
        sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done


def sectors(device):
    return int(run("blockdev", "--getsz", device).stdout)


class Disks:
    """Three memory disks, made anew so that they are all zero: data, metadata and source."""

    def __init__(self, modules, mib):
        self.modules = modules
        self.mib = mib

    def __enter__(self):
        run("modprobe", "-d", self.modules, "brd", "rd_nr=3", f"rd_size={self.mib * 1024}")
        return "/dev/ram0", "/dev/ram1", "/dev/ram2"

    def __exit__(self, *_):
        for name in ("bench", "small"):
            run("dmsetup", "remove", "-f", name, quiet=True)
        run("rmmod", "brd")


def format_pristine(data, meta, *options):
    """Formats a managed device; returns its size in sectors."""
    done = run(PRISTINE, "--json", "device", "format", data, "--metadata", meta, "--force", *options)
    return json.loads(done.stdout)["managed_bytes"] // 512


def make_stack(stack, data, meta, source, features=()):
    """Makes the stack; returns the device to write to."""
    size = sectors(data)
    if stack == "raw":
        return data
    if stack.startswith("pristine"):
        # A metadata device of the size that is promised, not one with room to spare.
        undo = 256 * MIB if stack == "pristine_undo" else 0
        run("dmsetup", "create", "small", "--table", f"0 {size // 1000 // 8 * 8 + undo // 512} linear {meta} 0")
        options = ["--initial", "stale"] if stack == "pristine_stale" else []
        if undo:
            options = ["--undo", str(undo)]
        length = format_pristine(data, "/dev/mapper/small", *options)
        table = f"0 {length} pristine {data} /dev/mapper/small"
        if features:
            table += f" {len(features)} {' '.join(features)}"
    elif stack == "linear":
        table = f"0 {size} linear {data} 0"
    elif stack == "era":
        table = f"0 {size} era {meta} {data} 8"
    elif stack == "snapshot":
        table = f"0 {size} snapshot {data} {meta} P 8"
    elif stack == "clone":
        table = f"0 {size} clone {meta} {data} {source} 8 1 no_hydration"
    run("dmsetup", "create", "bench", "--table", table)
    if stack == "pristine_stale":
        run("python3", "tests/lib/helper.py", "zero", "/dev/mapper/bench", f"0+{64 * MIB // 4096}")
        # Twice, so that both checkpoint areas have it.
        for _ in range(2):
            run("dmsetup", "message", "bench", "0", "checkpoint")
    return "/dev/mapper/bench"
