# SPDX-License-Identifier: GPL-2.0
"""Makes the agent's initramfs.

In a checkout scripts/initramfs/build runs it inside the sysroot. `make install` makes it the program
pristine-initramfs, which takes the running machine's kernel, modules and busybox.
"""

import argparse
import os
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
# Installed, initramfs.py lies beside this file, and the agent one directory above.
INSTALLED = os.path.exists(os.path.join(HERE, "initramfs.py"))
if not INSTALLED:
    sys.path.insert(0, os.path.join(TOP, "virtme"))

import initramfs  # noqa: E402  (needs the path above)

# Where `pristine key trust` puts keys, and where the agent looks for them.
KEYS = "/etc/pristine/keys"
IDENTITY = "/etc/pristine/identity"

# What machines may need before their root is there. A kernel that has one built in has no file for it; which of
# the others a machine needs only the machine knows, so a list that is too long does no harm.
DRIVERS = ["virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net", "nvme", "sd_mod", "ahci", "af_packet",
           "ext4", "dm_mod"]


def places(release):
    """Where the kernel's modules, the target's module, the agent and the helper are."""
    if INSTALLED:
        stock = os.path.join("/lib/modules", release)
        agent = os.path.join(os.path.dirname(HERE), "pristine-agent")
        helper = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(HERE))), "sbin/pristined")
        return stock, os.path.join(stock, "updates/dm-pristine.ko"), agent, helper
    stock = os.path.join(os.environ["PRISTINE_CACHE"], "kernels", release, "modules/lib/modules", release)
    programs = os.path.join(TOP, "build/userspace")
    return (stock, os.path.join(TOP, "build", release, "dm-pristine.ko"), os.path.join(programs, "pristine-agent"),
            os.path.join(programs, "pristined"))


def trusted_keys(directory):
    """The public keys in a directory: the files *.pub."""
    names = sorted(n for n in os.listdir(directory) if n.endswith(".pub") and not n.startswith("."))
    return [os.path.join(directory, n) for n in names]


def build(output, release, conf=None, modules=(), target=None, agent=None, helper=None, compress=False, keys=None,
          identity=None):
    """Makes the initramfs `output` for kernel `release`. Without a helper it cannot revert instantly."""
    stock_directory, default_target, default_agent, default_helper = places(release)
    stock = initramfs.Modules(stock_directory)
    archive = initramfs.Archive()
    for directory in ("dev", "proc", "sys", "run", "tmp", "newroot", "bin", "sbin", "etc/pristine", "lib/pristine"):
        archive.directory(directory)
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3, 0o666)
    archive.copy(agent or default_agent, "init")
    helper = helper or default_helper
    if os.path.exists(helper):
        archive.copy(helper, "usr/sbin/pristined")
    # Debian's busybox-static needs no libraries, its busybox does.
    archive.program(shutil.which("busybox") or "/usr/bin/busybox", "bin/busybox")
    archive.symlink("bin/sh", "busybox")

    names = [n for n in DRIVERS if n in stock.by_name]
    try:
        order = stock.in_load_order([*names, *modules])
    except KeyError as e:
        sys.exit(f"initramfs: error: {e.args[0]}")
    files = []
    for path in order:
        name = f"lib/pristine/{os.path.basename(path).split('.')[0]}.ko"
        archive.file(name, stock.read(path))
        files.append("/" + name)
    archive.file("etc/pristine/modules", "".join(f + "\n" for f in files).encode())
    archive.copy(target or default_target, "lib/pristine/dm-pristine.ko")
    if conf:
        archive.copy(conf, "etc/pristine/agent.conf")
    if keys:
        archive.directory("etc/pristine/keys")
        for key in trusted_keys(keys):
            archive.copy(key, "etc/pristine/keys/" + os.path.basename(key))
    if identity:
        archive.copy(identity, IDENTITY.lstrip("/"))

    data = archive.data()
    if compress:
        data = subprocess.run(["zstd", "-19", "-q", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout
    tmp = f"{output}.{os.getpid()}.tmp"
    with open(tmp, "wb") as f:
        f.write(data)
    if identity:
        os.chmod(tmp, 0o600)
    os.rename(tmp, output)
    return output


def main():
    p = argparse.ArgumentParser(prog="pristine-initramfs" if INSTALLED else "initramfs/build",
                                description="Makes the agent's own initramfs: the agent as /init, busybox, drivers.")
    p.add_argument("--release", default=os.uname().release, help="the kernel's (default: the running one)")
    p.add_argument("--output", required=True, metavar="FILE")
    p.add_argument("--conf", metavar="FILE", help="becomes /etc/pristine/agent.conf; the kernel command line wins over it")
    p.add_argument("--module", action="append", default=[], metavar="NAME", help="one more driver")
    p.add_argument("--target", metavar="KO", help="the target's module")
    p.add_argument("--agent", metavar="FILE", help="the agent")
    p.add_argument("--helper", metavar="FILE", help="the helper, for pristine.revert=instant")
    p.add_argument("--keys", metavar="DIR", help="trusted public keys (*.pub), one of which must have signed a release "
                   "(default when installed: /etc/pristine/keys, if it is there)")
    p.add_argument("--identity", metavar="FILE", help="the age identity that opens encrypted images; whoever can read the "
                   "initramfs has it (default when installed: /etc/pristine/identity, if it is there)")
    p.add_argument("--zstd", action="store_true", help="compress it: for real machines")
    a = p.parse_args()
    keys = a.keys
    if keys is None and INSTALLED and os.path.isdir(KEYS):
        keys = KEYS
    identity = a.identity
    if identity is None and INSTALLED and os.path.exists(IDENTITY):
        identity = IDENTITY
    try:
        if a.keys and not trusted_keys(a.keys):
            sys.exit(f"{p.prog}: error: no keys (*.pub) in {a.keys}; add one: pristine key trust KEY.pub --trusted-keys {a.keys}")
        build(a.output, a.release, a.conf, a.module, a.target, a.agent, a.helper, a.zstd, keys, identity)
    except OSError as e:
        sys.exit(f"{p.prog}: error: {e.filename}: {e.strerror}")
    print(a.output)


if __name__ == "__main__":
    main()
