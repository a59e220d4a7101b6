# SPDX-License-Identifier: GPL-2.0
"""Runs the fio jobs of the cost benchmark on every stack. In the guest: cost-guest.py MODULES [-s STACK,...] [JOB...]

Each stack gets a fresh map for each group of jobs, so that "first" is the first touch. The memory disks are
filled beforehand where the jobs write: a memory disk allocates a page at its first write, which would otherwise
count for more than what is to be measured.
"""

import json
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stacks import MIB, STACKS, Disks, make_stack, run  # noqa: E402  (needs the path above)

# The disks are sparse: only what is touched takes memory.
DISK_MIB = 16384
SPAN = 64 * MIB
COLD = 15360
# fio's own random order visits some places twice.
SHUFFLED = "/tmp/shuffled.iolog"

PSYNC = ["--ioengine=psync"]
# Without the clock calls for latencies, which are not used at this depth.
AIO = ["--ioengine=libaio", "--iodepth=32", "--gtod_reduce=1"]
RANDOM = f"--size={SPAN}"
# At depth 32 the figure is the time of the whole job, known to a millisecond: these last long enough for 0.3 %.
MANY = [RANDOM, "--io_size=256m", "--norandommap"]
LONG = [RANDOM, "--io_size=1g"]


def sized(size, first):
    """Writes and reads of one size at both depths."""
    name = "1m" if size == MIB else f"{size // 1024}k"
    write, read = (f"--rw={way}" for way in ("write", "read"))
    bs = f"--bs={size}"
    jobs = [(f"write_{name}_first_qd1", [*PSYNC, write, bs, RANDOM])] if first else []
    return jobs + [
        (f"write_{name}_qd1", [*PSYNC, write, bs, RANDOM]),
        (f"read_{name}_qd1", [*PSYNC, read, bs, RANDOM]),
        (f"write_{name}_qd32", [*AIO, write, bs, *LONG]),
        (f"read_{name}_qd32", [*AIO, read, bs, *LONG]),
    ]


# name: fio options. The jobs of a group run one after the other on one fresh device.
GROUPS = [
    [
        ("randwrite_4k_first_qd1", [*PSYNC, "--rw=randwrite", "--bs=4k", RANDOM, "--number_ios=2048"]),
        ("randwrite_4k_again_qd1", [*PSYNC, "--rw=randwrite", "--bs=4k", RANDOM, "--number_ios=2048"]),
        ("randread_4k_qd1", [*PSYNC, "--rw=randread", "--bs=4k", RANDOM, "--number_ios=2048"]),
        ("write_4k_fsync_qd1", [*PSYNC, "--rw=randwrite", "--bs=4k", RANDOM, "--number_ios=1024", "--fsync=1"]),
    ],
    [
        ("randwrite_4k_first_qd32", [*AIO, "--rw=randwrite", "--bs=4k", RANDOM]),
        ("randwrite_4k_again_qd32", [*AIO, "--rw=randwrite", "--bs=4k", *MANY]),
        ("randread_4k_qd32", [*AIO, "--rw=randread", "--bs=4k", *MANY]),
        ("write_4k_fsync_qd32", [*AIO, "--rw=randwrite", "--bs=4k", RANDOM, "--fsync=1"]),
    ],
    sized(64 * 1024, True),
    sized(MIB, True),
    # Each write is the first to its MiB, and there are far more of them than hot extents.
    [("write_4k_cold_qd32", [*AIO, "--rw=write:1020k", "--bs=4k", f"--size={COLD}m"])],
    [("randwrite_4k_cold_qd32", [*AIO, f"--read_iolog={SHUFFLED}", "--bs=4k"])],
    # fio's asynchronous engines do not discard.
    [("discard_64m_qd1", [*PSYNC, "--rw=trim", "--bs=64m", f"--size={SPAN}", "--io_size=1g"])],
]


def shuffle(device):
    """Writes the list of one write to each of the first MiBs, in an order without order, for fio to replay."""
    places = list(range(COLD))
    random.Random(1).shuffle(places)
    with open(SHUFFLED, "w", encoding="ascii") as file:
        file.write(f"fio version 2 iolog\n{device} add\n{device} open\n")
        file.writelines(f"{device} write {place * MIB} 4096\n" for place in places)
        file.write(f"{device} close\n")


def fill(data, group):
    """Lets the memory disk allocate what the jobs of a group write.

    The last page too: the tree that holds the pages is as deep for all stacks then, whichever write there.
    """
    run("dd", "if=/dev/zero", f"of={data}", "bs=4k", "count=1", f"seek={DISK_MIB * 256 - 1}", "oflag=direct")
    if "cold" in group[0][0]:
        command = ["--rw=write:1020k", "--bs=4k", f"--size={COLD}m"]
    else:
        command = ["--rw=write", "--bs=1m", RANDOM]
    run("fio", "--name=fill", f"--filename={data}", "--direct=1", "--ioengine=psync", *command)


def measure(device, name, options):
    """Instructions per I/O, or None where the stack cannot do the job."""
    done = run("fio", f"--name={name}", f"--filename={device}", "--direct=1", "--randrepeat=1", "--output-format=json",
               *options, quiet=True)
    if done.returncode != 0:
        return None
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    part = next((job[k] for k in ("write", "read", "trim") if job[k]["total_ios"]), None)
    if part is None or job["error"]:
        return None
    print(f"# ios {name} {part['total_ios']}", flush=True)
    if "qd32" in name:
        return round(job["job_runtime"] * 1e6 / part["total_ios"])
    value = part["clat_ns"]["mean"]
    if "fsync" in name:
        value += job["sync"]["lat_ns"]["mean"]
    return round(value)


def main():
    modules, *only = sys.argv[1:]
    chosen = STACKS
    if only[:1] == ["-s"]:
        chosen, only = only[1].split(","), only[2:]
    # fio writes its state beside itself.
    os.environ["TMPDIR"] = "/tmp"
    result = {}
    for stack in chosen:
        for group in GROUPS:
            jobs = [job for job in group if not only or job[0] in only]
            if not jobs:
                continue
            with Disks(modules, DISK_MIB) as (data, meta, source):
                fill(data, group)
                device = make_stack(stack, data, meta, source)
                shuffle(device)
                # For tests/bench/profile, which wants to know what is not the job's.
                for name, options in [] if os.environ.get("BENCH_SETUP_ONLY") else jobs:
                    value = measure(device, name, options)
                    print(f"# {stack} {name} {value}", flush=True)
                    if value is not None:
                        result.setdefault(stack, {})[name] = value
    print("BENCH " + json.dumps(result), flush=True)


main()
