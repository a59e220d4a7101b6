# SPDX-License-Identifier: GPL-2.0
"""A helper for tests: serves stale blocks from a plain image file, rightly and wrongly, over the channel that
rust/shared/abi.rs describes.

    helper.py serve DEVICE IMAGE [OPTION...]    until SIGTERM, or until the device is gone
        threads=N        that many threads (default 2)
        delay=MS         each answer comes that late
        take-over        takes the device from the helper that it has
        hydrate          offers all blocks in order beside
        pause=MS         each offer that was of use is followed by a pause
        fail=FIRST+N     requests that touch these blocks end with EIO
        most=N           stops answering after so many requests (and keeps those it took)
        ready=FILE       makes the file when it is attached
    helper.py abuse DEVICE IMAGE                every wrong use gets its documented error
    helper.py stats DEVICE NAME                 prints one number of FETCH_STATS
    helper.py stale DEVICE                      prints the runs of stale blocks ("first end")
    helper.py exercise DEVICE IMAGE SECONDS SEED [THREADS]
        random reads, writes of any length, discards and flushes, all of which are checked against what must be there
    helper.py read DEVICE SECTOR COUNT IMAGE    compares these sectors with the image's
    helper.py zero DEVICE FIRST+COUNT           offers these blocks as zeroes
    helper.py copy DEVICE IMAGE FIRST+COUNT...  writes the image's blocks to the device, as an updater would

A block has 4096 bytes.
"""

import errno
import fcntl
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from control import address, number, refused  # noqa: E402  (needs the path above)
from stomp import BLOCK, aligned, open_direct  # noqa: E402

FETCH_STATS, ATTACH, NEXT, ANSWER, HYDRATE = (3 << 30 | size << 16 | 0xB9 << 8 | n for n, size in
                                              ((5, 96), (6, 88), (7, 24), (8, 40), (9, 40)))
MAP = 3 << 30 | 40 << 16 | 0xB9 << 8 | 3
ZEROES, TAKE_OVER = 1, 1
NAMES = "stale requests fetched hydrated overwritten errors open oldest_us latency_us latency_max_us".split()


def open_control():
    return os.open("/dev/pristine", os.O_RDWR)


def stats(path):
    control = open_control()
    arg = bytearray(struct.pack("<IIII80x", 1, *number(path), 0))
    fcntl.ioctl(control, FETCH_STATS, arg)
    os.close(control)
    return dict(zip(["attached"] + NAMES, struct.unpack_from("<I10Q", arg, 12)))


def attach(control, path, flags=0):
    arg = bytearray(struct.pack("<IIIII68x", 1, *number(path), flags, 0))
    fcntl.ioctl(control, ATTACH, arg)
    return struct.unpack_from("<QQI", arg, 16)


def take(control, count=8, wait=1000):
    buffer = bytearray(32 * count)
    arg = bytearray(struct.pack("<IIIIQ", 1, count, wait, 0, address(buffer)))
    fcntl.ioctl(control, NEXT, arg)
    got, = struct.unpack_from("<I", arg, 4)
    return [struct.unpack_from("<QQIIQ", buffer, i * 32)[:4] for i in range(got)]


def answer_arg(number, data=None, error=0, flags=0, length=None):
    where = 0 if data is None else address(data)
    length = (0 if data is None else len(data)) if length is None else length
    return bytearray(struct.pack("<IIQQQII", 1, error, number, where, length, flags, 0))


def answer(control, number, data):
    if data.count(0) == len(data):
        fcntl.ioctl(control, ANSWER, answer_arg(number, flags=ZEROES))
    else:
        fcntl.ioctl(control, ANSWER, answer_arg(number, data))


def hydrate_arg(first, blocks, data=None, flags=0):
    return bytearray(struct.pack("<IIQQQQ", 1, flags, first, blocks, 0 if data is None else address(data), 0))


def hydrate(control, first, data):
    arg = hydrate_arg(first, len(data) // BLOCK, data)
    fcntl.ioctl(control, HYDRATE, arg)
    return struct.unpack_from("<Q", arg, 32)[0]


def image_blocks(image, first, count):
    data = os.pread(image, count * BLOCK, first * BLOCK)
    return bytearray(data + bytes(count * BLOCK - len(data)))


class Over(Exception):
    """The helper's work is over."""


def patiently(call, *args):
    """Calls again while the device is suspended."""
    while True:
        try:
            return call(*args)
        except OSError as e:
            if e.errno in (errno.ENODEV, errno.ESHUTDOWN, errno.ENOTCONN):
                raise Over from e
            if e.errno not in (errno.EAGAIN, errno.EINTR):
                raise
            time.sleep(0.02)


def serve(path, image, options):
    options = dict(o.partition("=")[::2] for o in options)
    image = os.open(image, os.O_RDONLY)
    control = open_control()
    blocks, _, _ = attach(control, path, TAKE_OVER if "take-over" in options else 0)
    delay = int(options.get("delay", 0)) / 1000
    pause = int(options.get("pause", 0)) / 1000
    fail_first, _, fail_count = options.get("fail", "0+0").partition("+")
    fails = range(int(fail_first), int(fail_first) + int(fail_count))
    left = [int(options.get("most", 1 << 60))]
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    if "ready" in options:
        open(options["ready"], "w").close()

    def work():
        try:
            while not over.is_set():
                for number, first, count, _ in patiently(take, control, 4, 200):
                    time.sleep(delay)
                    left[0] -= 1
                    if left[0] < 0:
                        continue
                    try:
                        if any(b in fails for b in range(first, first + count)):
                            patiently(fcntl.ioctl, control, ANSWER, answer_arg(number, error=errno.EIO))
                        else:
                            patiently(answer, control, number, image_blocks(image, first, count))
                    except OSError as e:
                        if e.errno not in (errno.ENOENT, errno.EIO):
                            raise
        except Over:
            over.set()

    def fill():
        at = 0
        try:
            while at < blocks and not over.is_set():
                count = min(random.choice((1, 7, 64, 256)), blocks - at)
                if patiently(hydrate, control, at, image_blocks(image, at, count)) and pause:
                    over.wait(pause)
                at += count
        except Over:
            over.set()

    threads = [threading.Thread(target=work) for _ in range(int(options.get("threads", 2)))]
    if "hydrate" in options:
        threads.append(threading.Thread(target=fill))
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        time.sleep(0.05)


def abuse(path, image):
    image = os.open(image, os.O_RDONLY)
    major, minor = number(path)
    control = open_control()
    whole = bytearray(1 << 20)
    one = image_blocks(image, 0, 1)
    for name, request, size in (("FETCH_STATS", FETCH_STATS, 96), ("ATTACH", ATTACH, 88), ("NEXT", NEXT, 24),
                                ("ANSWER", ANSWER, 40), ("HYDRATE", HYDRATE, 40)):
        for version in (0, 2, 0xFFFFFFFF):
            refused(control, f"{name} version {version}", "EPROTO", request, bytearray(struct.pack("<I", version) + bytes(size - 4)))
        refused(control, f"{name} at a bad address", "EFAULT", request, 8)
    next_arg = lambda count=1, wait=0, zero=0, at=None: bytearray(
        struct.pack("<IIIIQ", 1, count, wait, zero, address(whole) if at is None else at))
    refused(control, "NEXT before ATTACH", "ENOTCONN", NEXT, next_arg())
    refused(control, "ANSWER before ATTACH", "ENOTCONN", ANSWER, answer_arg(1, one))
    refused(control, "HYDRATE before ATTACH", "ENOTCONN", HYDRATE, hydrate_arg(0, 1, one))
    attach_arg = lambda flags=0, minor=minor: bytearray(struct.pack("<IIIII68x", 1, major, minor, flags, 0))
    refused(control, "ATTACH with unknown flags", "EINVAL", ATTACH, attach_arg(2))
    refused(control, "ATTACH to no device", "ENODEV", ATTACH, attach_arg(0, 0xFFFFF))
    attach(control, path)
    refused(control, "ATTACH twice", "EBUSY", ATTACH, attach_arg())
    other = open_control()
    refused(other, "a second helper", "EBUSY", ATTACH, attach_arg())
    refused(other, "NEXT of another file", "ENOTCONN", NEXT, next_arg())

    for what, arg in (("no requests", next_arg(0)), ("too many requests", next_arg(65)), ("too long a wait", next_arg(1, 60001)),
                      ("a reserved field", next_arg(1, 0, 1))):
        refused(control, f"NEXT with {what}", "EINVAL", NEXT, arg)
    refused(control, "NEXT to a bad address", "EFAULT", NEXT, next_arg(at=8))
    assert take(control, 8, 50) == []

    # A request, which must outlive all that is wrong.
    reader = threading.Thread(target=compare, args=(path, 0, 8, image))
    reader.start()
    (request, first, count, flags), = take(control, 8, 10000)
    assert (first, count, flags) == (0, 1, 0), (first, count, flags)
    refused(control, "ANSWER with too much", "EINVAL", ANSWER, answer_arg(request, image_blocks(image, 0, 2)))
    refused(control, "ANSWER with too little", "EINVAL", ANSWER, answer_arg(request, one[:512]))
    refused(control, "ANSWER without data", "EINVAL", ANSWER, answer_arg(request))
    refused(control, "ANSWER with data and an error", "EINVAL", ANSWER, answer_arg(request, one, error=5))
    refused(control, "ANSWER with no errno", "EINVAL", ANSWER, answer_arg(request, error=4096))
    refused(control, "ANSWER with unknown flags", "EINVAL", ANSWER, answer_arg(request, one, flags=2))
    refused(control, "ANSWER with data at a bad address", "EFAULT", ANSWER,
            bytearray(struct.pack("<IIQQQII", 1, 0, request, 8, BLOCK, 0, 0)))
    refused(control, "ANSWER to no request", "ENOENT", ANSWER, answer_arg(request + 1, one))
    refused(other, "ANSWER of another file", "ENOTCONN", ANSWER, answer_arg(request, one))
    blocks = stats(path)["stale"]
    for what, want, arg in (
            ("nothing", "EINVAL", hydrate_arg(0, 0, one)), ("too much", "EINVAL", hydrate_arg(0, 257, whole)),
            ("unknown flags", "EINVAL", hydrate_arg(0, 1, one, 2)), ("data and zeroes", "EINVAL", hydrate_arg(0, 1, one, 1)),
            ("blocks past the end", "ERANGE", hydrate_arg(1 << 40, 1, one)),
            ("blocks over the end of numbers", "ERANGE", hydrate_arg((1 << 64) - 1, 1, one)),
            ("data at a bad address", "EFAULT", bytearray(struct.pack("<IIQQQQ", 1, 0, 4, 1, 8, 0)))):
        refused(control, f"HYDRATE with {what}", want, HYDRATE, arg)
    assert stats(path)["stale"] == blocks
    # A block that is asked for is not taken from an offer.
    assert hydrate(control, 0, one) == 0
    answer(control, request, one)
    reader.join()
    refused(control, "ANSWER a second time", "ENOENT", ANSWER, answer_arg(request, one))
    assert stats(path)["stale"] == blocks - 1
    # A block that is not stale is not overwritten, whatever is offered for it.
    assert hydrate(control, 0, bytearray(b"x" * BLOCK)) == 0
    compare(path, 0, 8, image)
    # The other takes over, with a request on its way.
    reader = threading.Thread(target=compare, args=(path, 16, 8, image))
    reader.start()
    (request, *_), = take(control, 8, 10000)
    attach(other, path, TAKE_OVER)
    refused(control, "NEXT after a take-over", "ESHUTDOWN", NEXT, next_arg())
    refused(control, "ANSWER after a take-over", "ESHUTDOWN", ANSWER, answer_arg(request, one))
    refused(control, "HYDRATE after a take-over", "ESHUTDOWN", HYDRATE, hydrate_arg(9, 1, one))
    (again, first, *_), = take(other, 8, 10000)
    assert first == 2, first
    answer(other, again, image_blocks(image, 2, 1))
    reader.join()
    # What helpers may do is not for everybody.
    os.setuid(65534)
    refused(control, "ATTACH by nobody", "EPERM", ATTACH, attach_arg(TAKE_OVER))


def read(fd, offset, length):
    buffer = mmap.mmap(-1, length)
    if os.preadv(fd, [buffer], offset) != length:
        raise SystemExit(f"short read at {offset}")
    return buffer[:length]


def compare(path, sector, count, image):
    fd = open_direct(path)
    got = read(fd, sector * 512, count * 512)
    os.close(fd)
    want = os.pread(image, count * 512, sector * 512)
    if got != want + bytes(len(got) - len(want)):
        print(f"sectors {sector}+{count} are not the image's", file=sys.stderr)
        os._exit(1)


def exercise(path, image, seconds, seed, threads=4):
    """Each thread has regions of its own, so that it knows what must be in them."""
    image = os.open(image, os.O_RDONLY)
    size = os.lseek(os.open(path, os.O_RDONLY), 0, os.SEEK_END)
    region = 64 * BLOCK
    end = time.monotonic() + seconds
    wrong = []
    counts = {}

    def work(me):
        chance = random.Random(seed * 1000 + me)
        fd = open_direct(path)
        mine = range(me, size // region, threads)
        known = {}
        while time.monotonic() < end and not wrong:
            at = chance.choice(mine) * region
            if at not in known:
                known[at] = bytearray(image_blocks(image, at // BLOCK, 64))
            content = known[at]
            what = chance.choice("rrrwwwwWdf")
            counts[what] = counts.get(what, 0) + 1
            if what == "f":
                os.fsync(fd)
                continue
            unit = BLOCK if what in "Wd" else 512
            first = chance.randrange(region // unit) * unit
            length = min(chance.choice((1, 1, 2, 8, 9, 33)) * unit, region - first)
            if what == "r":
                got = read(fd, at + first, length)
                if got != content[first:first + length]:
                    bad = next(i for i in range(length) if got[i] != content[first + i])
                    wrong.append(f"byte {at + first + bad} (block {(at + first + bad) // BLOCK}): read {got[bad]:#x}, "
                                 f"must be {content[first + bad]:#x}")
            elif what == "d":
                # BLKZEROOUT: unlike after a discard, what is there is known.
                fcntl.ioctl(fd, 0x127F, struct.pack("<QQ", at + first, length))
                content[first:first + length] = bytes(length)
            else:
                data = chance.randbytes(16) * (length // 16)
                os.pwritev(fd, [aligned(data)], at + first)
                content[first:first + length] = data
        for at, content in known.items():
            if not wrong and read(fd, at, region) != content:
                wrong.append(f"region at {at} is wrong in the end")
        # What nobody touched is the image's.
        for at in mine:
            at *= region
            if at not in known and not wrong and chance.random() < 0.2:
                if read(fd, at, region) != image_blocks(image, at // BLOCK, 64):
                    wrong.append(f"region at {at}, which was never written, is not the image's")
        os.fsync(fd)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print("operations:", dict(sorted(counts.items())))
    if wrong:
        raise SystemExit("\n".join(wrong))


def stale(path):
    control = open_control()
    words, first = b"", 0
    while True:
        buffer = bytearray(65536 * 8)
        arg = bytearray(struct.pack("<IIIIQQQ", 1, *number(path), 1, first, 65536, address(buffer)))
        try:
            fcntl.ioctl(control, MAP, arg)
        except OSError as e:
            if e.errno == errno.ERANGE:
                break
            raise
        count, = struct.unpack_from("<Q", arg, 24)
        words += buffer[:count * 8]
        first += count
    bits = int.from_bytes(words, "little")
    first = None
    for n in range(bits.bit_length() + 1):
        if bits >> n & 1:
            first = n if first is None else first
        elif first is not None:
            print(first, n)
            first = None


def main(args):
    command, path, *rest = args
    if command == "serve":
        serve(path, rest[0], rest[1:])
    elif command == "abuse":
        abuse(path, rest[0])
    elif command == "stats":
        print(stats(path)[rest[0]])
    elif command == "stale":
        stale(path)
    elif command == "exercise":
        exercise(path, rest[0], float(rest[1]), int(rest[2]), *map(int, rest[3:]))
    elif command == "read":
        compare(path, int(rest[0]), int(rest[1]), os.open(rest[2], os.O_RDONLY))
    elif command == "zero":
        first, _, count = rest[0].partition("+")
        control = open_control()
        attach(control, path)
        fcntl.ioctl(control, HYDRATE, hydrate_arg(int(first), int(count), flags=ZEROES))
    elif command == "copy":
        image, fd = os.open(rest[0], os.O_RDONLY), open_direct(path)
        for place in rest[1:]:
            first, _, count = place.partition("+")
            first, count = int(first), int(count or 1)
            os.pwritev(fd, [aligned(image_blocks(image, first, count))], first * BLOCK)
    else:
        raise SystemExit(__doc__)


main(sys.argv[1:])
