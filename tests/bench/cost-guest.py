# SPDX-License-Identifier: GPL-2.0
"""Runs the fio jobs of the cost benchmark on every stack. In the guest: cost-guest.py MODULES [JOB...]

Each stack gets fresh memory disks and a fresh map for each group of jobs, so that "first" is the first touch.
"""

import json
import os
import subprocess
import sys

PRISTINE = "build/userspace/pristine"
MIB = 1 << 20
# The disks are sparse: only what is touched takes memory.
DISK_MIB = 4096
SPAN = 64 * MIB

# name: fio options. The jobs of a group run one after the other on one fresh device.
PSYNC = ["--ioengine=psync"]
AIO = ["--ioengine=libaio", "--iodepth=32"]
GROUPS = [
    [
        ("randwrite_4k_first_qd1", [*PSYNC, "--rw=randwrite", "--bs=4k", f"--size={SPAN}", "--number_ios=2048"]),
        ("randwrite_4k_again_qd1", [*PSYNC, "--rw=randwrite", "--bs=4k", f"--size={SPAN}", "--number_ios=2048"]),
        ("randread_4k_qd1", [*PSYNC, "--rw=randread", "--bs=4k", f"--size={SPAN}", "--number_ios=2048"]),
        ("write_4k_fsync_qd1", [*PSYNC, "--rw=randwrite", "--bs=4k", f"--size={SPAN}", "--number_ios=1024", "--fsync=1"]),
        ("write_64k_first_qd1", [*PSYNC, "--rw=write", "--bs=64k", f"--size={SPAN}"]),
        ("write_64k_qd1", [*PSYNC, "--rw=write", "--bs=64k", f"--size={SPAN}"]),
        ("read_64k_qd1", [*PSYNC, "--rw=read", "--bs=64k", f"--size={SPAN}"]),
        ("write_1m_qd1", [*PSYNC, "--rw=write", "--bs=1m", f"--size={SPAN}"]),
        ("read_1m_qd1", [*PSYNC, "--rw=read", "--bs=1m", f"--size={SPAN}"]),
    ],
    [
        ("randwrite_4k_first_qd32", [*AIO, "--rw=randwrite", "--bs=4k", f"--size={SPAN}", "--number_ios=2048"]),
        ("randwrite_4k_again_qd32", [*AIO, "--rw=randwrite", "--bs=4k", f"--size={SPAN}", "--number_ios=2048"]),
        ("randread_4k_qd32", [*AIO, "--rw=randread", "--bs=4k", f"--size={SPAN}", "--number_ios=2048"]),
        ("write_64k_qd32", [*AIO, "--rw=write", "--bs=64k", f"--size={SPAN}"]),
        ("read_64k_qd32", [*AIO, "--rw=read", "--bs=64k", f"--size={SPAN}"]),
        ("write_1m_qd32", [*AIO, "--rw=write", "--bs=1m", f"--size={SPAN}"]),
        ("read_1m_qd32", [*AIO, "--rw=read", "--bs=1m", f"--size={SPAN}"]),
    ],
    # Each write is the first to its MiB, and there are far more of them than hot extents.
    [("write_4k_cold_qd32", [*AIO, "--rw=write:1020k", "--bs=4k", "--size=3g", "--number_ios=3072"])],
    [("discard_64m_qd1", [*PSYNC, "--rw=trim", "--bs=64m", "--size=1g", "--number_ios=16"])],
]


def run(*command, quiet=False):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and not quiet:
        sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done


def sectors(device):
    return int(run("blockdev", "--getsz", device).stdout)


class Disks:
    """Two memory disks, made anew so that they are all zero: data and metadata (or source)."""

    def __init__(self, modules):
        self.modules = modules

    def __enter__(self):
        run("modprobe", "-d", self.modules, "brd", "rd_nr=3", f"rd_size={DISK_MIB * 1024}")
        return "/dev/ram0", "/dev/ram1", "/dev/ram2"

    def __exit__(self, *_):
        run("dmsetup", "remove", "-f", "bench", quiet=True)
        run("dmsetup", "remove", "-f", "small", quiet=True)
        run("rmmod", "brd")


def make_stack(stack, data, meta, source):
    """Makes the stack; returns the device to write to."""
    size = sectors(data)
    if stack == "raw":
        return data
    if stack == "pristine":
        # A metadata device of the size that is promised, not one with room to spare.
        run("dmsetup", "create", "small", "--table", f"0 {size // 1000 // 8 * 8} linear {meta} 0")
        done = run(PRISTINE, "--json", "device", "format", data, "--metadata", "/dev/mapper/small", "--force")
        length = json.loads(done.stdout)["managed_bytes"] // 512
        table = f"0 {length} pristine {data} /dev/mapper/small"
    elif stack == "linear":
        table = f"0 {size} linear {data} 0"
    elif stack == "era":
        table = f"0 {size} era {meta} {data} 8"
    elif stack == "snapshot":
        table = f"0 {size} snapshot {data} {meta} P 8"
    elif stack == "clone":
        table = f"0 {size} clone {meta} {data} {source} 8 1 no_hydration"
    run("dmsetup", "create", "bench", "--table", table)
    return "/dev/mapper/bench"


def measure(device, name, options):
    done = run(
        "fio", f"--name={name}", f"--filename={device}", "--direct=1", "--randrepeat=1", "--output-format=json",
        *options, quiet=True,
    )
    if done.returncode != 0:
        return None
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    part = next((job[k] for k in ("write", "read", "trim") if job[k]["total_ios"]), None)
    if part is None:
        return None
    if "qd32" in name:
        return round(job["job_runtime"] * 1e6 / part["total_ios"])
    value = part["clat_ns"]["mean"]
    if "fsync" in name:
        value += job["sync"]["lat_ns"]["mean"]
    return round(value)


def main():
    modules, *only = sys.argv[1:]
    # fio writes its state beside itself.
    os.environ["TMPDIR"] = "/tmp"
    result = {}
    for stack in ["raw", "linear", "era", "snapshot", "clone", "pristine"]:
        for group in GROUPS:
            jobs = [job for job in group if not only or job[0] in only]
            if not jobs:
                continue
            with Disks(modules) as disks:
                device = make_stack(stack, *disks)
                for name, options in jobs:
                    value = measure(device, name, options)
                    print(f"# {stack} {name} {value}", flush=True)
                    if value is not None:
                        result.setdefault(stack, {})[name] = value
    print("BENCH " + json.dumps(result), flush=True)


main()
