# SPDX-License-Identifier: GPL-2.0
"""Boots a kernel in QEMU, runs a command in it, and collects what it said.

Used by `virtme/run-vm` (see there for the options) and as a library by tests that need more than one
boot: `Vm(...)` then `run()`. Only the Python standard library is used; it runs inside the sysroot.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
sys.path.insert(0, HERE)

import initramfs  # noqa: E402  (needs the path above)

CACHE = os.environ["PRISTINE_CACHE"]

# What a healthy kernel never prints.
TROUBLE = re.compile(
    r"\bBUG\b:? |\bWARNING: |KASAN: |UBSAN: |KFENCE: |KCSAN: |Oops[: ]|Kernel panic|general protection fault"
    r"|refcount_t: |possible circular locking|possible recursive locking|inconsistent lock state"
    r"|bad unlock balance|suspicious RCU|held lock freed|INFO: task .* blocked for more|soft lockup"
    r"|hard LOCKUP|self-detected stall|detected stalls|list_(add|del) corruption|scheduling while atomic"
    r"|sleeping function called from invalid|Object remaining|unable to handle|rust_kernel: panicked"
    r"|panicked at |Slab .* objects remaining|ODEBUG: |kmemleak: "
)
EXIT = re.compile(r"^\x1ePRISTINE-EXIT (\d+)")


class VmError(Exception):
    """A machine that could not be made or did not end as it should."""


def kernel_dir(release):
    """The directory that `scripts/kernel-metadata` made for a kernel release."""
    path = os.path.join(CACHE, "kernels", release)
    if not os.path.exists(os.path.join(path, ".complete")):
        raise VmError(f"no kernel {release} in {CACHE}; make it with: KREL={release} scripts/kernel-metadata")
    return path


def default_release():
    """The kernel release of KREL, or the newest."""
    return os.environ.get("KREL") or subprocess.run(
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
    except VmError:
        works = False
    with open(answer + ".tmp", "w", encoding="ascii") as f:
        f.write("yes" if works else "no")
    os.rename(answer + ".tmp", answer)
    print(f"run-vm: KVM {'works' if works else 'does not work; the machines are emulated (TCG)'}", file=sys.stderr)
    return works


class Vm:
    """One boot of one machine. See `virtme/run-vm` for what the arguments mean."""

    def __init__(self, *, command=None, release=None, name="vm", root="sysroot", payload=(), programs=(),
                 modules=(), disks=(), net=None, memory=1024, smp=2, icount=False, kvm=None, append="",
                 timeout=300, kernel=None, initrd=None, allow_warnings=False, cut=None, cut_after=None,
                 log_dir=None, quiet=False, qemu_args=(), marker=None):
        self.release = release or default_release()
        self.name = name
        self.root = root
        self.command = command
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
        self.timeout = timeout
        self.kernel = kernel
        self.initrd = initrd
        self.allow_warnings = allow_warnings
        self.cut = re.compile(cut) if cut else None
        self.cut_after = cut_after
        self.marker = re.compile(marker) if marker else None
        self.quiet = quiet
        self.qemu_args = list(qemu_args)
        self.dir = log_dir or os.path.join(TOP, "build", "vm", name)
        self.console = []
        self.output = []
        self.trouble = []
        self.status = None
        self.was_cut = False
        self.found_marker = False
        self.seconds = 0.0
        self._children = []
        self._stop = threading.Event()

    # -- making ---------------------------------------------------------------------------------

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
            raise VmError(e.args[0]) from e
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
                raise VmError(f"the sysroot has no program {program}")
            archive.program(path)
        environment = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in os.environ.items()
                              if k.startswith(("PRISTINE_", "TEST_")) or k in ("KREL",))
        where = f"cd {shlex.quote(TOP)} || exit 125\n" if self.root == "sysroot" else ""
        archive.file("payload/.command", (environment + where + self.command + "\n").encode(), 0o755)
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
        socket = os.path.join(self.dir, "fs.sock")
        log = open(os.path.join(self.dir, "virtiofsd.log"), "wb")
        program = shutil.which("virtiofsd") or "/usr/libexec/virtiofsd"
        child = subprocess.Popen(
            [program, "--socket-path", socket, "--shared-dir", "/", "--sandbox", "none", "--cache", "always",
             "--announce-submounts", "--inode-file-handles=never"],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        self._children.append(child)
        end = time.monotonic() + 10
        while not os.path.exists(socket):
            if child.poll() is not None or time.monotonic() > end:
                raise VmError(f"virtiofsd did not start; see {log.name}")
            time.sleep(0.02)
        return socket

    def _arguments(self):
        kvm = kvm_works(self.release) if self.kvm is None else self.kvm
        if self.icount:
            kvm = False
            accel = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]
        elif kvm:
            accel = ["-accel", "kvm"]
        else:
            accel = ["-accel", "tcg,thread=multi,tb-size=512"]
        kernel = self.kernel or os.path.join(kernel_dir(self.release), "vmlinuz")
        append = f"console=ttyS0 panic=-1 oops=panic net.ifnames=0 loglevel=7 {self.append}"
        args = ["qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
                "-machine", "q35,usb=off" + (",memory-backend=mem" if self.root == "sysroot" and not self.initrd else ""),
                *accel, "-cpu", "host" if kvm else "max", "-m", str(self.memory), "-smp", str(self.smp),
                "-kernel", kernel, "-append", append, "-monitor", "none",
                "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
                "-device", "virtio-rng-pci",
                "-device", "virtio-serial-pci", "-chardev", "pipe,id=report,path=" + os.path.join(self.dir, "report"),
                "-device", "virtconsole,chardev=report"]
        if self.initrd:
            args += ["-initrd", self.initrd]
        else:
            initrd = os.path.join(self.dir, "initrd")
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

    # -- running --------------------------------------------------------------------------------

    def _read(self, stream, lines, log, on_line):
        with open(log, "wb") as out:
            for raw in stream:
                out.write(raw)
                out.flush()
                line = raw.decode("utf-8", "replace").rstrip("\r\n")
                lines.append(line)
                on_line(line)

    def _on_console(self, line):
        if TROUBLE.search(line):
            self.trouble.append(line)
        self._on_any(line)

    def _on_report(self, line):
        found = EXIT.match(line)
        if found:
            self.status = int(found.group(1))
            return
        if not self.quiet:
            print(line, flush=True)
        self._on_any(line)

    def _on_any(self, line):
        if self.cut and self.cut.search(line) and not self.was_cut:
            self.was_cut = True
            self._stop.set()
        if self.marker and self.marker.search(line):
            self.found_marker = True

    def run(self):
        """Boots the machine and waits for its end. Returns the command's exit status; with `cut`, 0
        once the power was cut. Raises VmError when the machine itself did not do as it should."""
        os.makedirs(self.dir, exist_ok=True)
        for leftover in ("fs.sock", "fs.sock.pid", "report.in", "report.out"):
            try:
                os.unlink(os.path.join(self.dir, leftover))
            except FileNotFoundError:
                pass
        for end in ("in", "out"):
            os.mkfifo(os.path.join(self.dir, f"report.{end}"))
        begin = time.monotonic()
        try:
            arguments = self._arguments()
            with open(os.path.join(self.dir, "command"), "w", encoding="utf-8") as f:
                f.write(shlex.join(arguments) + "\n")
            # Opened for reading and writing, so that neither side waits for the other.
            report = os.open(os.path.join(self.dir, "report.out"), os.O_RDWR)
            qemu_log = open(os.path.join(self.dir, "qemu.log"), "wb")
            qemu = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=qemu_log,
                                    start_new_session=True)
            self._children.append(qemu)
            readers = [
                threading.Thread(target=self._read, args=(
                    qemu.stdout, self.console, os.path.join(self.dir, "console.log"), self._on_console)),
                threading.Thread(daemon=True, target=self._read, args=(
                    os.fdopen(report, "rb", buffering=0), self.output, os.path.join(self.dir, "output.log"),
                    self._on_report)),
            ]
            for reader in readers:
                reader.start()
            timed_out = False
            while qemu.poll() is None:
                now = time.monotonic() - begin
                if self._stop.wait(0.05):
                    break
                if self.cut_after is not None and now > self.cut_after:
                    self.was_cut = True
                    break
                if now > self.timeout:
                    timed_out = True
                    break
            self._kill(qemu)
            readers[0].join(10)
            time.sleep(0.05)
        finally:
            self._end()
            self.seconds = time.monotonic() - begin
        return self._verdict(qemu.returncode, timed_out)

    def _verdict(self, returncode, timed_out):
        log = os.path.join(self.dir, "console.log")
        if self.trouble and not self.allow_warnings:
            first = next(i for i, line in enumerate(self.console) if line == self.trouble[0])
            print(f"run-vm: the kernel complained ({log}):", file=sys.stderr)
            for line in self.console[max(0, first - 2):first + 40]:
                print("    " + line, file=sys.stderr)
            raise VmError(f"the kernel complained: {self.trouble[0]}")
        if self.was_cut:
            return 0
        if timed_out:
            raise VmError(f"the machine was not done after {self.timeout} s; its last words: "
                          + " | ".join(self.console[-3:]) + f" ({log})")
        if self.initrd:
            if self.marker and not self.found_marker:
                raise VmError(f"the machine ended without saying {self.marker.pattern!r} ({log})")
            return self.status or 0
        if self.status is None:
            with open(os.path.join(self.dir, "qemu.log"), encoding="utf-8", errors="replace") as f:
                said = f.read().strip()
            raise VmError(f"the machine ended without a report (QEMU's status {returncode}; {said or 'it said nothing'}); "
                          + "last words: " + " | ".join(self.console[-3:]) + f" ({log})")
        return self.status

    @staticmethod
    def _kill(child):
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def _end(self):
        for child in self._children:
            self._kill(child)
        for leftover in ("fs.sock", "fs.sock.pid", "report.in", "report.out", "initrd"):
            try:
                os.unlink(os.path.join(self.dir, leftover))
            except FileNotFoundError:
                pass
