# SPDX-License-Identifier: GPL-2.0
"""Writes to block devices in ways that other tools cannot, and compares what came of it.

    stomp.py write DEVICE FIRST[+COUNT]...        the blocks get a stamp of their own, with direct I/O
    stomp.py sectors DEVICE FIRST[+COUNT]...      the same for sectors of 512 bytes
    stomp.py sync DEVICE                          fsync
    stomp.py nowait DEVICE BLOCK                  writes with RWF_NOWAIT; prints ok or the name of the error
    stomp.py atomic DEVICE BLOCK COUNT            writes the blocks with RWF_ATOMIC; prints ok or the name of the error
    stomp.py differ FILE FILE                     prints the runs of blocks ("first end") that differ
    stomp.py missing RUNS RUNS                    prints the runs of the first list that are not in the second
    stomp.py count RUNS                           prints how many blocks the list holds
    stomp.py restore MASTER DEVICE RUNS           copies the blocks in the list from the file MASTER
    stomp.py load DEVICE SEED BLOCKS LOG          random writes, discards and flushes until it is killed; LOG gets
                                                  a line for each operation that was acknowledged
    stomp.py uevents SECONDS REGEX                waits for a kernel uevent that matches; prints it

A block has 4096 bytes. Lists of runs are files with lines "first end".
"""

import errno
import mmap
import os
import random
import re
import socket
import struct
import sys
import time

BLOCK = 4096
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
RWF_ATOMIC = 0x40


def stamp(block, value):
    """Content that tells its place and its version in each of its sectors."""
    return b"".join(struct.pack("<QQQQ", block, value, sector, 0x5052495354494E45) * 16 for sector in range(8))


def aligned(data):
    """Memory that direct I/O accepts."""
    buffer = mmap.mmap(-1, max(len(data), 1))
    buffer.write(data)
    return buffer


def open_direct(path, flags=0):
    return os.open(path, os.O_RDWR | os.O_DIRECT | flags)


def write(path, places, unit=BLOCK):
    fd = open_direct(path)
    for place in places:
        first, _, count = place.partition("+")
        first, count = int(first), int(count or 1)
        if unit == BLOCK:
            data = b"".join(stamp(b, 1) for b in range(first, first + count))
        else:
            data = (b"sector %020d\n" % first * 20)[:unit] * count
        if os.pwritev(fd, [aligned(data)], first * unit) != len(data):
            raise SystemExit("stomp.py: short write")
    os.close(fd)


def flagged(path, first, count, flag):
    fd = open_direct(path)
    data = b"".join(stamp(block, 9) for block in range(first, first + count))
    try:
        os.pwritev(fd, [aligned(data)], first * BLOCK, flag)
        print("ok")
    except OSError as e:
        print(errno.errorcode[e.errno])


def runs_of(blocks):
    """Runs [first, end) of a sorted sequence of blocks."""
    runs = []
    for b in blocks:
        if runs and runs[-1][1] == b:
            runs[-1][1] = b + 1
        else:
            runs.append([b, b + 1])
    return runs


def read_runs(path):
    with open(path, encoding="ascii") as f:
        return {b for line in f if line.strip() for b in range(*map(int, line.split()))}


def show(blocks):
    for first, end in runs_of(sorted(blocks)):
        print(first, end)


def differ(one, other):
    blocks = []
    with open(one, "rb") as a, open(other, "rb") as b:
        at = 0
        while True:
            x, y = a.read(64 * BLOCK), b.read(64 * BLOCK)
            if not x or not y:
                break
            if x != y:
                blocks += [at + i for i in range(64) if x[i * BLOCK:(i + 1) * BLOCK] != y[i * BLOCK:(i + 1) * BLOCK]]
            at += 64
    show(blocks)


def restore(master, device, path):
    fd = open_direct(device)
    with open(master, "rb") as source:
        for first, end in runs_of(sorted(read_runs(path))):
            source.seek(first * BLOCK)
            data = source.read((end - first) * BLOCK)
            if os.pwritev(fd, [aligned(data)], first * BLOCK) != len(data):
                raise SystemExit("stomp.py: short write")
    os.fsync(fd)


def load(path, seed, blocks, log):
    """Operations in clusters, so that extents get hot, are used again and get cold."""
    import fcntl
    rng = random.Random(seed)
    fd = open_direct(path)
    out = open(log, "w", encoding="ascii", buffering=1)
    value = 0
    while True:
        centre = rng.randrange(blocks)
        for _ in range(rng.randrange(1, 12)):
            value += 1
            first = min(max(0, centre + rng.randrange(-40, 40)), blocks - 1)
            count = min(rng.choice((1, 1, 1, 2, 5, 17)), blocks - first)
            kind = rng.random()
            if kind < 0.8:
                data = b"".join(stamp(b, value) for b in range(first, first + count))
                os.pwritev(fd, [aligned(data)], first * BLOCK)
                out.write(f"{value} write {first} {count}\n")
            elif kind < 0.9:
                count = min(rng.choice((3, 90, 700)), blocks - first)
                fcntl.ioctl(fd, rng.choice((BLKDISCARD, BLKZEROOUT)), struct.pack("<QQ", first * BLOCK, count * BLOCK))
                out.write(f"{value} clear {first} {count}\n")
            else:
                os.fsync(fd)
                out.write(f"{value} flush 0 0\n")


def uevents(seconds, pattern):
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)
    s.bind((0, 1))
    print("listening", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        s.settimeout(max(0.01, end - time.monotonic()))
        try:
            text = s.recv(65536).replace(b"\0", b" ").decode(errors="replace")
        except socket.timeout:
            break
        if re.search(pattern, text):
            print(text, flush=True)
            return
    raise SystemExit(f"stomp.py: no uevent matched {pattern}")


def main(args):
    verb, rest = (args[0], args[1:]) if args else ("", [])
    if verb == "write":
        write(rest[0], rest[1:])
    elif verb == "sectors":
        write(rest[0], rest[1:], 512)
    elif verb == "sync":
        os.fsync(os.open(rest[0], os.O_RDWR))
    elif verb == "nowait":
        flagged(rest[0], int(rest[1]), 1, os.RWF_NOWAIT)
    elif verb == "atomic":
        flagged(rest[0], int(rest[1]), int(rest[2]), RWF_ATOMIC)
    elif verb == "differ":
        differ(*rest)
    elif verb == "missing":
        show(read_runs(rest[0]) - read_runs(rest[1]))
    elif verb == "count":
        print(len(read_runs(rest[0])))
    elif verb == "restore":
        restore(*rest)
    elif verb == "load":
        load(rest[0], int(rest[1]), int(rest[2]), rest[3])
    elif verb == "uevents":
        uevents(float(rest[0]), rest[1])
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
