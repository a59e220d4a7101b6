# SPDX-License-Identifier: GPL-2.0
"""A managed machine and its image server, for the demo and for the scenarios: everything real, nothing faked.

Runs inside the sysroot, with what `tests/demo/prepare` made.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [HERE, os.path.join(TOP, "virtme"), os.path.join(TOP, "scripts/initramfs")]

import build as initramfs_build  # noqa: E402  (needs the paths above)
import vm  # noqa: E402
import volatile  # noqa: E402
from machine import MachineError  # noqa: E402,F401  (for those who use this module)

BLOCK = 4096
CHUNK = 4 << 20
REPORT = re.compile(r"pristine-agent: report (\{.*\})")
LABEL_MAGIC = b"PRISTLBL"
CLI = os.environ.get("PRISTINE", os.path.join(TOP, "build/userspace/pristine"))
AGENT = os.environ.get("PRISTINE_AGENT", os.path.join(TOP, "build/userspace/pristine-agent"))


class Failure(Exception):
    """Something did not go as it must."""


def pristine(*arguments, timeout=600):
    """Runs the command line tool and returns what it printed."""
    done = subprocess.run([CLI, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise Failure(f"pristine {' '.join(map(str, arguments))} failed: {done.stderr.strip()}")
    return done.stdout


class Server:
    """`pristine serve` on a port of its own; the machines reach it as 10.0.2.2."""

    def __init__(self, store, directory, port=0):
        self.port_file = os.path.join(directory, "port")
        self.log = os.path.join(directory, "server.log")
        if os.path.exists(self.port_file):
            os.unlink(self.port_file)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [CLI, "serve", store, "--listen", f"127.0.0.1:{port}", "--port-file", self.port_file,
                 "--access-log"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + 20
        while not os.path.exists(self.port_file):
            if self.process.poll() is not None or time.monotonic() > end:
                raise Failure(f"pristine serve did not start; see {self.log}")
            time.sleep(0.02)
        with open(self.port_file, encoding="ascii") as f:
            self.port = int(f.read())
        self.url = f"http://10.0.2.2:{self.port}"

    def stop(self):
        """Ends it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Boot(vm.Vm):
    """One boot of a managed machine; `on_line` gets every line that a console says."""

    def __init__(self, on_line=None, **options):
        # One CPU is as quick when it is emulated, for booting is serial, and one CPU is emulated without races; what
        # needs several is tested under run-vm and in the lab.
        options.setdefault("smp", 1)
        super().__init__(command=None, quiet=True, **options)
        self._listener = on_line

    def _on_any(self, line):
        super()._on_any(line)
        if self._listener:
            self._listener(line)

    def lines(self, pattern):
        """All console lines in which the pattern occurs."""
        return [line for line in [*self.console, *self.output] if re.search(pattern, line)]

    @property
    def report(self):
        """The agent's report, or None."""
        for line in self.console:
            found = REPORT.search(line)
            if found:
                return json.loads(found.group(1))
        return None


class Machine:
    """A machine's disks, and what it is started with."""

    def __init__(self, directory, image_bytes, *, spare=8 << 20, metadata=16 << 20, initrd=None):
        os.makedirs(directory, exist_ok=True)
        self.directory = directory
        self.data = os.path.join(directory, "data.img")
        self.metadata = os.path.join(directory, "metadata.img") if metadata else None
        self.initrd = initrd or os.path.join(directory, "initramfs")
        self.boots = 0
        for path, size in ((self.data, image_bytes + spare), (self.metadata, metadata)):
            if path:
                with open(path, "wb") as f:
                    f.truncate(size)
        if not initrd:
            initramfs_build.build(self.initrd, vm.default_release(), agent=AGENT)

    def clone(self, directory):
        """Another machine with a copy of this one's disks as they are now."""
        os.makedirs(directory, exist_ok=True)
        other = Machine.__new__(Machine)
        other.__dict__.update(self.__dict__, directory=directory, boots=0)
        for name in ("data", "metadata"):
            path = getattr(self, name)
            if path:
                copy = os.path.join(directory, os.path.basename(path))
                subprocess.run(["cp", "--sparse=always", "--reflink=auto", path, copy], check=True)
                setattr(other, name, copy)
        return other

    def session_disk(self, directory, *extra):
        """A disk with the session in a directory and more files, as the test image takes it."""
        path = os.path.join(self.directory, f"session-{os.path.basename(directory)}.tar")
        with tarfile.open(path, "w") as tar:
            for name in sorted(os.listdir(directory)):
                tar.add(os.path.join(directory, name), name)
            for file in extra:
                tar.add(file, os.path.basename(file))
        return path

    def boot(self, name, store, *, image="stable", session=None, settings="", timeout=600, net="", seed=None,
             **options):
        """Boots the machine until it goes off, is cut off or fails. Returns the boot; `status` is what its session
        ended with, if it had one. With a `seed`, its disks have volatile caches, and a cut loses what was not
        flushed, in part and at random."""
        where = "pristine.data=SERIAL=data"
        parts = [("data", self.data)]
        if self.metadata:
            parts.append(("metadata", self.metadata))
            where += " pristine.metadata=SERIAL=metadata"
        caches = []
        if seed is not None:
            caches = [volatile.VolatileDisk(path, seed * 2 + n) for n, (_, path) in enumerate(parts)]
            parts = [(serial, cache.drive) for (serial, _), cache in zip(parts, caches)]
        disks = [f"{drive},serial={serial}" + (",cache=writeback" if caches else "") for serial, drive in parts]
        if session:
            disks.append(f"{session},serial=session,ro")
        self.boots += 1
        boot = Boot(
            name=name, disks=disks, net=net, initrd=self.initrd, timeout=timeout,
            log_dir=os.path.join(self.directory, f"boot-{self.boots}-{name}"),
            # Nothing is at stake in a machine that runs its own test; the emulated CPU is slow enough.
            append=f"quiet loglevel=4 mitigations=off systemd.show_status=0 {where} "
                   f"pristine.store={store} pristine.image={image} {settings}", **options)
        try:
            boot.run()
        finally:
            for cache in caches:
                if boot.was_cut:
                    cache.cut()
                else:
                    cache.close()
        boot.lost_sectors = sum(cache.lost for cache in caches)
        return boot

    def map(self, width=100, rows=12, color=False):
        """The disk as a picture, from its metadata as it lies there."""
        arguments = ["device", "map", self.data, "--width", width, "--rows", rows]
        if self.metadata:
            arguments += ["--metadata", self.metadata]
        if color:
            arguments += ["--color", "always"]
        return pristine(*arguments)

    def counts(self):
        """Blocks by state, from the metadata as it lies there."""
        arguments = ["device", "map", self.data, "--json"]
        if self.metadata:
            arguments += ["--metadata", self.metadata]
        return json.loads(pristine(*arguments))


def differing_blocks(disk, master):
    """Numbers of the blocks in which the managed part of a disk differs from the master image."""
    differ = []
    with open(disk, "rb") as a, open(master, "rb") as b:
        at = 0
        while True:
            right = b.read(CHUNK)
            if not right:
                return differ
            left = a.read(len(right))
            if left != right:
                for n in range(0, len(right), BLOCK):
                    if left[n:n + BLOCK] != right[n:n + BLOCK]:
                        differ.append((at + n) // BLOCK)
            at += len(right)


def is_identical(machine, master):
    """Whether the whole data device is what it must be: the managed part the master image byte for byte, and
    behind it, on a machine with a metadata device, the device's label and nothing else."""
    if differing_blocks(machine.data, master):
        return False
    if not machine.metadata:
        return True
    with open(machine.data, "rb") as f:
        f.seek(os.path.getsize(master))
        rest = f.read()
    return rest[-BLOCK:].startswith(LABEL_MAGIC) and not any(rest[:-BLOCK])


def make_store(raw, directory, channel="stable", level=3):
    """Builds an image and publishes it; returns the store's directory."""
    store = os.path.join(directory, "store")
    built = os.path.join(directory, "built")
    for path in (store, built):
        shutil.rmtree(path, ignore_errors=True)
    pristine("image", "build", raw, "--output", built, "--level", level)
    pristine("image", "publish", built, store, "--channel", channel)
    shutil.rmtree(built)
    return store


def run_scenario(scenarios):
    """Runs the scenario that the command line names, in the directory that it names; returns the exit status."""
    names = {s.__name__: s for s in scenarios}
    if len(sys.argv) != 3 or sys.argv[1] not in names:
        print(f"usage: {os.path.basename(sys.argv[0])} {'|'.join(names)} DIRECTORY", file=sys.stderr)
        return 2
    os.makedirs(sys.argv[2], exist_ok=True)
    try:
        names[sys.argv[1]](sys.argv[2])
    except (Failure, MachineError) as e:
        print(f"FAIL: {e}", file=sys.stderr)
        return 1
    return 0
