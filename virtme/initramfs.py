# SPDX-License-Identifier: GPL-2.0
"""Makes small initramfs archives (the "newc" format of cpio) without any tool.

An archive made here is handed to the kernel uncompressed: a VM without KVM unpacks it faster so.
"""

import io
import lzma
import os
import stat
import subprocess


class Archive:
    """A cpio archive in the making; `data()` ends it."""

    def __init__(self):
        self._out = io.BytesIO()
        self._inode = 0
        self._seen = set()

    def _entry(self, name, mode, body=b"", rdev=(0, 0)):
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(body), 0, 0, *rdev, len(encoded), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % f for f in fields) + encoded)
        self._pad()
        self._out.write(body)
        self._pad()

    def _pad(self):
        self._out.write(b"\0" * (-self._out.tell() % 4))

    def _parents(self, name):
        parts = name.split("/")[:-1]
        for n in range(1, len(parts) + 1):
            self.directory("/".join(parts[:n]))

    def directory(self, name, mode=0o755):
        """Adds a directory and those above it; one that is there already is left alone."""
        name = name.strip("/")
        if not name or name in self._seen:
            return
        self._parents(name)
        self._seen.add(name)
        self._entry(name, stat.S_IFDIR | mode)

    def file(self, name, body, mode=0o644):
        """Adds a file with the given bytes."""
        name = name.strip("/")
        self._parents(name)
        if name in self._seen:
            return
        self._seen.add(name)
        self._entry(name, stat.S_IFREG | mode, body)

    def symlink(self, name, target):
        """Adds a symbolic link."""
        name = name.strip("/")
        self._parents(name)
        if name in self._seen:
            return
        self._seen.add(name)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name, major, minor, mode=0o600):
        """Adds a character device node."""
        name = name.strip("/")
        self._parents(name)
        self._seen.add(name)
        self._entry(name, stat.S_IFCHR | mode, rdev=(major, minor))

    def copy(self, source, name):
        """Copies a file or a whole directory of the build machine."""
        if os.path.isdir(source) and not os.path.islink(source):
            self.directory(name)
            for child in sorted(os.listdir(source)):
                self.copy(os.path.join(source, child), name.rstrip("/") + "/" + child)
        elif os.path.islink(source) and not os.path.exists(source):
            self.symlink(name, os.readlink(source))
        else:
            with open(source, "rb") as f:
                self.file(name, f.read(), stat.S_IMODE(os.stat(source).st_mode))

    def program(self, path, name=None):
        """Copies a program with the shared libraries that it needs, at their own paths."""
        self.copy(path, name or path)
        listing = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
        for line in listing.splitlines():
            for word in line.split():
                if word.startswith("/"):
                    self.copy(os.path.realpath(word), word)
                    break

    def data(self):
        """The finished archive."""
        self._entry("TRAILER!!!", 0)
        return self._out.getvalue()


class Modules:
    """The modules of a kernel release, from a directory like /lib/modules/RELEASE."""

    def __init__(self, directory):
        self.directory = directory
        self.depends = {}
        self.by_name = {}
        self.builtin = set()
        with open(os.path.join(directory, "modules.dep"), encoding="ascii") as f:
            for line in f:
                path, _, rest = line.partition(":")
                self.depends[path] = rest.split()
                self.by_name[self._name(path)] = path
        try:
            with open(os.path.join(directory, "modules.builtin"), encoding="ascii") as f:
                self.builtin = {self._name(line.strip()) for line in f}
        except FileNotFoundError:
            pass

    @staticmethod
    def _name(path):
        return os.path.basename(path).split(".")[0].replace("-", "_")

    def in_load_order(self, names):
        """Paths (relative to the directory) of the named modules and of all that they need, those
        that are needed first. Names built into the kernel cost nothing; unknown ones raise KeyError."""
        order = []
        for name in names:
            name = name.replace("-", "_")
            if name in self.builtin:
                continue
            if name not in self.by_name:
                raise KeyError(f"the kernel has no module {name} ({self.directory})")
            path = self.by_name[name]
            # modules.dep lists what a module needs, the farthest last.
            for needed in [*reversed(self.depends[path]), path]:
                if needed not in order:
                    order.append(needed)
        return order

    def read(self, path):
        """A module's bytes, unpacked."""
        with open(os.path.join(self.directory, path), "rb") as f:
            body = f.read()
        if path.endswith(".xz"):
            return lzma.decompress(body)
        if path.endswith(".zst"):
            return subprocess.run(["zstd", "-dc"], input=body, capture_output=True, check=True).stdout
        return body
