# SPDX-License-Identifier: GPL-2.0
"""A workload for a recording of what a disk is asked.

    record.py MANAGED MARKS SEED BLOCKS OPERATIONS THREADS MIX TABLE OUT

MANAGED is the name of a managed device with the table line TABLE. Threads write, discard and clear blocks of their own
below BLOCKS, some FUA, some in part, read them, and flush, suspend and ask for checkpoints as MIX says (see MIXES). A mix that
reads or writes in part is for devices with stale blocks: after a reload it waits for the helper. MARKS takes notes of what is durable
from here on: the socket of `pristine-replay disk`, or the name of a dm-log-writes device.

    flushed N    the first N acknowledged operations (a flush that began after them is done)
    durable N    acknowledged operation N, counted from 0 (it was FUA)
    exact        the device is suspended, so the map on disk is exact

dm-log-writes logs a write with the first flush that is sent after it, when that flush is done; of two flushes under way
at once the later one may be logged first, without what the other carries. So with it only mixes without flushes
will do, and one checkpoint at a time. OUT gets the operations in the order in which they were acknowledged:
"<value> write|clear <first sector> <sectors>".
"""

import collections
import fcntl
import itertools
import os
import random
import socket
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stomp import BLKDISCARD, BLKZEROOUT, BLOCK, aligned, open_direct, stamp  # noqa: E402

DM_DEV_SUSPEND, DM_TABLE_LOAD, DM_TARGET_MSG = 6, 9, 14
SUSPEND, SKIP_LOCKFS, NOFLUSH = 1 << 1, 1 << 10, 1 << 11
# rust/shared/abi.rs
FETCH_STATS = 3 << 30 | 96 << 16 | 0xB9 << 8 | 5
SECTOR = 512
SECTORS = BLOCK // SECTOR
# Neighbouring blocks that have the same writer, unless each thread has a zone.
OWNED = 8

# Shares of what an operation is; how often the place is left for another; sizes of writes and of clears in blocks;
# whether each thread has a zone of its own, and goes through it in order. Then, as shares too, writes of parts of blocks, and
# reads.
Mix = collections.namedtuple("Mix", "write fua clear flush checkpoint suspend jump writes clears zones order part read",
                             defaults=(0, 0))
KINDS = "write fua clear flush checkpoint suspend part read".split()
MIXES = {
    "random": Mix(70, 8, 10, 10, 1, 1, 0.15, (1, 1, 2, 8), (1, 2, 8), False, False),
    "sequential": Mix(90, 2, 2, 5, 1, 0, 0.02, (4, 16, 64), (16, 64), True, True),
    "discard": Mix(35, 3, 50, 9, 2, 1, 0.3, (1, 2, 20), (1, 9, 90, 700), True, False),
    "fsync": Mix(30, 30, 5, 34, 1, 0, 0.1, (1, 1, 2), (1, 8), False, False),
    "suspend": Mix(65, 5, 10, 8, 2, 10, 0.2, (1, 2, 8), (1, 8), False, False),
    "checkpoint": Mix(60, 5, 8, 7, 20, 0, 0.2, (1, 2, 8), (1, 8), False, False),
    "churn": Mix(80, 4, 10, 5, 0, 1, 0.9, (1, 1, 2), (1, 8), False, False),
    # Nothing but checkpoints flushes.
    "quiet": Mix(84, 0, 10, 0, 3, 3, 0.15, (1, 1, 2, 8), (1, 2, 8), False, False),
    # For devices with stale blocks.
    "stale": Mix(22, 5, 6, 12, 4, 2, 0.5, (1, 1, 2, 8), (1, 2, 8), False, False, 30, 22),
    "stale-read": Mix(8, 3, 3, 6, 10, 0, 0.8, (1, 1, 2), (1, 2), False, False, 32, 38),
    "stale-checkpoint": Mix(18, 3, 5, 5, 14, 0, 0.6, (1, 2, 8), (1, 8), False, False, 27, 32),
    "stale-suspend": Mix(24, 5, 6, 8, 3, 8, 0.5, (1, 1, 2), (1, 8), False, False, 30, 20),
}


def dm_ioctl(control, command, name, flags=0, payload=b"", targets=0):
    """An ioctl of device-mapper (linux/dm-ioctl.h)."""
    size = 312 + len(payload)
    size += -size % 8
    header = struct.pack("<III II I i II I Q 128s 129s 7s", 4, 0, 0, size, 312, targets, 0, flags, 0, 0, 0,
                         name.encode(), b"", b"")
    fcntl.ioctl(control, 3 << 30 | 312 << 16 | 0xFD << 8 | command, bytearray((header + payload).ljust(size, b"\0")))


def message(control, name, text):
    dm_ioctl(control, DM_TARGET_MSG, name, 0, struct.pack("<Q", 0) + text.encode() + b"\0")


def load_table(control, name, line):
    """Loads a table of one target: "<start> <length> <type> <parameters>"."""
    start, length, kind, parameters = line.split(" ", 3)
    spec = struct.pack("<QQiI16s", int(start), int(length), 0, 0, kind.encode())
    dm_ioctl(control, DM_TABLE_LOAD, name, 0, spec + parameters.encode() + b"\0" * 8, targets=1)


class Marks:
    """Takes notes in the recording."""

    def __init__(self, where, control):
        self.where, self.control, self.socket = where, control, None
        if where.startswith("/"):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.socket.connect(where)

    def note(self, word, number=0):
        if self.socket:
            self.socket.send(f"{word} {number}".encode())
        else:
            message(self.control, self.where, f"mark {word}-{number}")


class Workload:
    def __init__(self, managed, marks, seed, blocks, threads, mix, table):
        self.managed, self.seed, self.blocks, self.threads, self.table = managed, seed, blocks, threads, table
        self.mix = MIXES[mix]
        self.values = itertools.count(1)
        self.acknowledged = []
        self.lock = threading.Lock()
        # Whoever suspends the device or has a checkpoint written holds this.
        self.administering = threading.Lock()
        self.control = os.open("/dev/mapper/control", os.O_RDWR)
        self.marks = Marks(marks, self.control)
        self.failed = None

    def done(self, value, kind, first, count):
        """Sectors."""
        with self.lock:
            self.acknowledged.append(f"{value} {kind} {first} {count}\n")
            return len(self.acknowledged) - 1

    def write(self, fd, first, count, fua):
        """Writes these sectors."""
        value = next(self.values)
        end = first + count
        blocks = range(first // SECTORS, -(-end // SECTORS))
        data = b"".join(stamp(b, value) for b in blocks)
        start = first % SECTORS * SECTOR
        data = data[start:start + count * SECTOR]
        written = os.pwritev(fd, [aligned(data)], first * SECTOR)
        assert written == count * SECTOR, written
        place = self.done(value, "write", first, count)
        if fua:
            self.marks.note("durable", place)

    def clear(self, fd, request, first, count):
        """Discards or zeroes these sectors."""
        value = next(self.values)
        fcntl.ioctl(fd, request, struct.pack("<QQ", first * SECTOR, count * SECTOR))
        self.done(value, "clear", first, count)

    def flush(self, fd):
        with self.lock:
            count = len(self.acknowledged)
        os.fsync(fd)
        self.marks.note("flushed", count)

    def thread(self, number, operations):
        try:
            self.work(number, operations)
        except BaseException as e:  # pylint: disable=broad-except
            self.failed = e

    def places(self, rng, number):
        """Where one may write next, and how many blocks; for ever."""
        zone = self.blocks // self.threads
        groups = self.blocks // OWNED
        at = centre = 0
        size = 0
        while True:
            away = rng.random() < self.mix.jump
            if self.mix.zones:
                if self.mix.order and not away:
                    at = (at + size) % zone
                else:
                    at = rng.randrange(zone)
                size = yield number * zone + at, zone - at
            else:
                if away:
                    centre = rng.randrange(groups)
                group = min(max(0, centre + rng.randrange(-20, 20)), groups - 1)
                group -= (group - number) % self.threads
                first = max(group, number) * OWNED + rng.randrange(OWNED)
                size = yield first, OWNED - first % OWNED

    def work(self, number, operations):
        rng = random.Random(self.seed * 100 + number)
        plain = open_direct("/dev/mapper/" + self.managed)
        fua = open_direct("/dev/mapper/" + self.managed, os.O_DSYNC)
        mix = self.mix
        shares = [getattr(mix, kind) for kind in KINDS]
        read = collections.deque(maxlen=2)
        places = self.places(rng, number)
        first, room = next(places)
        for _ in range(operations):
            kind, = rng.choices(KINDS, shares)
            if kind in ("write", "fua", "clear"):
                count = min(rng.choice(mix.clears if kind == "clear" else mix.writes), room)
                if kind == "clear":
                    request = rng.choice((BLKDISCARD, BLKZEROOUT))
                    self.clear(plain, request, first * SECTORS, count * SECTORS)
                else:
                    is_fua = kind == "fua"
                    self.write(fua if is_fua else plain, first * SECTORS, count * SECTORS, is_fua)
                first, room = places.send(count)
            elif kind in ("part", "read"):
                skip = rng.randrange(SECTORS)
                count = min(rng.choice((1, 1, 2, 7, 8, 13, 24)), room * SECTORS - skip)
                at = first * SECTORS + skip
                how = rng.random()
                # What was read is often written to a little later, when a checkpoint may have ended in between.
                moves = True
                if kind == "part" and read and rng.random() < 0.6:
                    at, count = read.popleft()
                    moves = False
                if kind == "read":
                    os.preadv(plain, [aligned(bytes(count * SECTOR))], at * SECTOR)
                    read.append((at, count))
                elif how < 0.15:
                    self.clear(plain, BLKZEROOUT, at, count)
                else:
                    self.write(fua if how < 0.45 else plain, at, count, how < 0.45)
                if moves:
                    first, room = places.send(-(-(skip + count) // SECTORS))
            elif kind == "flush":
                self.flush(plain)
            elif kind == "checkpoint":
                with self.administering:
                    message(self.control, self.managed, "checkpoint")
            else:
                self.suspend_and_resume(rng)

    def suspend_and_resume(self, rng):
        with self.administering:
            reload = rng.random() < 0.4
            if reload:
                load_table(self.control, self.managed, self.table)
            flags = SUSPEND | rng.choice((0, SKIP_LOCKFS, SKIP_LOCKFS, SKIP_LOCKFS | NOFLUSH))
            dm_ioctl(self.control, DM_DEV_SUSPEND, self.managed, flags)
            self.marks.note("exact")
            dm_ioctl(self.control, DM_DEV_SUSPEND, self.managed)
            if reload and self.mix.read:
                self.wait_for_helper()

    def wait_for_helper(self):
        """The helper of the table before is not that of the new one. Without any, the next suspension fails what waits."""
        rdev = os.stat("/dev/mapper/" + self.managed).st_rdev
        control = os.open("/dev/pristine", os.O_RDWR)
        stats = bytearray(struct.pack("<IIII80x", 1, os.major(rdev), os.minor(rdev), 0))
        end = time.monotonic() + 20
        try:
            while time.monotonic() < end:
                fcntl.ioctl(control, FETCH_STATS, stats)
                attached, stale = struct.unpack_from("<IQ", stats, 12)
                if attached or not stale:
                    return
                time.sleep(0.02)
        finally:
            os.close(control)
        raise RuntimeError("no helper came")

    def finish(self):
        """The last flush, when no checkpoint is due any more."""
        self.suspend_and_resume(random.Random(0))
        self.flush(open_direct("/dev/mapper/" + self.managed))


def main(args):
    if len(args) != 9 or args[6] not in MIXES:
        raise SystemExit(__doc__)
    managed, marks, seed, blocks, operations, threads = args[0], args[1], *map(int, args[2:6])
    work = Workload(managed, marks, seed, blocks, threads, args[6], args[7])
    pool = [threading.Thread(target=work.thread, args=(n, operations // threads)) for n in range(threads)]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    if work.failed:
        raise SystemExit(f"record.py: {work.failed!r}")
    work.finish()
    with open(args[8], "w", encoding="ascii") as f:
        f.writelines(work.acknowledged)


if __name__ == "__main__":
    main(sys.argv[1:])
