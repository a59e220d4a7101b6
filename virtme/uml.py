# SPDX-License-Identifier: GPL-2.0
"""Boots the lab kernel (User-Mode Linux), runs a command in it, and collects what it said.

Used by `virtme/run-uml`; as a library: `Uml(...)` then `run()`. It runs inside the sysroot, which is the
lab machine's root file system too (read-only, by hostfs).
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

from machine import TOP, Machine, MachineError  # noqa: E402


class Uml(Machine):
    """One boot of the lab kernel. See `virtme/run-uml --help` for what the arguments mean."""

    def __init__(self, *, command, kernel, name="uml", disks=(), memory=1024, smp=2, append="", **common):
        super().__init__(command=command, name=name, **common)
        self.kernel = kernel
        self.disks = list(disks)
        self.memory = memory
        self.smp = smp
        self.append = append

    def _start(self):
        with open(self.path("guest-command"), "w", encoding="utf-8") as f:
            f.write(self.guest_script(TOP))
        read_end, write_end = os.pipe()
        null = os.open(os.devnull, os.O_RDONLY)
        arguments = [
            self.kernel, f"mem={self.memory}M", "seccomp=on", f"ncpus={self.smp}",
            "root=none", "rootfstype=hostfs", "rootflags=/", "ro", f"init={HERE}/guest/init-uml",
            "con=null", "con0=null", f"ssl0=fd:{null},fd:{write_end}", "panic=-1", "loglevel=8", "hung_task_panic=0",
            f"umid=pristine-{os.getpid()}",
            *[f"ubd{n}={disk}" for n, disk in enumerate(self.disks)],
            *shlex.split(self.append), f"pristine.command={self.path('guest-command')}",
        ]
        with open(self.path("command"), "w", encoding="utf-8") as f:
            f.write(shlex.join(arguments) + "\n")
        # The machine's memory is a file; /dev/shm is memory.
        process = self.spawn(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(null, write_end),
                             env={**os.environ, "TMPDIR": "/dev/shm"})
        os.close(write_end)
        os.close(null)
        return process, process.stdout, os.fdopen(read_end, "rb", buffering=0)


def main():
    p = argparse.ArgumentParser(
        prog="run-uml", description="Boots the lab kernel (User-Mode Linux with KASAN and more) and runs a command in it.",
        epilog="Exit status: the command's; 124 when the machine itself failed, which a kernel warning counts as.")
    p.add_argument("--kernel", required=True, help=argparse.SUPPRESS)
    p.add_argument("--name", default="uml", help="of the machine; its logs go to build/vm/NAME")
    p.add_argument("--disk", action="append", default=[], metavar="FILE", help="disk image: /dev/ubda, /dev/ubdb, ...")
    p.add_argument("--memory", type=int, default=1024, help="in MiB")
    p.add_argument("--smp", type=int, default=2)
    p.add_argument("--append", default="", help="more kernel parameters")
    p.add_argument("--timeout", type=float, default=300)
    p.add_argument("--allow-warnings", action="store_true", help="kernel warnings are no failure")
    p.add_argument("--cut", metavar="REGEX", help="cut the power when a console says this")
    p.add_argument("--cut-after", type=float, metavar="SECONDS", help="cut the power then")
    p.add_argument("--log-dir")
    p.add_argument("--quiet", action="store_true")
    p.add_argument("command", nargs=argparse.REMAINDER, help="shell command to run in the guest")
    a = p.parse_args()
    command = a.command[1:] if a.command[:1] == ["--"] else a.command
    if not command:
        p.error("no command to run in the guest")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return Uml(command=" ".join(command), kernel=a.kernel, name=a.name, disks=a.disk, memory=a.memory, smp=a.smp,
                   append=a.append, timeout=a.timeout, allow_warnings=a.allow_warnings, cut=a.cut,
                   cut_after=a.cut_after, log_dir=a.log_dir, quiet=a.quiet).run()
    except MachineError as e:
        print(f"run-uml: error: {e}", file=sys.stderr)
        return 124


if __name__ == "__main__":
    sys.exit(main())
