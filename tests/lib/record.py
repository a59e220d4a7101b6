# SPDX-License-Identifier: GPL-2.0
"""A workload for a recording by dm-log-writes.

    record.py MANAGED LOG SEED BLOCKS OPERATIONS THREADS OUT

MANAGED is the name of a managed device, LOG that of the dm-log-writes device under it. Threads write, discard and
clear blocks of their own below BLOCKS, sharing extents; some writes are FUA. After an fsync that succeeded, a mark in
the recording says how many operations had been acknowledged before it began. Now and then the device is told
to write a checkpoint, or is suspended. OUT gets the operations in the order in which they were acknowledged:
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
    def __init__(self, managed, log, seed, blocks, threads):
        self.managed, self.log, self.seed, self.blocks, self.threads = managed, log, seed, blocks, threads
        self.values = itertools.count(1)
        self.acknowledged = []
        self.lock = threading.Lock()
        self.flushing = threading.Lock()
        self.suspending = threading.Lock()
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
            # Writes are logged with the first flush that was sent after them, which may be another one (of a checkpoint)
            # that is still under way. With that behind us the log has them all.
            dm_ioctl(self.control, DM_DEV_SUSPEND, self.log, SUSPEND | SKIP_LOCKFS)
            dm_ioctl(self.control, DM_DEV_SUSPEND, self.log)
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
        # What was written or cleared since the last flush. dm-log-writes logs such a change with a flush that comes
        # later, and not always in the order in which flushes were sent; two changes to one block might be logged in the
        # wrong order.
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
            if kind < 0.85:
                if not unflushed.isdisjoint(range(first, first + count)):
                    self.flush(plain)
                    unflushed.clear()
                if kind >= 0.25:
                    unflushed.update(range(first, first + count))
            value = next(self.values)
            if kind < 0.75:
                data = b"".join(stamp(b, value) for b in range(first, first + count))
                os.pwritev(fua if kind < 0.25 else plain, [aligned(data)], first * BLOCK)
                self.done(value, "write", first, count)
            elif kind < 0.85:
                request = rng.choice((BLKDISCARD, BLKZEROOUT))
                fcntl.ioctl(plain, request, struct.pack("<QQ", first * BLOCK, count * BLOCK))
                self.done(value, "clear", first, count)
            elif kind < 0.97:
                self.flush(plain)
                unflushed.clear()
            elif kind < 0.99:
                # While it is suspended there is no checkpoint to be had.
                with self.suspending:
                    message(self.control, self.managed, "checkpoint")
            elif number == 0:
                with self.suspending:
                    dm_ioctl(self.control, DM_DEV_SUSPEND, self.managed, SUSPEND | SKIP_LOCKFS)
                    dm_ioctl(self.control, DM_DEV_SUSPEND, self.managed)
        self.flush(plain)


def main(args):
    if len(args) != 7:
        raise SystemExit(__doc__)
    managed, log, seed, blocks, operations, threads = args[0], args[1], *map(int, args[2:6])
    work = Workload(managed, log, seed, blocks, threads)
    pool = [threading.Thread(target=work.thread, args=(n, operations // threads)) for n in range(threads)]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    if work.failed:
        raise SystemExit(f"record.py: {work.failed!r}")
    with open(args[6], "w", encoding="ascii") as f:
        f.writelines(work.acknowledged)


if __name__ == "__main__":
    main(sys.argv[1:])
