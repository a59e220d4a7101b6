# SPDX-License-Identifier: GPL-2.0
"""Attaches a server that speaks on its standard input to a network block device.

    nbd.py attach DEVICE=BYTES[,DEVICE=BYTES] COMMAND...    until somebody detaches them; then waits for the server
    nbd.py detach DEVICE...

With two devices the server speaks for the second one on its standard output.
"""

import fcntl
import os
import socket
import subprocess
import sys
import threading

(SET_SOCK, SET_BLKSIZE, DO_IT, CLEAR_SOCK, SET_SIZE_BLOCKS, DISCONNECT, SET_FLAGS) = (
    0xAB << 8 | n for n in (0, 1, 3, 4, 7, 8, 10))
HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES = 1 << 0, 1 << 2, 1 << 3, 1 << 5, 1 << 6
SECTOR = 512


def attach(devices, command):
    pairs = [socket.socketpair() for _ in devices]
    ends = dict(zip(("stdin", "stdout"), (theirs for _, theirs in pairs)))
    server = subprocess.Popen(command, **ends)
    for end in ends.values():
        end.close()
    attached = threading.Barrier(len(devices), lambda: print("attached", flush=True))
    threads = []
    for device, (ours, _) in zip(devices, pairs):
        name, _, size = device.partition("=")
        threads.append(threading.Thread(target=keep, args=(name, int(size), ours, attached)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raise SystemExit(server.wait())


def keep(device, size, ours, attached):
    fd = os.open(device, os.O_RDWR)
    fcntl.ioctl(fd, SET_BLKSIZE, SECTOR)
    fcntl.ioctl(fd, SET_SIZE_BLOCKS, size // SECTOR)
    fcntl.ioctl(fd, SET_FLAGS, HAS_FLAGS | FLUSH | FUA | TRIM | WRITE_ZEROES)
    fcntl.ioctl(fd, SET_SOCK, ours.fileno())
    attached.wait()
    try:
        fcntl.ioctl(fd, DO_IT)
    finally:
        fcntl.ioctl(fd, CLEAR_SOCK)
        ours.close()
        os.close(fd)


def main(args):
    if len(args) > 2 and args[0] == "attach":
        attach(args[1].split(","), args[2:])
    elif len(args) > 1 and args[0] == "detach":
        for device in args[1:]:
            fd = os.open(device, os.O_RDWR)
            fcntl.ioctl(fd, DISCONNECT)
            os.close(fd)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
