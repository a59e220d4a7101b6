# SPDX-License-Identifier: GPL-2.0
"""What a managed device of 1 TiB costs beside its I/O.

    activation.py guest MODULES ms|instructions [PATTERN...]    measures; in the guest
    activation.py table DIRECTORY                               joins activation-{ms,instructions}.json there; prints a table

The disks are memory disks that take memory only where they are written to. With `instructions` the guest's clock
counts those of its one CPU, and what the CPU idled (waiting for an RCU grace period, say) is left out.
"""

import fcntl
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../lib"))
import control  # noqa: E402  (needs the paths above)
from stacks import MIB, format_pristine, run, sectors  # noqa: E402

SIZE_KIB = 1 << 30
SPAN = 64 * MIB
PAGE = 4096
DATA, META = "/dev/ram0", "/dev/mapper/meta"
PATTERNS = ["empty", "first-half", "alternate", "full"]
SET_DIRTY = "/run/payload/set-dirty"

DM_IOCTL = struct.Struct("=4I2IiIIIQ128s129s7x")
DM = {"create": 3, "remove": 4, "suspend": 6, "load": 9, "message": 14}


class Clock:
    """Milliseconds, or instructions."""

    def __init__(self, unit):
        self.counts = unit == "instructions"

    @staticmethod
    def _idle():
        with open("/proc/timer_list") as file:
            return sum(int(n) for n in re.findall(r"\.idle_sleeptime\s*:\s*(\d+)", file.read()))

    def measure(self, work):
        idle = self._idle() if self.counts else 0
        begin = time.perf_counter_ns()
        work()
        took = time.perf_counter_ns() - begin
        return took - (self._idle() - idle) if self.counts else took / 1e6


class Device:
    """A device-mapper device without dmsetup, whose start would take longer than what is measured."""

    def __init__(self):
        self.control = os.open("/dev/mapper/control", os.O_RDWR)
        self.path = None

    def _ioctl(self, verb, payload=b"", targets=0):
        size = DM_IOCTL.size + len(payload)
        head = DM_IOCTL.pack(4, 0, 0, size, DM_IOCTL.size, targets, 0, 0, 0, 0, 0, b"bench", b"")
        arg = bytearray(head + payload)
        fcntl.ioctl(self.control, 3 << 30 | DM_IOCTL.size << 16 | 0xFD << 8 | DM[verb], arg)
        return DM_IOCTL.unpack_from(arg)

    def create(self):
        device = self._ioctl("create")[10]
        self.path = f"/dev/dm-{device & 0xFF | device >> 12 & 0xFFF00}"

    def load(self, length, line):
        text = line.encode() + b"\0"
        text += bytes(-len(text) % 8)
        self._ioctl("load", struct.pack("=QQiI16s", 0, length, 0, 40 + len(text), b"pristine") + text, 1)

    def resume(self):
        self._ioctl("suspend")

    def remove(self):
        self._ioctl("remove")

    def checkpoint(self):
        self._ioctl("message", struct.pack("=Q", 0) + b"checkpoint\0" + bytes(13))


def fio(device, *options):
    run("fio", "--name=touch", f"--filename={device}", "--direct=1", "--bs=4k", *options)


def available():
    with open("/proc/meminfo") as file:
        return int(re.search(r"^MemAvailable:\s+(\d+)", file.read(), re.M)[1]) * 1024


def written(device):
    """Bytes written to a device, as its own counters say."""
    with open(f"/sys/dev/block/{':'.join(map(str, control.number(device)))}/stat") as file:
        return int(file.read().split()[6]) * 512


def stats(path):
    with open("/dev/pristine", "rb", buffering=0) as file:
        return control.stats(file, path)


class Bench:
    def __init__(self, unit):
        self.clock = Clock(unit)
        self.device = Device()
        self.figures = {}
        self.memory = 0

    def note(self, name, value):
        self.figures[name] = value
        print(f"# {name} {value:,.2f}", flush=True)

    def active(self, pattern, line):
        """Formats, sets the pattern and activates. Returns what the table's load and the resume cost."""
        length = format_pristine(DATA, META)
        if pattern != "empty":
            subprocess.run([SET_DIRTY, DATA, META, pattern], check=True)
        before = available()
        self.device.create()
        load = self.clock.measure(lambda: self.device.load(length, line))
        resume = self.clock.measure(self.device.resume)
        self.memory = before - available()
        return load, resume

    def activation(self, pattern):
        parts = []
        for _ in range(1 if self.clock.counts or pattern != "empty" else 3):
            parts.append(self.active(pattern, f"{DATA} {META} 2 checkpoint_ms 0"))
            # The first checkpoint writes the area that was not in use, whole; the next what changed: nothing.
            checkpoints = [self.clock.measure(self.device.checkpoint)]
            fio(self.device.path, "--rw=write", "--size=4k")
            checkpoints.append(self.clock.measure(self.device.checkpoint))
            fio(self.device.path, "--rw=write", "--size=4k", "--offset=64m")
            parts[-1] += (*checkpoints, self.clock.measure(self.device.remove))
        names = ("load", "resume", "first_checkpoint", "small_checkpoint", "deactivate")
        for name, values in zip(names, zip(*parts)):
            self.note(f"{name}_{pattern}", statistics.median(values))
        self.note(f"activate_{pattern}", self.figures[f"load_{pattern}"] + self.figures[f"resume_{pattern}"])

    def touches(self, name, *options):
        """Bytes of metadata per first touch, with the checkpoints that come of themselves and one at the end."""
        self.active("empty", f"{DATA} {META}")
        path = self.device.path
        self.device.checkpoint()
        old, device_old = stats(path), written(META)
        fio(path, *options)
        self.note(f"checkpoint_after_{name}", self.clock.measure(self.device.checkpoint))
        new = {key: value - old[key] for key, value in stats(path).items()}
        touches = new["dirty"]
        self.note(f"touches_{name}", touches)
        self.note(f"intents_{name}", new["intents"])
        self.note(f"log_bytes_per_touch_{name}", new["records"] * PAGE / touches)
        self.note(f"metadata_bytes_per_touch_{name}", (written(META) - device_old) / touches)
        self.note(f"checkpoints_{name}", new["checkpoints"])
        self.device.remove()

    def run(self, patterns):
        for pattern in patterns or PATTERNS:
            self.activation(pattern)
        if patterns:
            return
        self.active("empty", f"{DATA} {META}")
        self.note("memory_bytes", stats(self.device.path)["memory"])
        self.note("memory_available_bytes", self.memory)
        self.device.remove()
        random = ("--rw=randwrite", f"--size={SPAN}")
        self.touches("random_64m_qd1", "--ioengine=psync", *random)
        self.touches("random_64m_qd32", "--ioengine=libaio", "--iodepth=32", *random)
        cold = ("--rw=write:1020k", "--size=4g")
        self.touches("cold_qd1", "--ioengine=psync", *cold)
        self.touches("cold_qd32", "--ioengine=libaio", "--iodepth=32", *cold)


def guest(modules, unit, patterns):
    # fio writes its state beside itself.
    os.environ["TMPDIR"] = "/tmp"
    run("modprobe", "-d", modules, "brd", "rd_nr=2", f"rd_size={SIZE_KIB}")
    # A metadata device of the size that is promised, a thousandth; and one that counts what is written.
    run("dmsetup", "create", "meta", "--table", f"0 {sectors(DATA) // 1000 // 8 * 8} linear /dev/ram1 0")
    bench = Bench(unit)
    bench.run(patterns)
    print("BENCH " + json.dumps({k: round(v, 2) for k, v in bench.figures.items()}), flush=True)


def table(directory):
    result = {}
    for unit in ("ms", "instructions"):
        with open(os.path.join(directory, f"activation-{unit}.json")) as file:
            result[unit] = json.load(file)
    with open(os.path.join(directory, "activation.json"), "w") as file:
        json.dump(result, file, indent=1)
    ms, count = result["ms"], result["instructions"]

    def row(text, name):
        print(f"{text:<58}{ms[name]:>12,.1f} ms{count[name] / 1e6:>14,.2f} M instructions")

    print("a managed device of 1 TiB, 4 KiB blocks (268,435,456)")
    for pattern in PATTERNS:
        row(f"activate, {pattern}", f"activate_{pattern}")
        row("    of this, loading the table", f"load_{pattern}")
    for pattern in PATTERNS:
        row(f"first checkpoint after it (the other area, whole), {pattern}", f"first_checkpoint_{pattern}")
        row(f"checkpoint after one write, {pattern}", f"small_checkpoint_{pattern}")
        row(f"deactivate after one write, {pattern}", f"deactivate_{pattern}")
    for name in ("random_64m_qd1", "random_64m_qd32", "cold_qd1", "cold_qd32"):
        row(f"checkpoint after {ms[f'touches_{name}']:,.0f} first touches, {name}", f"checkpoint_after_{name}")
    print(f"{'memory, as the target counts it':<58}{ms['memory_bytes'] / MIB:>12,.2f} MiB")
    print(f"{'memory, as the machine has less':<58}{ms['memory_available_bytes'] / MIB:>12,.2f} MiB")
    print(f"{'bytes written per first touch':<36}{'log':>10}{'metadata in all':>20}{'intents':>10}{'checkpoints':>14}")
    for name in ("random_64m_qd1", "random_64m_qd32", "cold_qd1", "cold_qd32"):
        print(f"    {name:<32}{ms[f'log_bytes_per_touch_{name}']:>10,.1f}{ms[f'metadata_bytes_per_touch_{name}']:>20,.1f}"
              f"{ms[f'intents_{name}']:>10,.0f}{ms[f'checkpoints_{name}']:>14,.0f}")


if __name__ == "__main__":
    if sys.argv[1] == "guest":
        guest(*sys.argv[2:4], sys.argv[4:])
    else:
        table(sys.argv[2])
