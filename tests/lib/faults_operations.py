# SPDX-License-Identifier: GPL-2.0
"""The operations in which faults.py fails something: each is set up, then done with the fault lurking, then judged."""

import errno
import fcntl
import os
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
import control  # noqa: E402
import stomp  # noqa: E402
from faults_rig import BLOCK  # noqa: E402


class Operation:
    image = "cut"
    features = "2 checkpoint_ms 0"

    def __init__(self, rig):
        self.rig = rig

    def prepare(self):
        self.rig.activate()
        self.rig.open()

    def run(self):
        raise NotImplementedError

    def judge(self, what, error):
        """Called when the fault was met. By default it must have been noticed and closed the device."""
        self.rig.closed(what)


class Activate(Operation):
    """A fault that the other superblock copy makes good is tolerated; any other refuses the device."""

    def prepare(self):
        pass

    def run(self):
        self.rig.activate()

    def judge(self, what, error):
        if error is None:
            if self.rig.mode() != "rw":
                raise SystemExit(f"{what}: activated, but {self.rig.mode()}")
            self.rig.verify(what)
        elif error not in (errno.EIO, errno.ENOMEM):
            raise SystemExit(f"{what}: refused with {errno.errorcode[error]}")


class ActivateStopped(Activate):
    image = "stopped"


class Write(Operation):
    def run(self):
        for block in (5000, 5300, 5600):
            self.rig.write(block)

    def judge(self, what, error):
        if error != errno.EIO:
            raise SystemExit(f"{what}: the record failed, the write did not: {error}")
        super().judge(what, error)


class Checkpoint(Operation):
    def prepare(self):
        super().prepare()
        for block in (5000, 5300):
            self.rig.write(block)

    def run(self):
        self.rig.checkpoint()

    def judge(self, what, error):
        if error != errno.EIO:
            raise SystemExit(f"{what}: the checkpoint failed, the ioctl did not: {error}")
        super().judge(what, error)


class Churn(Operation):
    """More extents than may be hot, over and over, so that the log goes round and checkpoints carry extents over."""

    features = "4 checkpoint_ms 0 hot_extents 16"

    def run(self):
        for turn in range(2):
            for extent in range(28):
                self.rig.write(extent * 256 + 100 + turn)

    def judge(self, what, error):
        # The fault may have hit a checkpoint that nobody waited for: then the next writes are refused.
        if error not in (None, errno.EIO):
            raise SystemExit(f"{what}: {errno.errorcode[error]}")
        super().judge(what, error)


class Settle(Operation):
    """A checkpoint because time has passed."""

    features = "2 checkpoint_ms 20"

    def run(self):
        self.rig.write(5000)
        before = self.seq()
        end = time.monotonic() + 10
        while self.seq() < before + 2 and self.rig.mode() == "rw" and time.monotonic() < end:
            time.sleep(0.01)
            if self.seq() > before:
                break

    def seq(self):
        return control.stats(self.rig.control, self.rig.dm.node)["checkpoint_seq"]


class Suspend(Operation):
    def prepare(self):
        super().prepare()
        self.rig.write(5000)

    def run(self):
        self.rig.dm.suspend()

    def judge(self, what, error):
        if error:
            raise SystemExit(f"{what}: it cannot be suspended: {errno.errorcode[error]}")
        self.rig.tried(self.rig.dm.resume)
        super().judge(what, error)


class Resume(Operation):
    """The state is read again. On a failure the device stays suspended, and may be resumed later."""

    def prepare(self):
        super().prepare()
        self.rig.write(5000)
        self.rig.dm.suspend()

    def run(self):
        self.rig.dm.resume()

    def judge(self, what, error):
        if error:
            again = self.rig.tried(self.rig.dm.resume)
            if again:
                raise SystemExit(f"{what}: it cannot be resumed later: {errno.errorcode[again]}")
        if self.rig.mode() != "rw":
            raise SystemExit(f"{what}: resumed, but {self.rig.mode()}")
        self.rig.verify(what)
        self.rig.write(5300)


class Reload(Resume):
    def prepare(self):
        Operation.prepare(self)
        self.rig.write(5000)

    def run(self):
        rig = self.rig
        rig.dm.load(rig.sectors, "pristine", f"{rig.data} {rig.meta} {rig.features}")
        rig.dm.suspend()
        rig.dm.resume()

    def judge(self, what, error):
        # The first half is a suspend, whose failure the new table knows nothing of: it reads the disk.
        Resume.judge(self, what, error)


class Remove(Operation):
    def prepare(self):
        super().prepare()
        self.rig.write(5000)

    def run(self):
        self.rig.deactivate()

    def judge(self, what, error):
        if error:
            raise SystemExit(f"{what}: it cannot be removed: {errno.errorcode[error]}")


class DataWrite(Operation):
    """The writer's error alone: the device stays writable, and the block counts as dirty."""

    def run(self):
        for block in (5000, 5001, 10):
            self.rig.write(block)

    def judge(self, what, error):
        if error != errno.EIO:
            raise SystemExit(f"{what}: got {error}")
        if self.rig.mode() != "rw":
            raise SystemExit(f"{what}: an error of the data device closed the device")
        self.rig.written.setdefault(5000, 0)
        self.rig.verify(what)
        self.rig.write(5300)


class DataRead(DataWrite):
    def run(self):
        os.preadv(self.rig.open(), [stomp.aligned(bytes(BLOCK))], 10 * BLOCK)

    def judge(self, what, error):
        self.rig.written.pop(5000, None)
        if error != errno.EIO or self.rig.mode() != "rw":
            raise SystemExit(f"{what}: got {error}, the device is {self.rig.mode()}")
        self.rig.verify(what)


class DataFlush(DataRead):
    def run(self):
        self.rig.write(5000)
        os.fsync(self.rig.open())


class DataDiscard(DataRead):
    def run(self):
        fcntl.ioctl(self.rig.open(), stomp.BLKDISCARD, struct.pack("<QQ", 5200 * BLOCK, 300 * BLOCK))

    def judge(self, what, error):
        super().judge(what, error)
        # What the device did before it failed is not known.
        for block in range(5200, 5500):
            self.rig.written[block] = 0
        self.rig.verify(what)


class DataZero(DataDiscard):
    def run(self):
        fcntl.ioctl(self.rig.open(), stomp.BLKZEROOUT, struct.pack("<QQ", 5200 * BLOCK, 300 * BLOCK))

    def judge(self, what, error):
        # The block layer may have made good for it with writes of zeroes.
        super().judge(what, error or errno.EIO)


class DataActivate(Activate):
    pass


class Short:
    """Mixed into an operation: without memory it may fail, but that closes nothing."""

    def judge(self, what, error):
        if error not in (None, errno.ENOMEM, errno.EIO, errno.EAGAIN):
            raise SystemExit(f"{what}: {errno.errorcode[error]}")
        if error and isinstance(self, (Activate, Resume)):
            return super().judge(what, error)
        if self.rig.mode() != "rw":
            raise SystemExit(f"{what}: want of memory made the device {self.rig.mode()}")
        self.rig.verify(what)
        return None


class Load(Operation):
    """Constructs a target and throws it away."""

    def run(self):
        rig = self.rig
        rig.dm.load(rig.sectors, "pristine", f"{rig.data} {rig.meta} {rig.features}")


class Ask(Operation):
    """All that userspace may ask."""

    def run(self):
        os.close(os.open("/dev/pristine", os.O_RDWR))
        self.rig.dirty()
        arg = bytearray(struct.pack("<IIQ", 1, 0, 0))
        fcntl.ioctl(self.rig.control, control.LIST, arg)
        self.rig.mode()
        self.rig.checkpoint()


class SuspendResume(Resume):
    def prepare(self):
        Operation.prepare(self)
        self.rig.write(5000)

    def run(self):
        self.rig.dm.suspend()
        self.rig.dm.resume()
