# SPDX-License-Identifier: GPL-2.0
"""IOPS of one and of two CPUs that write to dirty blocks.

    scaling.py guest MODULES ROUNDS    measures; in the guest
    scaling.py table FILE              prints the result
"""

import json
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stacks import MIB, format_pristine, run, sectors  # noqa: E402  (needs the path above)

STACKS = ["raw", "linear", "pristine"]
DISK_MIB = 128
# Each job's part of the device, or the extent that both write to.
PART = 32 * MIB
EXTENT = MIB
SECONDS = 1.5
# name: jobs, bytes of a job, distance of the jobs
JOBS = {
    "own_extents_1": (1, PART, PART),
    "own_extents_2": (2, PART, PART),
    "one_extent_1": (1, EXTENT, 0),
    "one_extent_2": (2, EXTENT, 0),
}


def make_stacks(modules):
    """All stacks side by side, each on a disk of its own, all of what is written allocated and dirty."""
    run("modprobe", "-d", modules, "brd", "rd_nr=4", f"rd_size={DISK_MIB * 1024}")
    length = format_pristine("/dev/ram2", "/dev/ram3")
    run("dmsetup", "create", "linear", "--table", f"0 {sectors('/dev/ram1')} linear /dev/ram1 0")
    run("dmsetup", "create", "pristine", "--table", f"0 {length} pristine /dev/ram2 /dev/ram3")
    devices = {"raw": "/dev/ram0", "linear": "/dev/mapper/linear", "pristine": "/dev/mapper/pristine"}
    for device in devices.values():
        run("dd", "if=/dev/zero", f"of={device}", "bs=1M", f"count={2 * PART // MIB}", "oflag=direct")
    run("dmsetup", "message", "pristine", "0", "checkpoint")
    return devices


def measure(device, name):
    jobs, size, distance = JOBS[name]
    done = run("fio", f"--name={name}", f"--filename={device}", "--direct=1", "--ioengine=psync", "--rw=randwrite",
               "--bs=4k", "--norandommap", f"--size={size}", f"--offset_increment={distance}", f"--numjobs={jobs}",
               "--cpus_allowed=0-1", "--cpus_allowed_policy=split", "--time_based", f"--runtime={SECONDS * 1000:.0f}ms",
               "--ramp_time=200ms", "--group_reporting", "--output-format=json")
    return json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]["write"]["iops"]


def guest(modules, rounds):
    # fio writes its state beside itself.
    os.environ["TMPDIR"] = "/tmp"
    devices = make_stacks(modules)
    found = {stack: {job: [] for job in JOBS} for stack in STACKS}
    for _ in range(rounds):
        for job in JOBS:
            for stack in STACKS:
                found[stack][job].append(measure(devices[stack], job))
                print(f"# {stack} {job} {found[stack][job][-1]:.0f}", flush=True)
    result = {s: {j: round(statistics.median(v)) for j, v in jobs.items()} for s, jobs in found.items()}
    print("BENCH " + json.dumps({**result, "rounds": found}), flush=True)


def table(path):
    with open(path) as file:
        result = json.load(file)
    print("writes to dirty blocks, 4 KiB random, QD1 each: IOPS of 1 and 2 CPUs, and the ratio")
    print(f"{'stack':<12}{'extents of their own':>36}{'one extent':>36}")
    for stack in STACKS:
        row = f"{stack:<12}"
        for kind in ("own_extents", "one_extent"):
            one, two = result[stack][f"{kind}_1"], result[stack][f"{kind}_2"]
            row += f"{f'{one:,} -> {two:,} ({two / one:.2f})':>36}"
        print(row)
    raw = result["raw"]["own_extents_2"] / result["raw"]["own_extents_1"]
    if not 1.7 <= raw <= 2.1:
        print(f"The host was too busy: the memory disk alone scales by {raw:.2f}. These figures show nothing.")
    print("By its code the fast path takes no lock: it reads words of a bitmap (rust/target/tracker.rs, `admit`).")


if __name__ == "__main__":
    if sys.argv[1] == "guest":
        guest(sys.argv[2], int(sys.argv[3]))
    else:
        table(sys.argv[2])
