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
import os
import signal
import struct
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# pylint: disable=wrong-import-position
from faults_operations import (  # noqa: E402
    Activate, ActivateStopped, Ask, Checkpoint, Churn, DataActivate, DataDiscard, DataFlush, DataRead, DataWrite, DataZero, Load,
    Operation, Reload, Remove, Resume, Settle, Short, Suspend, SuspendResume, Write)
from faults_rig import BLOCK, DEBUG, PATIENCE, Io, Rig, get, put  # noqa: E402


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
