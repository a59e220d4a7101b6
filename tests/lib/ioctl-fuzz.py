# SPDX-License-Identifier: GPL-2.0
"""Throws random ioctls at /dev/pristine and checks the answers against rust/shared/abi.rs.

    ioctl-fuzz.py DEVICE SECONDS SEED

Some calls are random altogether; most are good ones with a few fields changed, as others never get past the version.
The argument and the buffer that it points to lie at the end of a page before an unmapped one, or between guard bytes.
"""

import ctypes
import errno
import mmap
import os
import random
import struct
import sys
import time

SIZES = {1: 16, 2: 136, 3: 40, 4: 24}
GOOD = {0, errno.EPROTO, errno.EFAULT, errno.EINVAL, errno.ENODEV, errno.ERANGE, errno.ENOTTY, errno.EINTR, errno.ENOMEM,
        errno.EOVERFLOW}
PAGE = mmap.PAGESIZE
EDGES = [0, 1, 2, 7, 63, 64, 65, 4096, 65535, 65536, 65537, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 47, 1 << 61, 1 << 63, (1 << 64) - 1]

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
libc.ioctl.argtypes = ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p


class Memory:
    """Pages, and one behind them that may not be touched."""

    def __init__(self, pages):
        self.map = mmap.mmap(-1, (pages + 1) * PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.end = pages * PAGE
        if libc.mprotect(self.base + self.end, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")


def number(rng, bits):
    pick = rng.randrange(4)
    if pick == 0:
        value = rng.choice(EDGES)
    elif pick == 1:
        value = rng.getrandbits(rng.randrange(1, bits + 1))
    elif pick == 2:
        value = -rng.randrange(1, 70)
    else:
        value = rng.randrange(600)
    return value & ((1 << bits) - 1)


def pointer(rng, memory):
    pick = rng.randrange(10)
    if pick < 5:
        # So many bytes before the end of what is mapped.
        return memory.base + memory.end - rng.randrange(0, memory.end)
    if pick == 5:
        return memory.base + memory.end - rng.randrange(0, 9)
    return rng.choice([0, 1, 8, memory.base + memory.end, (1 << 47) - 8, 0xFFFF888000000000, (1 << 64) - 1, (1 << 64) - 8,
                       number(rng, 64)])


def harmless(address, *memories):
    """The address, or one that nothing can be mapped at if the kernel might write into the interpreter's own memory there."""
    if address < PAGE or address >= 1 << 47 or any(m.base <= address < m.base + m.end + PAGE for m in memories):
        return address
    return address | 1 << 62


def main(device, seconds, seed):
    rng = random.Random(int(seed))
    rdev = os.stat(device).st_rdev
    where = os.major(rdev), os.minor(rdev)
    control = os.open("/dev/pristine", os.O_RDWR)
    memory = Memory(140)  # A MAP of the most words is 128 pages.
    args = Memory(1)
    calls = checkpoints = 0
    answers = {}
    stop = time.monotonic() + float(seconds)
    while time.monotonic() < stop:
        which = rng.choice([1, 2, 2, 3, 3, 3, 4]) if rng.randrange(20) else rng.randrange(256)
        size = SIZES.get(which, 64)
        request = 3 << 30 | size << 16 | 0xB9 << 8 | which
        if rng.randrange(16) == 0:
            request ^= 1 << rng.randrange(32)
        if which == 4 and checkpoints * 50 > calls:
            continue  # They take longer than all the others.
        count = 0
        if which == 1:
            count = rng.choice([0, 1, 2, 3, 100])
            buffer = memory.base + memory.end - count * 48
            arg = struct.pack("<IIQ", 1, count, buffer)
        elif which == 3:
            count = rng.choice([0, 1, 2, 10, 64, 65, 1000, 65536])
            buffer = memory.base + memory.end - count * 8
            arg = struct.pack("<IIIIQQQ", 1, *where, rng.randrange(2), rng.randrange(70), count, buffer)
        else:
            arg = struct.pack("<III", 1, *where) + bytes(size - 12)
        arg = bytearray(arg)
        changed = rng.randrange(3) == 0
        if changed:
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(0, size, 4)
                if at % 8 == 0 and size - at >= 8 and rng.randrange(2):
                    value = pointer(rng, memory) if rng.randrange(2) else number(rng, 64)
                    struct.pack_into("<Q", arg, at, value & ((1 << 64) - 1))
                else:
                    struct.pack_into("<I", arg, at, number(rng, 32))
        elif rng.randrange(50) == 0:
            arg = bytearray(rng.randbytes(size))
            changed = True
        for at in {1: [8], 3: [32]}.get(which, [] if which in SIZES else range(0, size, 8)):
            value, = struct.unpack_from("<Q", arg, at)
            struct.pack_into("<Q", arg, at, harmless(value, memory, args))
        # At the very end of the page: a byte more read or written faults.
        at = args.end - size
        args.map[at:args.end] = bytes(arg)
        args.map[at - 64:at] = b"\xa5" * 64
        address = args.base + at
        if rng.randrange(40) == 0:
            address, changed = harmless(pointer(rng, memory), memory, args), True
        ctypes.set_errno(0)
        result = libc.ioctl(control, request, address)
        error = ctypes.get_errno() if result else 0
        calls += 1
        checkpoints += which == 4
        answers[error] = answers.get(error, 0) + 1
        assert error in GOOD, f"{request:#x} {bytes(arg).hex()}: {errno.errorcode.get(error, error)}"
        assert args.map[at - 64:at] == b"\xa5" * 64, f"{request:#x}: written before the argument"
        if request == 3 << 30 | size << 16 | 0xB9 << 8 | which and which in SIZES and not changed:
            answer = args.map[at:args.end]
            if error == errno.ENODEV or (which == 3 and error == errno.ERANGE):
                continue
            assert error == 0, f"{request:#x} {bytes(arg).hex()}: {errno.errorcode[error]}"
            if which == 3:
                got, = struct.unpack_from("<Q", answer, 24)
                assert got <= count, f"MAP returned {got} of {count}"
        elif which not in SIZES and address >= args.base:
            assert error == errno.ENOTTY, f"{request:#x}: {errno.errorcode.get(error, error)}"
    names = {errno.errorcode.get(e, "ok"): n for e, n in sorted(answers.items())}
    print(f"{calls} ioctls: {names}")
    # All that is documented was reached.
    for error in (0, errno.EPROTO, errno.EFAULT, errno.EINVAL, errno.ENODEV, errno.ERANGE, errno.ENOTTY):
        assert calls < 3000 or answers.get(error), f"no ioctl gave {errno.errorcode.get(error, 'success')}"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
