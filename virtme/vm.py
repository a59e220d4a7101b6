# SPDX-License-Identifier: GPL-2.0
"""Boots a kernel in QEMU, runs a command in it, and collects what it said.

Used by `virtme/run-vm` (see there for the options) and as a library by tests that need more than one
boot: `Vm(...)` then `run()`. Only the Python standard library is used; it runs inside the sysroot.
"""

import functools
import os
import shlex
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import initramfs  # noqa: E402  (needs the path above)
from machine import CACHE, TOP, Machine, MachineError  # noqa: E402

def kernel_dir(release):
    """The directory that `scripts/kernel-metadata` made for a kernel release."""
    path = os.path.join(CACHE, "kernels", release)
    if not os.path.exists(os.path.join(path, ".complete")):
        raise MachineError(f"no kernel {release} in {CACHE}; make it with: KREL={release} scripts/kernel-metadata")
    return path


@functools.cache
def default_release():
    """The kernel release that KREL means, by default the newest of backports."""
    return subprocess.run(
        [os.path.join(TOP, "scripts/kernel-metadata"), "--release"],
        check=True, capture_output=True, text=True).stdout.strip()


def kvm_works(release):
    """Whether an ordinary kernel boots with KVM here. Some machines have a /dev/kvm that opens but on
    which kernels hang, so only booting one tells; the answer is kept until the machine reboots."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    if os.environ.get("PRISTINE_KVM") in ("0", "1"):
        return os.environ["PRISTINE_KVM"] == "1"
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
        boot = f.read().strip()
    answer = os.path.join(CACHE, f"kvm-{boot}")
    if os.path.exists(answer):
        with open(answer, encoding="ascii") as f:
            return f.read().strip() == "yes"
    print("run-vm: trying whether KVM works here (at most 15 s)", file=sys.stderr)
    try:
        status = Vm(release=release, name="kvm-probe", root="none", command="exit 0", kvm=True, timeout=15,
                    quiet=True).run()
        works = status == 0
    except MachineError:
        works = False
    with open(answer + ".tmp", "w", encoding="ascii") as f:
        f.write("yes" if works else "no")
    os.rename(answer + ".tmp", answer)
    print(f"run-vm: KVM {'works' if works else 'does not work; the machines are emulated (TCG)'}", file=sys.stderr)
    return works


class Vm(Machine):
    """One boot of one machine. See `virtme/run-vm` for what the arguments mean."""

    def __init__(self, *, command=None, release=None, name="vm", root="sysroot", payload=(), programs=(),
                 modules=(), disks=(), net=None, memory=1024, smp=2, icount=False, kvm=None, append="",
                 kernel=None, initrd=None, qemu_args=(), **common):
        super().__init__(command=command, name=name, **common)
        self.release = release or default_release()
        self.root = root
        self.payload = list(payload)
        self.programs = list(programs)
        self.modules = list(modules)
        self.disks = list(disks)
        self.net = net
        self.memory = memory
        self.smp = 1 if icount else smp
        self.icount = icount
        self.kvm = kvm
        self.append = append
        self.kernel = kernel
        self.initrd = initrd
        self.qemu_args = list(qemu_args)

    def _initramfs(self):
        archive = initramfs.Archive()
        archive.directory("bin")
        archive.device("dev/console", 5, 1)
        archive.copy("/usr/bin/busybox", "bin/busybox")
        archive.copy(os.path.join(HERE, "guest/init"), "init")
        wanted = list(self.modules)
        if self.disks:
            wanted.insert(0, "virtio_blk")
        if self.net is not None:
            wanted.insert(0, "virtio_net")
        stock = initramfs.Modules(os.path.join(kernel_dir(self.release), "modules/lib/modules", self.release))
        try:
            order = stock.in_load_order(wanted)
        except KeyError as e:
            raise MachineError(e.args[0]) from e
        names = []
        for path in order:
            name = os.path.basename(path).split(".")[0] + ".ko"
            archive.file(f"modules.d/{name}", stock.read(path))
            names.append(name)
        archive.file("modules", "".join(n + "\n" for n in names).encode())
        archive.file("settings", "".join(f"{k}={shlex.quote(str(v))}\n" for k, v in {
            "ROOT": self.root, "NET": int(self.net is not None), "CHECKOUT": TOP, "CACHE": CACHE}.items()).encode())
        archive.directory("payload")
        for item in self.payload:
            source, _, name = item.partition(":")
            archive.copy(source, "payload/" + (name or os.path.basename(source.rstrip("/"))))
        for program in self.programs:
            path = shutil.which(program)
            if not path:
                raise MachineError(f"the sysroot has no program {program}")
            archive.program(path)
        script = self.guest_script(TOP if self.root == "sysroot" else None)
        archive.file("payload/.command", script.encode(), 0o755)
        return archive.data()

    def _disk_args(self):
        args = []
        for n, disk in enumerate(self.disks):
            path, *options = disk.split(",")
            given = dict(o.partition("=")[::2] for o in options)
            serial = given.pop("serial", None)
            read_only = "ro" in given
            given.pop("ro", None)
            drive = {"file": path, "format": given.pop("format", "raw"), "if": "none", "id": f"disk{n}",
                     "cache": given.pop("cache", "unsafe"), "discard": "unmap", "detect-zeroes": "off"}
            if read_only:
                drive["readonly"] = "on"
            device = {"drive": f"disk{n}"}
            if serial:
                device["serial"] = serial
            device.update(given)
            args += ["-drive", ",".join(f"{k}={v}" for k, v in drive.items()),
                     "-device", "virtio-blk-pci," + ",".join(f"{k}={v}" for k, v in device.items())]
        return args

    def _start_virtiofsd(self):
        socket = self.path("fs.sock")
        log = open(self.path("virtiofsd.log"), "wb")
        program = shutil.which("virtiofsd") or "/usr/libexec/virtiofsd"
        child = self.spawn(
            [program, "--socket-path", socket, "--shared-dir", "/", "--sandbox", "none", "--cache", "always",
             "--announce-submounts", "--inode-file-handles=never"], stdout=log, stderr=log)
        end = time.monotonic() + 10
        while not os.path.exists(socket):
            if child.poll() is not None or time.monotonic() > end:
                raise MachineError(f"virtiofsd did not start; see {log.name}")
            time.sleep(0.02)
        return socket

    def _arguments(self):
        kvm = kvm_works(self.release) if self.kvm is None else self.kvm
        self.emulated = not kvm and not self.icount
        cpu = "host" if kvm else "max"
        if self.icount:
            kvm = False
            accel = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]
            # The emulator counts each byte of a `rep movsb` or `rep stosb` as an instruction, so that copying a page
            # would count for more than all that is to be measured. Without these features the kernel copies words.
            cpu = "max,-erms,-fsrm,-fsrs"
        elif kvm:
            accel = ["-accel", "kvm"]
        else:
            accel = ["-accel", "tcg,thread=multi,tb-size=512"]
        kernel = self.kernel or os.path.join(kernel_dir(self.release), "vmlinuz")
        # The kernel checks early whether timer interrupts come in time. An emulated CPU on a busy host fails that
        # check now and then, and the kernel hangs.
        append = f"console=ttyS0 panic=-1 oops=panic net.ifnames=0 loglevel=7 no_timer_check {self.append}"
        args = ["qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
                "-machine", "q35,usb=off" + (",memory-backend=mem" if self.root == "sysroot" and not self.initrd else ""),
                *accel, "-cpu", cpu, "-m", str(self.memory), "-smp", str(self.smp),
                "-kernel", kernel, "-append", append, "-monitor", "none",
                "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
                "-device", "virtio-rng-pci",
                "-device", "virtio-serial-pci", "-chardev", "pipe,id=report,path=" + self.path("report"),
                "-device", "virtconsole,chardev=report"]
        if self.initrd:
            args += ["-initrd", self.initrd]
        else:
            initrd = self.path("initrd")
            with open(initrd, "wb") as f:
                f.write(self._initramfs())
            args += ["-initrd", initrd]
            if self.root == "sysroot":
                args += ["-object", f"memory-backend-memfd,id=mem,size={self.memory}M,share=on",
                         "-chardev", f"socket,id=fs,path={self._start_virtiofsd()}",
                         "-device", "vhost-user-fs-pci,chardev=fs,tag=pristine"]
        args += self._disk_args()
        if self.net is not None:
            args += ["-netdev", ",".join(["user", "id=net", *filter(None, [self.net])]),
                     "-device", "virtio-net-pci,netdev=net,romfile="]
        return args + self.qemu_args

    def _start(self):
        for end in ("in", "out"):
            os.mkfifo(self.path(f"report.{end}"))
        arguments = self._arguments()
        with open(self.path("command"), "w", encoding="utf-8") as f:
            f.write(shlex.join(arguments) + "\n")
        # Opened for reading and writing, so that neither side waits for the other.
        report = os.open(self.path("report.out"), os.O_RDWR)
        with open(self.path("emulator.log"), "wb") as log:
            qemu = self.spawn(arguments, stdout=subprocess.PIPE, stderr=log)
        return qemu, qemu.stdout, os.fdopen(report, "rb", buffering=0)

    def _remove_leftovers(self):
        for leftover in ("fs.sock", "fs.sock.pid", "report.in", "report.out", "initrd"):
            try:
                os.unlink(self.path(leftover))
            except FileNotFoundError:
                pass
