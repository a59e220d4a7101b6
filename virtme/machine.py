# SPDX-License-Identifier: GPL-2.0
"""What test machines of every kind have in common: two streams (the kernel's console and the report of
the command that runs in the guest), a time limit, and a verdict."""

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
CACHE = os.environ["PRISTINE_CACHE"]

# What a healthy kernel never prints; one extended regular expression a line, used by grep too.
with open(os.path.join(HERE, "trouble"), encoding="ascii") as _f:
    TROUBLE = re.compile("|".join(line.rstrip("\n") for line in _f))
# What the first process of a managed machine says on its console.
FIRST_WORDS = re.compile(r"pristine-agent: |PRISTINE|systemd|login:")
BEGIN = "\x1ePRISTINE-BEGIN"
EXIT = re.compile(r"^\x1ePRISTINE-EXIT (\d+)")
# Lines of the console shown around a complaint of the kernel.
CONTEXT_BEFORE, CONTEXT_AFTER = 2, 40
# Seconds after which an emulated machine whose first process has said nothing will never come up.
BOOT_TIMEOUT = 180


class MachineError(Exception):
    """A machine that could not be made or did not end as it should."""


class Machine:
    """One boot of one machine. A subclass makes the process in `_start`, which returns the process, the
    stream of the console and the stream of the report.

    Emulators of several CPUs break a kernel once in some hundred boots (a timer of the second CPU that never fires, a
    trap in code that the kernel is patching). A subclass that sets `emulated` has such a machine started once more, if it
    broke before its first process said a word: nothing of ours was in it by then."""

    emulated = False

    def __init__(self, *, command, name, timeout=300, allow_warnings=False, cut=None, cut_after=None, marker=None,
                 log_dir=None, quiet=False):
        self.command = command
        self.name = name
        self.timeout = timeout
        self.allow_warnings = allow_warnings
        self.cut = re.compile(cut) if cut else None
        self.cut_after = cut_after
        self.marker = re.compile(marker) if marker else None
        self.quiet = quiet
        self.came_up = False
        self.dir = log_dir or os.path.join(TOP, "build", "vm", name)
        self.console = []
        self.output = []
        self.trouble = []
        self.status = None
        self.was_cut = False
        self.found_marker = False
        self.seconds = 0.0
        self._lock = None
        self._children = []
        self._stop = threading.Event()

    def _claim_directory(self):
        """Two machines of the same name at the same time must not share a directory: the second one gets
        one with its process number in the name."""
        for directory in (self.dir, f"{self.dir}-{os.getpid()}"):
            os.makedirs(directory, exist_ok=True)
            lock = open(os.path.join(directory, ".lock"), "w", encoding="ascii")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            self.dir, self._lock = directory, lock
            return
        raise MachineError(f"another machine uses {self.dir}")

    def path(self, name):
        """A file of this machine's log directory."""
        return os.path.join(self.dir, name)

    def guest_script(self, directory):
        """The shell script that the guest runs: the environment that tests need, then the command."""
        environment = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in sorted(os.environ.items())
                              if k.startswith(("PRISTINE_", "TEST_")) or k in ("PRISTINE", "KREL"))
        where = f"cd {shlex.quote(directory)} || exit 125\n" if directory else ""
        return environment + where + self.command + "\n"

    def spawn(self, arguments, **options):
        """Starts a process that ends with the machine at the latest, even if we are killed."""
        child = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *arguments], stdin=subprocess.DEVNULL, start_new_session=True, **options)
        self._children.append(child)
        return child

    def _start(self):
        raise NotImplementedError

    def _remove_leftovers(self):
        """Removes what a run leaves beside its logs."""

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
        elif FIRST_WORDS.search(line):
            self.came_up = True
        self._on_any(line)

    def _on_report(self, line):
        self.came_up = True
        if line == BEGIN:
            return
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
        once the power was cut. Raises MachineError when the machine itself did not do as it should."""
        self._claim_directory()
        begin = time.monotonic()
        try:
            returncode, timed_out = self._run_once()
            if self.emulated and not self.came_up and not self.was_cut and (timed_out or self.trouble):
                why = self.trouble[0] if self.trouble else "it stood still"
                print(f"{self.name}: the emulated machine broke before its first process ran ({why}); starting it again",
                      file=sys.stderr)
                os.replace(self.path("console.log"), self.path("console.broken.log"))
                self.console.clear()
                self.output.clear()
                self.trouble.clear()
                returncode, timed_out = self._run_once()
        finally:
            self._lock.close()
            self.seconds = time.monotonic() - begin
        return self._verdict(returncode, timed_out)

    def _run_once(self):
        """Runs the machine to its end. Returns the emulator's exit status and whether time ran out."""
        self._remove_leftovers()
        begin = time.monotonic()
        timed_out = False
        try:
            process, console, report = self._start()
            readers = [
                threading.Thread(daemon=True, target=self._read, args=(
                    console, self.console, self.path("console.log"), self._on_console)),
                threading.Thread(daemon=True, target=self._read, args=(
                    report, self.output, self.path("output.log"), self._on_report)),
            ]
            for reader in readers:
                reader.start()
            while process.poll() is None:
                now = time.monotonic() - begin
                if self._stop.wait(0.05):
                    break
                if self.cut_after is not None and now > self.cut_after:
                    self.was_cut = True
                    break
                if now > self.timeout or (self.emulated and not self.came_up and now > BOOT_TIMEOUT):
                    timed_out = True
                    break
            self._kill(process)
            # The report's stream may never end (a FIFO that we hold open ourselves).
            readers[0].join(10)
            readers[1].join(0.3)
        finally:
            for child in self._children:
                self._kill(child)
            self._remove_leftovers()
        return process.returncode, timed_out

    def _verdict(self, returncode, timed_out):
        log = self.path("console.log")
        if self.trouble and not self.allow_warnings:
            first = self.console.index(self.trouble[0])
            print(f"{self.name}: the kernel complained ({log}):", file=sys.stderr)
            for line in self.console[max(0, first - CONTEXT_BEFORE):first + CONTEXT_AFTER]:
                print("    " + line, file=sys.stderr)
            raise MachineError(f"the kernel complained: {self.trouble[0]}")
        if self.was_cut:
            return 0
        last_words = "last words: " + " | ".join(self.console[-3:]) + f" ({log})"
        if timed_out:
            raise MachineError(f"the machine was not done after {self.timeout:g} s; {last_words}")
        if self.command is None:
            if self.marker and not self.found_marker:
                raise MachineError(f"the machine ended without saying {self.marker.pattern!r}; {last_words}")
            return self.status or 0
        if self.status is None:
            try:
                with open(self.path("emulator.log"), encoding="utf-8", errors="replace") as f:
                    said = f.read().strip()
            except FileNotFoundError:
                said = ""
            raise MachineError(f"the machine ended without a report (the emulator's status is {returncode}; "
                               f"{said or 'it said nothing'}); {last_words}")
        return self.status

    @staticmethod
    def _kill(child):
        if child.poll() is None:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        child.wait()
