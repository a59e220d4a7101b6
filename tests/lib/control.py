# SPDX-License-Identifier: GPL-2.0
"""Speaks to /dev/pristine as rust/shared/abi.rs describes it, rightly and wrongly.

    control.py dirty DEVICE        prints the runs of dirty blocks ("first end")
    control.py stats DEVICE NAME   prints one number of the statistics
    control.py abuse DEVICE        every wrong use of the ioctls gets its documented error
"""

import errno
import fcntl
import os
import struct
import sys

LIST, STATS, MAP, CHECKPOINT = (3 << 30 | size << 16 | 0xB9 << 8 | n for n, size in
                                ((1, 16), (2, 136), (3, 40), (4, 24)))
STAT_NAMES = ("blocks dirty stale hot hot_limit deferred records intents checkpoints meta_bytes refused log_used "
              "log_pages checkpoint_seq memory").split()


def number(path):
    rdev = os.stat(path).st_rdev
    return os.major(rdev), os.minor(rdev)


def address(buffer):
    import ctypes
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def stats(control, path):
    arg = bytearray(struct.pack("<IIII120x", 1, *number(path), 0))
    fcntl.ioctl(control, STATS, arg)
    return dict(zip(["mode"] + STAT_NAMES, struct.unpack("<I15Q", arg[12:])))


def plane(control, path, which=0):
    """All words of a plane, asked for in pieces of odd length."""
    words = (stats(control, path)["blocks"] + 63) // 64
    got, first = b"", 0
    while first < words:
        buffer = bytearray(1000 * 8)
        arg = bytearray(struct.pack("<IIIIQQQ", 1, *number(path), which, first, 1000, address(buffer)))
        fcntl.ioctl(control, MAP, arg)
        count, = struct.unpack_from("<Q", arg, 24)
        assert 0 < count <= 1000, count
        got += buffer[:count * 8]
        first += count
    return got


def dirty(control, path):
    bits = int.from_bytes(plane(control, path), "little")
    first = None
    for n in range(bits.bit_length() + 1):
        if bits >> n & 1:
            first = n if first is None else first
        elif first is not None:
            print(first, n)
            first = None


def refused(control, what, want, request, arg):
    """The ioctl must fail with this error."""
    try:
        fcntl.ioctl(control, request, arg)
    except OSError as e:
        got = errno.errorcode[e.errno]
        if got == want:
            print(f"{what}: {got}")
            return
        raise SystemExit(f"{what}: got {got}, want {want}") from e
    raise SystemExit(f"{what}: it was accepted, want {want}")


def abuse(control, path):
    major, minor = number(path)
    buffer = bytearray(4096)
    where = address(buffer)
    for name, request, size in (("LIST", LIST, 16), ("STATS", STATS, 136), ("MAP", MAP, 40), ("CHECKPOINT", CHECKPOINT, 24)):
        for version in (0, 2, 0xFFFFFFFF):
            refused(control, f"{name} version {version}", "EPROTO", request, bytearray(struct.pack("<I", version) + bytes(size - 4)))
        refused(control, f"{name} at a bad address", "EFAULT", request, 8)
        refused(control, f"{name} without an argument", "EFAULT", request, 0)
        if name != "LIST":
            refused(control, f"{name} of no device", "ENODEV", request,
                    bytearray(struct.pack("<III", 1, major, 0xFFFFF) + bytes(size - 12)))
    # _IOWR numbers carry the size: one of another size is another ioctl.
    for request in (LIST + (8 << 16), 3 << 30 | 16 << 16 | 0xB9 << 8 | 99, 0x5401):
        refused(control, f"unknown ioctl {request:#x}", "ENOTTY", request, bytearray(256))

    def map_arg(which=0, first=0, words=8, at=where):
        return bytearray(struct.pack("<IIIIQQQ", 1, major, minor, which, first, words, at))

    words = (stats(control, path)["blocks"] + 63) // 64
    refused(control, "MAP of no plane", "EINVAL", MAP, map_arg(which=2))
    refused(control, "MAP past the end", "ERANGE", MAP, map_arg(first=words))
    refused(control, "MAP far past the end", "ERANGE", MAP, map_arg(first=(1 << 64) - 1))
    refused(control, "MAP of too much", "EINVAL", MAP, map_arg(words=65537))
    refused(control, "MAP of far too much", "EINVAL", MAP, map_arg(words=(1 << 64) - 1))
    refused(control, "MAP to a bad address", "EFAULT", MAP, map_arg(at=8))
    refused(control, "MAP to a kernel address", "EFAULT", MAP, map_arg(at=0xFFFF888000000000))
    refused(control, "CHECKPOINT with reserved bits", "EINVAL", CHECKPOINT,
            bytearray(struct.pack("<IIIIQ", 1, major, minor, 1, 0)))
    refused(control, "LIST to a bad address", "EFAULT", LIST, bytearray(struct.pack("<IIQ", 1, 4, 8)))
    # No words is no error, and nothing is written.
    arg = map_arg(words=0, at=8)
    fcntl.ioctl(control, MAP, arg)
    assert struct.unpack_from("<Q", arg, 24)[0] == 0
    # A short buffer gets what fits, and the count that there is.
    for fits in (0, 1, 3):
        buffer[:] = b"\xee" * len(buffer)
        arg = bytearray(struct.pack("<IIQ", 1, fits, where))
        fcntl.ioctl(control, LIST, arg)
        count, = struct.unpack_from("<I", arg, 4)
        assert count >= 1, count
        end = min(fits, count) * 48
        assert bytes(buffer[end:]) == b"\xee" * (len(buffer) - end), "written past the buffer"
        if fits:
            entries = [struct.unpack_from("<IIQQII", buffer, n * 48) for n in range(min(fits, count))]
            assert (major, minor) in [e[:2] for e in entries], entries
    # The last words of the map, and not one more.
    buffer[:] = b"\xee" * len(buffer)
    arg = map_arg(first=words - 1, words=500)
    fcntl.ioctl(control, MAP, arg)
    assert struct.unpack_from("<Q", arg, 24)[0] == 1
    assert bytes(buffer[8:]) == b"\xee" * (len(buffer) - 8), "written past the words"
    # Who may not administer the machine may neither see the map nor write a checkpoint.
    os.setgid(65534)
    os.setuid(65534)
    refused(control, "MAP by nobody", "EPERM", MAP, map_arg())
    refused(control, "CHECKPOINT by nobody", "EPERM", CHECKPOINT, bytearray(struct.pack("<IIIIQ", 1, major, minor, 0, 0)))


def main(args):
    if len(args) < 2:
        raise SystemExit(__doc__)
    control = os.open("/dev/pristine", os.O_RDWR)
    if args[0] == "dirty":
        dirty(control, args[1])
    elif args[0] == "stats":
        print(stats(control, args[1])[args[2]])
    elif args[0] == "abuse":
        abuse(control, args[1])
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
