# SPDX-License-Identifier: GPL-2.0
"""Makes the agent's initramfs; see scripts/initramfs/build. Runs inside the sysroot."""

import argparse
import os
import subprocess
import sys

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CACHE = os.environ["PRISTINE_CACHE"]
sys.path.insert(0, os.path.join(TOP, "virtme"))

import initramfs  # noqa: E402  (needs the path above)

# What machines may need before their root is there. A kernel that has one built in has no file for it; which of
# the others a machine needs only the machine knows, so a list that is too long does no harm.
DRIVERS = ["virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net", "nvme", "sd_mod", "ahci", "af_packet",
           "ext4", "dm_mod"]


def build(output, release, conf=None, modules=(), target=None, agent=None, compress=False):
    """Makes the initramfs `output` for kernel `release`."""
    stock = initramfs.Modules(os.path.join(CACHE, "kernels", release, "modules/lib/modules", release))
    archive = initramfs.Archive()
    for directory in ("dev", "proc", "sys", "run", "tmp", "newroot", "bin", "sbin", "etc/pristine", "lib/pristine"):
        archive.directory(directory)
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3, 0o666)
    archive.copy(agent or os.path.join(TOP, "build/userspace/pristine-agent"), "init")
    archive.copy("/usr/bin/busybox", "bin/busybox")
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
    archive.copy(target or os.path.join(TOP, "build", release, "dm-pristine.ko"), "lib/pristine/dm-pristine.ko")
    if conf:
        archive.copy(conf, "etc/pristine/agent.conf")

    data = archive.data()
    if compress:
        data = subprocess.run(["zstd", "-19", "-q", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout
    tmp = f"{output}.{os.getpid()}.tmp"
    with open(tmp, "wb") as f:
        f.write(data)
    os.rename(tmp, output)
    return output


def main():
    p = argparse.ArgumentParser(prog="initramfs/build", description="Makes the agent's own initramfs.")
    p.add_argument("--release", required=True)
    p.add_argument("--output", required=True)
    p.add_argument("--conf")
    p.add_argument("--module", action="append", default=[])
    p.add_argument("--target")
    p.add_argument("--agent")
    p.add_argument("--zstd", action="store_true")
    a = p.parse_args()
    build(a.output, a.release, a.conf, a.module, a.target, a.agent, a.zstd)
    print(a.output)


if __name__ == "__main__":
    main()
