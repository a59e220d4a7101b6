# SPDX-License-Identifier: GPL-2.0
"""A workload for a recording by dm-log-writes.

    record.py MANAGED LOG SEED BLOCKS OPERATIONS THREADS KIND OUT

MANAGED is the name of a managed device, LOG that of the dm-log-writes device under it. Threads write, discard and
clear blocks of their own below BLOCKS, sharing extents. KIND is one of

    churn   the device writes checkpoints by itself; nothing is flushed before the end
    flush   some writes are FUA, and there are flushes; checkpoints come when they are asked for. After a flush a mark in the
            recording ("flushed-<n>") says how many operations had been acknowledged before it began

dm-log-writes logs a write with the first flush that is sent after it, when that flush is done; of two flushes under way
at once the later one may be logged first, without what the other carries. So in either kind there is only one
source of flushes at a time. OUT gets the operations in the order in which they were acknowledged:
"<value> write|clear <first> <count>".
"""

import fcntl
import itertools
import os
import random
import struct
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stomp import BLKDISCARD, BLKZEROOUT, BLOCK, aligned, open_direct, stamp  # noqa: E402

DM_DEV_SUSPEND, DM_TARGET_MSG = 6, 14
SUSPEND = 1 << 1
SKIP_LOCKFS = 1 << 10
# Neighbouring blocks that have the same writer.
OWNED = 8


def dm_ioctl(control, command, name, flags=0, payload=b""):
    """An ioctl of device-mapper (linux/dm-ioctl.h)."""
    size = 312 + len(payload)
    size += -size % 8
    header = struct.pack("<III II I i II I Q 128s 129s 7s", 4, 0, 0, size, 312, 0, 0, flags, 0, 0, 0, name.encode(), b"", b"")
    fcntl.ioctl(control, 3 << 30 | 312 << 16 | 0xFD << 8 | command, bytearray((header + payload).ljust(size, b"\0")))


def message(control, name, text):
    dm_ioctl(control, DM_TARGET_MSG, name, 0, struct.pack("<Q", 0) + text.encode() + b"\0")


class Workload:
    def __init__(self, managed, log, seed, blocks, threads, churn):
        self.managed, self.log, self.seed, self.blocks, self.threads = managed, log, seed, blocks, threads
        self.churn = churn
        self.values = itertools.count(1)
        self.acknowledged = []
        self.lock = threading.Lock()
        # Whoever causes a flush holds this.
        self.flushing = threading.Lock()
        self.control = os.open("/dev/mapper/control", os.O_RDWR)
        self.failed = None

    def done(self, value, kind, first, count):
        with self.lock:
            self.acknowledged.append(f"{value} {kind} {first} {count}\n")

    def flush(self, fd):
        with self.flushing:
            with self.lock:
                count = len(self.acknowledged)
            os.fsync(fd)
            message(self.control, self.log, f"mark flushed-{count}")

    def thread(self, number, operations):
        try:
            self.work(number, operations)
        except BaseException as e:  # pylint: disable=broad-except
            self.failed = e

    def work(self, number, operations):
        rng = random.Random(self.seed * 100 + number)
        plain = open_direct("/dev/mapper/" + self.managed)
        fua = open_direct("/dev/mapper/" + self.managed, os.O_DSYNC)
        groups = self.blocks // OWNED
        # What was written or cleared since the last flush: it is logged later than a FUA write to the same block.
        unflushed = set()
        centre = 0
        for _ in range(operations):
            if rng.random() < 0.15:
                centre = rng.randrange(groups)
            group = min(max(0, centre + rng.randrange(-20, 20)), groups - 1)
            group -= (group - number) % self.threads
            first = max(group, number) * OWNED + rng.randrange(OWNED)
            count = min(rng.choice((1, 1, 2, 8)), OWNED - first % OWNED)
            if self.threads == 1:
                count = min(rng.choice((1, 1, 1, 3, 20)), self.blocks - first)
            kind = rng.random()
            if 0.75 <= kind < 0.85 and self.threads == 1 and rng.random() < 0.2:
                count = min(800, self.blocks - first)
            fua_write = kind < 0.25 and not self.churn
            if not self.churn and kind < 0.85:
                if not unflushed.isdisjoint(range(first, first + count)):
                    self.flush(plain)
                    unflushed.clear()
                if not fua_write:
                    unflushed.update(range(first, first + count))
            value = next(self.values)
            if kind < 0.75:
                data = aligned(b"".join(stamp(b, value) for b in range(first, first + count)))
                if fua_write:
                    with self.flushing:
                        os.pwritev(fua, [data], first * BLOCK)
                else:
                    os.pwritev(plain, [data], first * BLOCK)
                self.done(value, "write", first, count)
            elif kind < 0.85:
                request = rng.choice((BLKDISCARD, BLKZEROOUT))
                fcntl.ioctl(plain, request, struct.pack("<QQ", first * BLOCK, count * BLOCK))
                self.done(value, "clear", first, count)
            elif kind < 0.97:
                if not self.churn:
                    self.flush(plain)
                    unflushed.clear()
            elif kind < 0.99:
                with self.flushing:
                    message(self.control, self.managed, "checkpoint")
            elif number == 0:
                self.suspend_and_resume()

    def suspend_and_resume(self):
        with self.flushing:
            dm_ioctl(self.control, DM_DEV_SUSPEND, self.managed, SUSPEND | SKIP_LOCKFS)
            dm_ioctl(self.control, DM_DEV_SUSPEND, self.managed)

    def finish(self):
        """The last flush, when no checkpoint is due any more."""
        self.suspend_and_resume()
        self.flush(open_direct("/dev/mapper/" + self.managed))


def main(args):
    if len(args) != 8 or args[6] not in ("churn", "flush"):
        raise SystemExit(__doc__)
    managed, log, seed, blocks, operations, threads = args[0], args[1], *map(int, args[2:6])
    work = Workload(managed, log, seed, blocks, threads, args[6] == "churn")
    pool = [threading.Thread(target=work.thread, args=(n, operations // threads)) for n in range(threads)]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    if work.failed:
        raise SystemExit(f"record.py: {work.failed!r}")
    work.finish()
    with open(args[7], "w", encoding="ascii") as f:
        f.writelines(work.acknowledged)


if __name__ == "__main__":
    main(sys.argv[1:])
