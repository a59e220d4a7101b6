# SPDX-License-Identifier: GPL-2.0
"""Fails the 1st, the 2nd, the 3rd ... I/O or allocation of every operation of a managed device, and looks what becomes of it.

    faults.py meta DATA META DATAFILE METAFILE [quick]     I/O of the metadata device, one error each and for good
    faults.py data DATA META DATAFILE METAFILE [quick]     I/O of the data device
    faults.py pages DATA META DATAFILE METAFILE [quick]    each page of the metadata, for reading and for writing
    faults.py memory DATA META DATAFILE METAFILE [quick]   allocations of the module, in calls from outside and in its workers

DATA and META are loop devices over files, freshly formatted, the module is loaded. With "quick" the n-th fault is
tried only for some n. One process does it all by ioctl, because a thousand faults take a thousand activations.

Whatever fails: an error is returned where one is due; a device whose metadata failed is read-only and says so, refuses all
writes and answers reads; it can be removed; nothing waits for ever; and once the fault is gone it is activated again, with
every write that was acknowledged on the disk and tracked.
"""

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


def images(rig):
    """`fresh`: as formatted. `cut`: checkpoints, planes and three records, as a power cut leaves them."""
    rig.keep("fresh")
    rig.activate()
    for block in (10, 3000, 3001, 8000):
        rig.write(block)
    rig.checkpoint()
    rig.write(11)
    rig.checkpoint()
    for block in (500, 1500, 2500):
        rig.write(block)
    rig.keep("cut")
    rig.deactivate()
    rig.keep("stopped")


# -- operations: each is set up, then done with the fault lurking, then judged -------------------------------


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


def sweep(rig, operation, arm, disarm, label, quick, step=1):
    """Fails the first, the second ... until the operation ends without meeting the fault. Returns how many it met."""
    name = f"{operation.__name__} {label}"
    met, nth = 0, 1
    while True:
        what = f"{name}, fault {nth}"
        one = operation(rig)
        rig.put_back(one.image)
        rig.features = one.features
        one.prepare()
        arm(nth)
        error = rig.tried(one.run)
        hit = disarm()
        if hit:
            met += 1
            one.judge(what, error)
        elif error:
            raise SystemExit(f"{what}: no fault, but {errno.errorcode[error]}")
        rig.features = Operation.features
        rig.recovered(what)
        if not hit:
            break
        nth += max(3, nth) if quick else step
    print(f"{name}: {met} faults, {nth} tried", flush=True)
    if not met:
        raise SystemExit(f"{name}: no fault was ever met")
    return met


def meta(rig, quick):
    total = 0
    io = Io(rig.meta)
    for forever in (False, True):
        label = "with a device that fails for good" if forever else "with one error"
        operations = (Activate, ActivateStopped, Write, Checkpoint, Churn, Settle, Suspend, Resume, Reload, Remove)
        if quick and forever:
            operations = (Activate, Checkpoint, Churn, Suspend, Remove)
        for operation in operations:
            total += sweep(rig, operation, lambda n, f=forever: io.arm(n, f), io.disarm, label, quick)
    print(f"{total} faults of the metadata device")


# -- the data device ------------------------------------------------------------------------------------------


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


def data(rig, quick):
    io = Io(rig.data)
    total = 0
    for forever in (False,) if quick else (False, True):
        label = "with a data device that fails for good" if forever else "with one error of the data device"
        for operation in (DataActivate, DataWrite, DataRead, DataFlush, DataDiscard, DataZero):
            # A zeroing of many blocks is one I/O whose size is not that of a block.
            step = 400 if operation in (DataDiscard, DataZero) else 1
            total += sweep(rig, operation, lambda n, f=forever: io.arm(n, f), io.disarm, label, False, step)
    print(f"{total} faults of the data device")


# -- page by page ---------------------------------------------------------------------------------------------


def pages(rig, quick):
    """Each page of the metadata cannot be read, or not be written, with different errors."""
    path = f"{DEBUG}/block/{os.path.basename(rig.meta)}/error_injection"
    with open(rig.meta_file, "rb") as f:
        start, area = struct.unpack_from("<QQ", f.read(BLOCK), 144)
    count = start + area
    refused = closed = 0
    kinds = ("IOERR", "MEDIUM", "TIMEOUT", "NOSPC", "TRANSPORT")
    for op in ("READ", "WRITE"):
        for page in range(0, count, 9 if quick else 1):
            what = f"{op} of page {page}"
            rig.put_back("cut")
            put(path, f"add,op={op},start={page * 8},nr_sectors=8,status={kinds[page % len(kinds)]}")
            error = rig.tried(rig.activate)
            if error is None:
                for block in (5000, 5300, 5600):
                    if rig.tried(rig.write, block):
                        break
                rig.tried(rig.checkpoint)
                if rig.mode() == "ro":
                    closed += 1
                    rig.closed(what)
                else:
                    rig.verify(what)
            else:
                refused += 1
            put(path, "removeall")
            rig.recovered(what)
    print(f"{count} pages: {refused} activations refused, {closed} devices closed")
    if not refused or not closed:
        raise SystemExit("no page made any difference")


# -- memory ---------------------------------------------------------------------------------------------------


class Memory:
    """Faults of allocations that the module makes: failslab and fail_page_alloc, by the addresses on the stack."""

    def __init__(self):
        with open("/proc/modules", encoding="ascii") as f:
            words = next(line.split() for line in f if line.startswith("dm_pristine "))
        first = int(words[5], 16)
        for base in ("failslab", "fail_page_alloc"):
            base = f"{DEBUG}/{base}"
            put(f"{base}/verbose", 0)
            put(f"{base}/probability", 0)
            put(f"{base}/ignore-gfp-wait", "N")
            put(f"{base}/require-start", first)
            put(f"{base}/require-end", first + int(words[1]))
            put(f"{base}/stacktrace-depth", 32)
        put(f"{DEBUG}/fail_page_alloc/min-order", 0)
        self.task = f"/proc/self/task/{os.getpid()}/fail-nth"

    def arm(self, nth):
        put(self.task, nth)

    def disarm(self):
        left = int(get(self.task))
        put(self.task, 0)
        return left == 0

    @staticmethod
    def chance(percent):
        for base in ("failslab", "fail_page_alloc"):
            put(f"{DEBUG}/{base}/times", -1)
            put(f"{DEBUG}/{base}/interval", 1)
            put(f"{DEBUG}/{base}/space", 0)
            put(f"{DEBUG}/{base}/probability", percent)


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


def memory(rig, quick):
    faults = Memory()
    total = 0
    for operation in (Activate, Load, Ask, SuspendResume, Reload):
        short = type(operation.__name__, (Short, operation), {})
        total += sweep(rig, short, faults.arm, faults.disarm, "with one allocation failing", quick)
    print(f"{total} allocations failed in calls")

    # In the workers, where nobody can be told: every second allocation fails, while extents come and go.
    rig.put_back("cut")
    rig.features = Churn.features
    rig.activate()
    churn = Churn(rig)
    faults.chance(50)
    errors = [rig.tried(churn.run) for _ in range(10)]
    faults.chance(0)
    print(f"workers without memory: errors {errors}")
    if rig.mode() != "rw":
        raise SystemExit("want of memory closed the device")
    if any(error not in (None, errno.ENOMEM) for error in errors):
        raise SystemExit("writes failed for want of memory with another error")
    rig.verify("workers without memory")
    rig.features = Operation.features
    rig.recovered("workers without memory")


def hung(*_):
    with open("/proc/sysrq-trigger", "w", encoding="ascii") as f:
        f.write("w")
    raise SystemExit(f"an operation did not end within {PATIENCE} s")


def main(args):
    if len(args) < 5 or args[0] not in ("meta", "data", "pages", "memory"):
        raise SystemExit(__doc__)
    signal.signal(signal.SIGALRM, hung)
    rig = Rig(*args[1:5])
    try:
        images(rig)
        {"meta": meta, "data": data, "pages": pages, "memory": memory}[args[0]](rig, args[5:] == ["quick"])
    finally:
        rig.close()
        rig.dm.remove()


if __name__ == "__main__":
    main(sys.argv[1:])
