# SPDX-License-Identifier: GPL-2.0
"""The command line of vm.py; see virtme/run-vm."""

import argparse
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import vm  # noqa: E402


def main():
    p = argparse.ArgumentParser(prog="run-vm", description="Boots a stock kernel in QEMU and runs a command in it.",
                                epilog="Exit status: the command's; 124 when the machine itself failed.")
    p.add_argument("--name", default="vm", help="of the machine; its logs go to build/vm/NAME")
    p.add_argument("--release", help="kernel release (default: KREL or the newest)")
    p.add_argument("--root", choices=["sysroot", "none"], default="sysroot",
                   help="sysroot: the sysroot and the checkout, read-only, by virtiofs; none: busybox alone")
    p.add_argument("--payload", action="append", default=[], metavar="PATH[:NAME]",
                   help="file or directory that the guest finds as /run/payload/NAME")
    p.add_argument("--program", action="append", default=[], help="with --root none: a program to copy, with its libraries")
    p.add_argument("--module", action="append", default=[], help="module of the stock kernel to load first")
    p.add_argument("--disk", action="append", default=[], metavar="FILE[,serial=S][,ro][,cache=C][,PROPERTY=V]",
                   help="raw disk image: the guest's /dev/vda, /dev/vdb, ...")
    p.add_argument("--net", nargs="?", const="", default=None, metavar="OPTIONS",
                   help="user network; OPTIONS like hostfwd=tcp:127.0.0.1:2222-:22 (the host is 10.0.2.2)")
    p.add_argument("--memory", type=int, default=1024, help="in MiB")
    p.add_argument("--smp", type=int, default=2)
    p.add_argument("--icount", action="store_true", default=os.environ.get("ICOUNT") == "1",
                   help="guest time counts instructions (also ICOUNT=1)")
    p.add_argument("--append", default="", help="more kernel parameters")
    p.add_argument("--timeout", type=float, default=300)
    p.add_argument("--kernel", help="another kernel image")
    p.add_argument("--initrd", help="another initramfs; no command is run then")
    p.add_argument("--marker", help="with --initrd: what a console must have said for success")
    p.add_argument("--allow-warnings", action="store_true", help="kernel warnings are no failure")
    p.add_argument("--cut", metavar="REGEX", help="cut the power when a console says this")
    p.add_argument("--cut-after", type=float, metavar="SECONDS", help="cut the power then")
    p.add_argument("--log-dir")
    p.add_argument("--quiet", action="store_true")
    p.add_argument("--qemu", action="append", default=[], metavar="ARGUMENT", help="one more argument for QEMU")
    p.add_argument("command", nargs=argparse.REMAINDER, help="shell command to run in the guest")
    a = p.parse_args()
    command = a.command[1:] if a.command[:1] == ["--"] else a.command
    if not command and not a.initrd:
        p.error("no command to run in the guest")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        machine = vm.Vm(command=" ".join(command) or None, release=a.release, name=a.name, root=a.root, payload=a.payload,
                        programs=a.program, modules=a.module, disks=a.disk, net=a.net, memory=a.memory, smp=a.smp,
                        icount=a.icount, append=a.append, timeout=a.timeout, kernel=a.kernel, initrd=a.initrd,
                        allow_warnings=a.allow_warnings, cut=a.cut, cut_after=a.cut_after, log_dir=a.log_dir,
                        quiet=a.quiet, qemu_args=a.qemu, marker=a.marker)
        return machine.run()
    except vm.MachineError as e:
        print(f"run-vm: error: {e}", file=sys.stderr)
        return 124


if __name__ == "__main__":
    sys.exit(main())
