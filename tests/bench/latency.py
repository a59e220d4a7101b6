# SPDX-License-Identifier: GPL-2.0
"""IOPS of first touches when flushing the metadata device takes a millisecond.

    latency.py guest MODULES ROUNDS    measures; in the guest
    latency.py table FILE              prints the result

The data device is a memory disk. The metadata device (for dm-snapshot: the device that it copies to) is dm-delay
over a null_blk with memory and a volatile cache: without a cache below, the kernel drops flushes before they
reach dm-delay. dm-delay counts in ticks, so its millisecond is what the table's first line says, not less.

dm-delay delays what carries PREFLUSH, and takes a FUA write for an ordinary one. The records of pristine
are FUA writes; lest they be durable at no cost, its device delays all writes, those of checkpoints too. The
peers' devices delay flushes alone.
"""

import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stacks import MIB, format_pristine, run, sectors  # noqa: E402  (needs the path above)

STACKS = ["linear", "era", "snapshot", "pristine"]
DATA_MIB = 512
META_MIB = 1024
SPAN = 64 * MIB
# What the stacks write on the metadata device; dm-snapshot's data goes there too.
FILLED_MIB = 160
DATA, META, DELAYED = "/dev/ram0", "/dev/nullb0", "/dev/mapper/delayed"

# The whole span at depth 32. At depth 1 as many as the instructions are counted for, but for no more than some
# seconds: the slow ones are at their pace at once.
JOBS = {
    "randwrite_4k_first_qd1": ["--ioengine=psync", "--number_ios=2048", "--runtime=4"],
    "randwrite_4k_first_qd32": ["--ioengine=libaio", "--iodepth=32"],
}


def make_disks(modules):
    run("modprobe", "-d", modules, "brd", "rd_nr=1", f"rd_size={DATA_MIB * 1024}")
    run("modprobe", "-d", modules, "null_blk", "nr_devices=1", "memory_backed=1", "cache_size=64", "queue_mode=2",
        "irqmode=0", "submit_queues=2", "bs=4096", f"gb={META_MIB // 1024}")
    # Memory disks allocate at the first write.
    run("dd", "if=/dev/zero", f"of={DATA}", "bs=1M", f"count={SPAN // MIB}", "oflag=direct")
    run("dd", "if=/dev/zero", f"of={META}", "bs=1M", f"count={FILLED_MIB}", "oflag=direct")


def make_stack(stack):
    """Makes the stack on a blank metadata device."""
    run("dd", "if=/dev/zero", f"of={META}", "bs=1M", "count=4", "oflag=direct")
    size = sectors(DATA)
    if stack == "pristine":
        size = format_pristine(DATA, META)
    write = 1 if stack == "pristine" else 0
    run("dmsetup", "create", "delayed", "--table",
        f"0 {sectors(META)} delay {META} 0 0 {META} 0 {write} {META} 0 1")
    table = {
        "linear": f"linear {DATA} 0",
        "era": f"era {DELAYED} {DATA} 8",
        "snapshot": f"snapshot {DATA} {DELAYED} P 8",
        "pristine": f"pristine {DATA} {DELAYED}",
    }[stack]
    run("dmsetup", "create", "bench", "--table", f"0 {size} {table}")


def remove_stack():
    for name in ("bench", "delayed"):
        run("dmsetup", "remove", "--retry", name)


def flush_ms():
    """How long a flush of the delayed device takes."""
    make_stack("linear")
    file = os.open(DELAYED, os.O_RDWR)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        os.fsync(file)
        times.append((time.perf_counter() - begin) * 1e3)
    os.close(file)
    remove_stack()
    return statistics.median(times)


def measure(name, seed):
    done = run("fio", f"--name={name}", "--filename=/dev/mapper/bench", "--direct=1", f"--randseed={seed}",
               "--output-format=json", "--rw=randwrite", "--bs=4k", f"--size={SPAN}", *JOBS[name])
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    return job["write"]["iops"]


def guest(modules, rounds):
    # fio writes its state beside itself.
    os.environ["TMPDIR"] = "/tmp"
    make_disks(modules)
    flush = flush_ms()
    print(f"# a flush takes {flush:.2f} ms", flush=True)
    if flush < 0.5:
        sys.exit("flushes are not delayed")
    found = {stack: {job: [] for job in JOBS} for stack in STACKS}
    for number in range(rounds):
        for job in JOBS:
            for stack in STACKS:
                make_stack(stack)
                found[stack][job].append(measure(job, number + 1))
                print(f"# {stack} {job} {found[stack][job][-1]:.0f}", flush=True)
                remove_stack()
    result = {s: {j: round(statistics.median(v), 1) for j, v in jobs.items()} for s, jobs in found.items()}
    print("BENCH " + json.dumps({**result, "flush_ms": round(flush, 2), "rounds": found}), flush=True)


def table(path):
    with open(path) as file:
        result = json.load(file)
    print(f"first touch, 4 KiB random over 64 MiB; a flush of the metadata device takes {result['flush_ms']} ms")
    print(f"{'IOPS (ratio to dm-linear, to dm-era)':<38}" + "".join(f"{stack:>24}" for stack in STACKS))
    for job in JOBS:
        row = f"{job:<38}"
        for stack in STACKS:
            value = result[stack][job]
            ratios = f"{value / result['linear'][job]:.2f}, {value / result['era'][job]:.1f}"
            row += f"{f'{value:,.0f} ({ratios})':>24}"
        print(row)


if __name__ == "__main__":
    if sys.argv[1] == "guest":
        guest(sys.argv[2], int(sys.argv[3]))
    else:
        table(sys.argv[2])
