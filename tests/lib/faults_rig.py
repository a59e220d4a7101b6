# SPDX-License-Identifier: GPL-2.0
"""The device whose I/O faults.py fails: its activation by ioctl, its writes, and what must hold of it at the end."""

import errno
import fcntl
import os
import signal
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
import control  # noqa: E402
import stomp  # noqa: E402

BLOCK = 4096
DEBUG = "/sys/kernel/debug"
CREATE, REMOVE, SUSPEND, LOAD, STATUS = 3, 4, 6, 9, 12
SUSPENDED = 1 << 1
# Longest that any single operation may take, in seconds; the machine may be slow.
PATIENCE = 60


def put(path, value):
    with open(path, "w", encoding="ascii") as f:
        f.write(str(value))


def get(path):
    with open(path, encoding="ascii") as f:
        return f.read().strip()


class Dm:
    """A device-mapper device, by ioctl, so that faults hit the one who asks."""

    def __init__(self, name):
        self.fd = os.open("/dev/mapper/control", os.O_RDWR)
        self.name = name.encode()
        self.node = None

    def call(self, nr, flags=0, payload=b"", targets=0):
        size = 16384
        head = struct.pack("<IIIIIIiIIIQ128s129s7x", 4, 0, 0, size, 312, targets, 0, flags, 0, 0, 0, self.name, b"")
        arg = bytearray(head + payload)
        arg += bytes(size - len(arg))
        fcntl.ioctl(self.fd, 3 << 30 | 312 << 16 | 0xFD << 8 | nr, arg)
        return arg

    def create(self):
        arg = self.call(CREATE)
        dev, = struct.unpack_from("<Q", arg, 40)
        major, minor = dev >> 8 & 0xFFF, dev & 0xFF | dev >> 12 & 0xFFF00
        self.node = f"{os.environ.get('WORK', '/run')}/{self.name.decode()}"
        if os.path.exists(self.node):
            os.unlink(self.node)
        os.mknod(self.node, 0o60600, os.makedev(major, minor))

    def load(self, sectors, kind, words):
        params = words.encode() + b"\0"
        params += bytes(-len(params) % 8)
        spec = struct.pack("<QQiI16s", 0, sectors, 0, 40 + len(params), kind.encode())
        self.call(LOAD, payload=spec + params, targets=1)

    def suspend(self):
        self.call(SUSPEND, SUSPENDED)

    def resume(self):
        self.call(SUSPEND)

    def remove(self):
        end = time.monotonic() + 20
        while True:
            try:
                self.call(REMOVE)
                return
            except OSError as e:
                if e.errno == errno.ENXIO:
                    return
                if e.errno != errno.EBUSY or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def status(self):
        arg = self.call(STATUS)
        text = bytes(arg[312 + 40:]).split(b"\0", 1)[0].decode()
        return text.split()


class Io:
    """Faults of block I/O: fail_make_request, which knows one disk and counts bytes."""

    def __init__(self, device):
        self.switch = f"/sys/block/{os.path.basename(device)}/make-it-fail"
        self.base = f"{DEBUG}/fail_make_request"
        put(f"{self.base}/verbose", 0)
        put(f"{self.base}/interval", 1)
        put(f"{self.base}/probability", 0)

    def arm(self, nth, forever):
        put(f"{self.base}/space", (nth - 1) * BLOCK + 1 if nth > 1 else 0)
        put(f"{self.base}/times", -1 if forever else 1)
        put(f"{self.base}/probability", 100)
        self.forever = forever
        self.armed_space = int(get(f"{self.base}/space"))
        put(self.switch, 1)

    def disarm(self):
        put(self.switch, 0)
        put(f"{self.base}/probability", 0)
        if not self.forever:
            return get(f"{self.base}/times") == "0"
        # For good there is no count; what is left of the budget tells whether it was used up.
        return int(get(f"{self.base}/space")) <= BLOCK


class Rig:
    """A managed device over DATA and META, what its metadata was at moments of interest, and what must be tracked."""

    def __init__(self, data, meta, data_file, meta_file):
        self.data, self.meta, self.data_file, self.meta_file = data, meta, data_file, meta_file
        self.dm = Dm("faults")
        self.control = os.open("/dev/pristine", os.O_RDWR)
        with open(meta_file, "rb") as f:
            self.sectors, = struct.unpack_from("<Q", f.read(BLOCK), 88)
        self.value = 0
        self.written = {}
        self.images = {}
        self.features = "2 checkpoint_ms 0"
        self.fd = None

    # -- the device -----------------------------------------------------------------------------------

    def activate(self):
        self.dm.create()
        self.dm.load(self.sectors, "pristine", f"{self.data} {self.meta} {self.features}")
        self.dm.resume()

    def open(self):
        if self.fd is None:
            self.fd = os.open(self.dm.node, os.O_RDWR | os.O_DIRECT)
        return self.fd

    def close(self):
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def deactivate(self):
        self.close()
        self.dm.remove()

    def mode(self):
        return self.dm.status()[0]

    def write(self, block):
        """Writes a block; if that is acknowledged, it must never be forgotten."""
        self.value += 1
        os.pwritev(self.open(), [stomp.aligned(stomp.stamp(block, self.value))], block * BLOCK)
        self.written[block] = self.value

    def tried(self, operation, *args):
        """The error that the operation ends with, or None. One that does not end kills the test."""
        signal.alarm(PATIENCE)
        try:
            operation(*args)
            return None
        except OSError as e:
            return e.errno
        finally:
            signal.alarm(0)

    def checkpoint(self):
        arg = bytearray(struct.pack("<IIIIQ", 1, *control.number(self.dm.node), 0, 0))
        fcntl.ioctl(self.control, control.CHECKPOINT, arg)

    def dirty(self):
        bits = int.from_bytes(control.plane(self.control, self.dm.node), "little")
        return lambda block: bits >> block & 1

    # -- what it was, and what it must be -----------------------------------------------------------------

    def keep(self, name):
        with open(self.meta_file, "rb") as f:
            self.images[name] = f.read(), dict(self.written)

    def put_back(self, name):
        image, written = self.images[name]
        fd = os.open(self.meta_file, os.O_WRONLY)
        os.pwrite(fd, image, 0)
        os.close(fd)
        # The data device is not put back, so what these blocks hold now is not known.
        self.written = dict.fromkeys(written, 0)

    def below(self, block):
        with open(self.data_file, "rb") as f:
            f.seek(block * BLOCK)
            return f.read(BLOCK)

    def verify(self, what):
        """Everything acknowledged is tracked, and is on the disk."""
        dirty = self.dirty()
        for block, value in self.written.items():
            if not dirty(block):
                raise SystemExit(f"{what}: block {block} was acknowledged and is not tracked")
            if value and self.below(block) != stomp.stamp(block, value):
                raise SystemExit(f"{what}: block {block} was acknowledged and is not on the disk")

    def closed(self, what):
        """The device is read-only: it says so, refuses writes before they reach the disk, and answers reads."""
        if self.mode() != "ro":
            raise SystemExit(f"{what}: the metadata failed, and the device is {self.mode()}")
        for block in (7000, next(iter(self.written), 7000)):
            before = self.below(block)
            error = self.tried(self.write, block)
            if error != errno.EIO:
                raise SystemExit(f"{what}: a write to a device that failed closed: {errno.errorcode.get(error)}")
            if self.below(block) != before:
                raise SystemExit(f"{what}: a refused write reached the data device")
        for block in (0, *self.written):
            buffer = stomp.aligned(bytes(BLOCK))
            os.preadv(self.open(), [buffer], block * BLOCK)
            if buffer[:] != self.below(block):
                raise SystemExit(f"{what}: reads are wrong")

    def recovered(self, what):
        """The fault is gone: away with the device, and up again."""
        error = self.tried(self.deactivate)
        if error:
            raise SystemExit(f"{what}: it cannot be removed: {errno.errorcode[error]}")
        error = self.tried(self.activate)
        if error:
            raise SystemExit(f"{what}: it cannot be activated again: {errno.errorcode[error]}")
        if self.mode() != "rw":
            raise SystemExit(f"{what}: activated again it is {self.mode()}")
        self.write(6900)
        self.verify(what)
        self.deactivate()
