# SPDX-License-Identifier: GPL-2.0
"""Reads of what is not there yet, and how fast all of it comes.

    fetch.py guest MODULES ROUNDS    measures; in the guest
    fetch.py table FILE              prints the result

The data device is a memory disk. The image lies in memory too: as a store that `pristine serve` serves on the loopback
interface, and as a raw file that nbdkit serves there. Each job begins with nothing on the data device.

pristine keeps what it has fetched, a frame of 32 blocks at a time; dm-clone (no_hydration) does not keep what is read, so it
fetches a block again that is read again. No block is read twice here. The jobs at random places read all of 64 MiB, or (`few`)
2,000 or 8,000 blocks of 191 MiB, most of which are the only ones of their frame at QD1.

Over loopback all that counts is the CPU, which is an emulated one here, some 25 times slower than a real one. So hydration is
measured over a link, too: of 200 Mbit/s, which is to this CPU what 5 Gbit/s are to a real one.
"""

import json
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stacks import MIB, PRISTINE, run  # noqa: E402  (needs the path above)

IMAGE = "build/bench/fetch.img"
WORK = "/run/fetch"
DATA, META, DEVICE = "/dev/ram0", "/dev/ram1", "/dev/mapper/bench"
SERVER, NBD_PORT = "127.0.0.1:8080", "10809"
STACKS = ["pristine", "clone"]
LINK = "200mbit"
HYDRATION = ["hydrate", "hydrate_link"]
JOBS = {
    "randread_4k_qd1": ["--ioengine=psync", "--rw=randread", "--bs=4k", "--size=64m"],
    "randread_4k_qd32": ["--ioengine=libaio", "--iodepth=32", "--rw=randread", "--bs=4k", "--size=64m"],
    "randread_4k_few_qd1": ["--ioengine=psync", "--rw=randread", "--bs=4k", "--number_ios=2000"],
    "randread_4k_few_qd32": ["--ioengine=libaio", "--iodepth=32", "--rw=randread", "--bs=4k", "--number_ios=8000"],
    "read_128k_qd1": ["--ioengine=psync", "--rw=read", "--bs=128k"],
    "read_1m_qd4": ["--ioengine=libaio", "--iodepth=4", "--rw=read", "--bs=1m"],
}


class Machine:
    """The disks, the image and its servers."""

    def __init__(self, modules):
        self.size = os.path.getsize(IMAGE)
        self.background = []
        run("modprobe", "-d", modules, "brd", "rd_nr=2", f"rd_size={(self.size // MIB + 16) * 1024}")
        run("modprobe", "-d", modules, "nbd", "nbds_max=1")
        run("ip", "link", "set", "lo", "up")
        os.makedirs(WORK, exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", WORK)
        self.image = f"{WORK}/image"
        run("cp", IMAGE, self.image)
        built = run(PRISTINE, "--json", "image", "build", self.image, "-o", f"{WORK}/pri")
        self.id = json.loads(built.stdout)["image"]
        run(PRISTINE, "image", "publish", f"{WORK}/pri", f"{WORK}/store", "--channel", "bench")
        self.start(PRISTINE, "serve", f"{WORK}/store", "--listen", SERVER)
        self.start("nbdkit", "-f", "-r", "--port", NBD_PORT, "--ipaddr", "127.0.0.1", "file", self.image)
        time.sleep(2)
        # Memory disks allocate at the first write.
        run("dd", "if=/dev/zero", f"of={DATA}", "bs=1M", f"count={self.size // MIB}", "oflag=direct")
        run("nbd-client", "127.0.0.1", NBD_PORT, "/dev/nbd0")

    def start(self, *command):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(f"{WORK}/said", "ab"))
        self.background.append(process)
        return process

    def make(self, stack, hydrate="off"):
        """A device with nothing of the image on it; returns the helper."""
        if stack == "clone":
            run("dd", "if=/dev/zero", f"of={META}", "bs=1M", "count=4", "oflag=direct")
            features = "0" if hydrate == "full" else "1 no_hydration"
            run("dmsetup", "create", "bench", "--table", f"0 {self.size // 512} clone {META} {DATA} /dev/nbd0 8 {features}")
            return None
        done = run(PRISTINE, "--json", "device", "format", DATA, "--metadata", META, "--force", "--initial", "stale",
                   "--image", self.id, "--image-size", str(self.size))
        length = json.loads(done.stdout)["managed_bytes"] // 512
        run("dmsetup", "create", "bench", "--table", f"0 {length} pristine {DATA} {META}")
        return self.start("build/userspace/pristined", "--device", "bench", "--store", f"http://{SERVER}", "--hydrate", hydrate)

    def remove(self, helper):
        if helper is not None:
            helper.terminate()
            helper.wait()
        run("dmsetup", "remove", "--retry", "bench")

    def read(self, stack, name, seed):
        """One fio job on a fresh device."""
        helper = self.make(stack)
        if helper is not None:
            # The first read waits for the manifest, which belongs to starting and not to reading.
            run("dd", f"if={DEVICE}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct", f"skip={self.size // 4096 - 1}")
        done = run("fio", f"--name={name}", f"--filename={DEVICE}", "--direct=1", f"--randseed={seed}",
                   "--output-format=json", f"--size={self.size - MIB}", *JOBS[name])
        part = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]["read"]
        self.remove(helper)
        return {"iops": part["iops"], "mibs": part["bw_bytes"] / MIB, "p99_us": part["clat_ns"]["percentile"]["99.000000"] / 1e3}

    def hydrate(self, stack):
        """MiB/s until all of it is there."""
        begin = time.perf_counter()
        if stack == "copy":
            run("sh", "-c", f"curl -sS --fail {self.urls()} | dd of={DATA} bs=1M iflag=fullblock oflag=direct "
                f"count={self.size // MIB}")
        else:
            helper = self.make(stack, "full")
            if helper is not None:
                helper.wait()
                if helper.returncode != 0:
                    sys.exit(f"pristined ended with {helper.returncode}")
            else:
                while not self.is_hydrated():
                    time.sleep(0.05)
        rate = self.size / MIB / (time.perf_counter() - begin)
        if stack != "copy":
            run("dmsetup", "remove", "--retry", "bench")
        return {"mibs": rate}

    def link(self, rate):
        """Makes the loopback interface a link of this rate; `None` for none."""
        run("tc", "qdisc", "del", "dev", "lo", "root", quiet=True)
        if rate is not None:
            run("tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", "256k", "latency", "200ms")

    def urls(self):
        """Objects of the store, as many as make up the size of the image: the server gives nothing else."""
        packs, total = [], 0
        for place, _, names in os.walk(f"{WORK}/store/packs"):
            packs += [os.path.join(place, name) for name in names]
        urls = []
        while total < self.size:
            pack = packs[len(urls) % len(packs)]
            urls.append(f"http://{SERVER}/{os.path.relpath(pack, f'{WORK}/store')}")
            total += os.path.getsize(pack)
        return " ".join(urls)

    @staticmethod
    def is_hydrated():
        # ... clone <metadata block> <used/total> <region> <hydrated/total> ...
        hydrated, total = run("dmsetup", "status", "bench").stdout.split()[6].split("/")
        return hydrated == total


def guest(modules, rounds):
    os.environ["TMPDIR"] = "/tmp"
    machine = Machine(modules)
    found = {stack: {} for stack in STACKS + ["copy"]}

    def note(stack, job, figures):
        found[stack].setdefault(job, []).append(figures)
        print(f"# {stack} {job} " + " ".join(f"{k}={v:.1f}" for k, v in figures.items()), flush=True)

    for number in range(rounds):
        for job in JOBS:
            for stack in STACKS:
                note(stack, job, machine.read(stack, job, number + 1))
        for stack in STACKS + ["copy"]:
            note(stack, "hydrate", machine.hydrate(stack))
        machine.link(LINK)
        for stack in ("pristine", "copy"):
            note(stack, "hydrate_link", machine.hydrate(stack))
        machine.link(None)
    for process in machine.background:
        process.kill()
    median = {stack: {job: {k: round(statistics.median(r[k] for r in rounds), 1) for k in rounds[0]}
                      for job, rounds in jobs.items()} for stack, jobs in found.items()}
    print("BENCH " + json.dumps(median), flush=True)


def table(path):
    with open(path) as file:
        result = json.load(file)
    print("reads of what is not there yet, and hydration (ratio to dm-clone over nbd; hydration: to a plain copy)")
    print(f"{'':<20}" + "".join(f"{name:>30}" for name in ("IOPS", "MiB/s", "p99, us")))
    for job in [*JOBS, *HYDRATION]:
        for stack in [*STACKS, "copy"]:
            figures = result[stack].get(job)
            if figures is None:
                continue
            base = result["copy" if job in HYDRATION else "clone"][job]
            row = f"{job if stack == STACKS[0] else '':<20}"
            for key in ("iops", "mibs", "p99_us"):
                value = figures.get(key)
                row += f"{'' if value is None else f'{stack} {value:,.1f} ({value / base[key]:.2f})':>30}"
            print(row)


if __name__ == "__main__":
    if sys.argv[1] == "guest":
        guest(sys.argv[2], int(sys.argv[3]))
    else:
        table(sys.argv[2])
