# SPDX-License-Identifier: GPL-2.0
"""Everything that one may do with a managed device, at the same time.

    stress.py MANAGED TABLE FIRST BLOCKS SECONDS SEED TOUCHED [SECOND TABLE]

Threads write, clear and read blocks FIRST..FIRST+BLOCKS of the device MANAGED, and know what each must hold, while others suspend
and resume it (also without waiting for its I/O), load tables with other features, ask for checkpoints and use the ioctls of
/dev/pristine. SECOND, with a table line of its own, is created, written to and removed all the while. At the end all
blocks are read back. TOUCHED gets the runs of blocks that were written or cleared; the output is a line of counts.
"""

import collections
import errno
import fcntl
import mmap
import os
import random
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import control  # noqa: E402
from record import (DM_DEV_SUSPEND, NOFLUSH, SKIP_LOCKFS, SUSPEND, dm_ioctl, load_table, message)  # noqa: E402
from stomp import BLKDISCARD, BLKZEROOUT, BLOCK, aligned, open_direct, runs_of, stamp  # noqa: E402

DM_DEV_CREATE, DM_DEV_REMOVE, DM_TABLE_STATUS = 3, 4, 12
STATUS_TABLE = 1 << 4
FEATURES = ("", " 2 hot_extents 16", " 2 checkpoint_ms 0", " 4 hot_extents 16 checkpoint_ms 20",
            " 4 hot_extents 40 checkpoint_ms 100")


class Stress:
    def __init__(self, managed, table, seconds, seed):
        self.managed, self.seed = managed, seed
        # Without its features; they change.
        self.table = " ".join(table.split(" ")[:5])
        self.end = time.monotonic() + seconds
        self.counts = collections.Counter()
        self.failed = []
        self.dm = os.open("/dev/mapper/control", os.O_RDWR)
        self.touched = set()

    def run(self, work, *args):
        """A thread that ends when the time is over or anything went wrong."""
        def body():
            try:
                while time.monotonic() < self.end and not self.failed:
                    next(loop)
            except BaseException as e:  # pylint: disable=broad-except
                self.failed.append(f"{work.__name__}: {e!r}")
                raise
        loop = work(random.Random(f"{self.seed} {work.__name__} {args}"), *args)
        thread = threading.Thread(target=body)
        thread.start()
        return thread

    def blocks(self, rng, first, count, held):
        """Writes, clears and reads, and knows what the blocks hold: `held` has a value for each, 0 for zeros."""
        path = "/dev/mapper/" + self.managed
        plain, durable = open_direct(path), open_direct(path, os.O_DSYNC)
        buffer = mmap.mmap(-1, 16 * BLOCK)
        value = 0
        while True:
            value += 1
            at = rng.randrange(count)
            length = min(rng.choice((1, 1, 2, 3, 16)), count - at)
            kind = rng.random()
            if kind < 0.55:
                data = aligned(b"".join(stamp(first + b, value) for b in range(at, at + length)))
                done = os.pwritev(durable if kind < 0.1 else plain, [data], (first + at) * BLOCK)
                assert done == length * BLOCK, f"short write of {done}"
                self.counts["writes"] += 1
            elif kind < 0.7:
                length = min(rng.choice((1, 5, 60, 600)), count - at)
                request = rng.choice((BLKDISCARD, BLKZEROOUT))
                fcntl.ioctl(plain, request, struct.pack("<QQ", (first + at) * BLOCK, length * BLOCK))
                self.counts["clears"] += 1
            elif kind < 0.75:
                os.fsync(plain)
                self.counts["flushes"] += 1
            else:
                self.verify(plain, buffer, first, at, length, held)
                self.counts["reads"] += 1
            if kind < 0.7:
                for block in range(at, at + length):
                    held[block] = value if kind < 0.55 else 0
            yield

    @staticmethod
    def verify(fd, buffer, first, at, length, held):
        got = os.preadv(fd, [memoryview(buffer)[:length * BLOCK]], (first + at) * BLOCK)
        assert got == length * BLOCK, f"short read of {got}"
        for n in range(length):
            value = held.get(at + n)
            if value is None:
                continue
            want = stamp(first + at + n, value) if value else bytes(BLOCK)
            assert buffer[n * BLOCK:(n + 1) * BLOCK] == want, f"block {first + at + n} has lost what was written ({value})"

    def administer(self, rng):
        """Suspends, reloads, asks for checkpoints and for the status."""
        while True:
            kind = rng.random()
            if kind < 0.5:
                if kind < 0.25:
                    load_table(self.dm, self.managed, self.table + rng.choice(FEATURES))
                    self.counts["reloads"] += 1
                flags = rng.choice((0, SKIP_LOCKFS, NOFLUSH | SKIP_LOCKFS))
                dm_ioctl(self.dm, DM_DEV_SUSPEND, self.managed, SUSPEND | flags)
                time.sleep(rng.choice((0, 0, 0.01)))
                dm_ioctl(self.dm, DM_DEV_SUSPEND, self.managed)
                self.counts["suspends, not flushed" if flags & NOFLUSH else "suspends"] += 1
            elif kind < 0.8:
                message(self.dm, self.managed, "checkpoint")
                self.counts["messages"] += 1
            else:
                flags = rng.choice((0, STATUS_TABLE))
                dm_ioctl(self.dm, DM_TABLE_STATUS, self.managed, flags, bytes(2048))
                self.counts["status"] += 1
            time.sleep(rng.random() * 0.02)
            yield

    def ask(self, rng):
        """Uses the ioctls; a device that is suspended may not be there for them."""
        fd = os.open("/dev/pristine", os.O_RDWR)
        path = "/dev/mapper/" + self.managed
        while True:
            try:
                kind = rng.randrange(4)
                if kind == 0:
                    control.stats(fd, path)
                elif kind == 1:
                    control.plane(fd, path)
                elif kind == 2:
                    fcntl.ioctl(fd, control.CHECKPOINT, bytearray(struct.pack("<IIIIQ", 1, *control.number(path), 0, 0)))
                else:
                    buffer = bytearray(48 * 4)
                    fcntl.ioctl(fd, control.LIST, bytearray(struct.pack("<IIQ", 1, 4, control.address(buffer))))
                self.counts["ioctls"] += 1
            except OSError as e:
                if e.errno != errno.ENODEV:
                    raise
                self.counts["ioctls, not there"] += 1
            time.sleep(rng.random() * 0.01)
            yield

    def come_and_go(self, rng, name, table):
        """Creates a device, writes to it and removes it; what it has counted stays."""
        fd = os.open("/dev/pristine", os.O_RDWR)
        dirty = set()
        while True:
            dm_ioctl(self.dm, DM_DEV_CREATE, name)
            try:
                load_table(self.dm, name, table)
                dm_ioctl(self.dm, DM_DEV_SUSPEND, name)
                path = device_of(name)
                assert control.stats(fd, path)["dirty"] == len(dirty), "the count of dirty blocks has changed while it was away"
                disk = open_direct(path)
                for _ in range(rng.randrange(6)):
                    block = rng.randrange(control.stats(fd, path)["blocks"])
                    os.pwritev(disk, [aligned(stamp(block, 1))], block * BLOCK)
                    dirty.add(block)
                os.close(disk)
            finally:
                remove(self.dm, name)
            self.counts["removals"] += 1
            time.sleep(rng.random() * 0.05)
            yield


def device_of(name):
    """The device node of a device-mapper device."""
    for entry in os.listdir("/sys/block"):
        try:
            with open(f"/sys/block/{entry}/dm/name", encoding="ascii") as f:
                if f.read().strip() == name:
                    return "/dev/" + entry
        except OSError:
            pass
    raise FileNotFoundError(name)


def remove(dm, name):
    for _ in range(100):
        try:
            return dm_ioctl(dm, DM_DEV_REMOVE, name)
        except OSError as e:
            # Somebody looks at it (blkid does, where there is udev).
            if e.errno != errno.EBUSY:
                raise
            time.sleep(0.05)
    raise TimeoutError(f"{name} stays in use")


def main(args):
    if len(args) not in (7, 9):
        raise SystemExit(__doc__)
    managed, table, first, blocks, seconds, seed = args[0], args[1], *map(int, args[2:6])
    stress = Stress(managed, table, seconds, seed)
    half = blocks // 2
    parts = [(first, half, {}), (first + half, blocks - half, {})]
    threads = [stress.run(stress.blocks, *part) for part in parts]
    threads += [stress.run(stress.administer), stress.run(stress.ask)]
    if len(args) == 9:
        threads.append(stress.run(stress.come_and_go, *args[7:]))
    for thread in threads:
        thread.join()
    if stress.failed:
        raise SystemExit("stress.py: " + "; ".join(stress.failed))
    fd, buffer = open_direct("/dev/mapper/" + managed), mmap.mmap(-1, BLOCK)
    for start, _, held in parts:
        for block in held:
            stress.verify(fd, buffer, start, block, 1, held)
    touched = sorted(start + block for start, _, held in parts for block in held)
    with open(args[6], "w", encoding="ascii") as f:
        f.writelines(f"{a} {b}\n" for a, b in runs_of(touched))
    print(", ".join(f"{n} {what}" for what, n in stress.counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
