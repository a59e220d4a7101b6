#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Bytes that a machine fetches to go from one image to another, by tool. Run by tests/bench/update, in the sysroot.

    update.py IMAGES TRIMMED WORK PRISTINE [PAIR TOOL]    measures what WORK does not hold yet; writes WORK/<pair>/<tool>.json and WORK.json

Images are given as they are, with what was deleted in blocks that ext4 counts as free: Pristine leaves that out by itself, the others ship
it. They are also measured as <tool>-trimmed, with images from which free blocks were punched first, as a careful administrator does; the
details have those too. The bytes are those that nginx sent in bodies, headers of parts included: index and all. RAUC streams through nbd and
dm-verity, which need a kernel that has them and a slot to install to; its bytes are computed from what it would read:
the block hash index, and the squashfs blocks (128 KiB, zstd) that hold a 4 KiB chunk which is neither zero nor in the old
image. What is left out of that (verity hashes, metadata, read-ahead) is in its favour.
"""
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time

PAIRS = ["rebuilt", "upgraded", "added"]
CHUNK = 4096
SQUASHFS_BLOCK = 128 << 10


def run(*command, **kwargs):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


class Server:
    """nginx over a directory; `sent` are the bytes of bodies, known once it has stopped."""

    def __init__(self, root, work):
        self.root, self.log = root, os.path.join(work, "access.log")
        self.conf = os.path.join(work, "nginx.conf")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        if os.path.exists(self.log):
            os.remove(self.log)
        with open(self.conf, "w") as conf:
            conf.write(
                f"daemon off; worker_processes 1; user root; pid {self.conf}.pid; error_log {self.conf}.err;\n"
                "events { worker_connections 256; }\n"
                "http { log_format bytes '$status $body_bytes_sent $request_uri';\n"
                f"access_log {self.log} bytes; client_body_temp_path {self.conf}.tmp; max_ranges 100000;\n"
                "large_client_header_buffers 4 256k; default_type application/octet-stream;\n"
                f"server {{ listen 127.0.0.1:{self.port}; root {self.root}; }} }}\n"
            )
        self.nginx = subprocess.Popen(["nginx", "-c", self.conf])
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                time.sleep(0.05)
        sys.exit("nginx does not start")

    def __exit__(self, *_):
        # SIGQUIT: requests are ended and logged first.
        self.nginx.send_signal(3)
        self.nginx.wait()
        self.requests = self.sent = 0
        with open(self.log) as log:
            for line in log:
                self.requests += 1
                self.sent += int(line.split()[1])


def same(a, b):
    run("cmp", a, b)


def size_of(path):
    return sum(os.path.getsize(os.path.join(top, name)) for top, _, names in os.walk(path) for name in names)


def fetch(work, root, command):
    """Runs `command(url)` against nginx; bytes, requests and seconds."""
    with Server(root, work) as server:
        start = time.monotonic()
        command(server.url)
        seconds = time.monotonic() - start
    return {"bytes": server.sent, "requests": server.requests, "seconds": round(seconds, 2)}


def casync(old, new, work):
    store, index = f"{work}/www/store", f"{work}/www/new.caibx"
    run("casync", "make", f"--store={store}", f"{work}/old.caibx", old)
    start = time.monotonic()
    run("casync", "make", f"--store={store}", index, new)
    made = time.monotonic() - start
    result = fetch(work, f"{work}/www", lambda url: run(
        "casync", "extract", f"--seed={old}", f"--store={url}/store", f"{url}/new.caibx", f"{work}/out"))
    same(new, f"{work}/out")
    result["make_seconds"] = round(made, 1)
    result["store"] = size_of(store) + os.path.getsize(index) + os.path.getsize(f"{work}/old.caibx")
    return result


def zchunk(old, new, work):
    os.mkdir(f"{work}/seed")
    run("zck", "-o", f"{work}/seed/old.zck", old)
    run("zck", "-o", f"{work}/www/new.zck", new)
    result = fetch(work, f"{work}/www", lambda url: run(
        "zckdl", "-s", f"{work}/seed/old.zck", f"{url}/new.zck", cwd=work))
    same(f"{work}/www/new.zck", f"{work}/new.zck")
    return result


def zsync(old, new, work):
    run("cp", "--sparse=always", new, f"{work}/www/new.img")
    run("zsyncmake", "-u", "new.img", "-o", f"{work}/www/new.img.zsync", f"{work}/www/new.img")
    # The target is looked at too; it must not be there.
    result = fetch(work, f"{work}/www", lambda url: run(
        "zsync", "-q", "-i", old, "-o", f"{work}/out", f"{url}/new.img.zsync"))
    same(new, f"{work}/out")
    return result


def rauc(old, new, work):
    zero = bytes(CHUNK)
    known, index, units = {zero}, [], 0
    with open(old, "rb") as image:
        while chunk := image.read(CHUNK):
            if chunk != zero:
                known.add(hashlib.sha256(chunk).digest())
    os.mkdir(f"{work}/read")
    with open(new, "rb") as image, open(f"{work}/read/image", "wb") as needed:
        while unit := image.read(SQUASHFS_BLOCK):
            missing = False
            for at in range(0, len(unit), CHUNK):
                chunk = unit[at:at + CHUNK]
                digest = hashlib.sha256(chunk).digest()
                index.append(digest)
                missing |= chunk != zero and digest not in known
            if missing:
                needed.write(unit)
                units += 1
    with open(f"{work}/read/index", "wb") as out:
        out.write(b"".join(index))
    run("mksquashfs", f"{work}/read", f"{work}/read.squashfs", "-comp", "zstd", "-no-fragments", "-no-duplicates", "-noappend",
        "-no-xattrs", "-quiet", "-no-progress")
    return {"bytes": os.path.getsize(f"{work}/read.squashfs"), "computed": True, "units": units}


def full_zst(_, new, work):
    run("zstd", "-q", "-9", "-T0", new, "-o", f"{work}/www/new.img.zst")
    result = fetch(work, f"{work}/www", lambda url: run("sh", "-c", f"curl -sf {url}/new.img.zst | zstd -dq -o {work}/out"))
    same(new, f"{work}/out")
    return result


def fill(store, disk, image):
    """A machine's disk as it is filled from the image."""
    open(disk, "w").close()
    run(PRISTINE, "image", "apply", store, disk, "--image", image)
    check_is(store, disk, image)


def check_is(store, disk, image):
    """Every block of the disk is the image's, by its digests."""
    found = json.loads(run(PRISTINE, "image", "apply", store, disk, "--image", image, "--dry-run", "--json"))
    if (found["method"], found["from"]) != ("none", image):
        sys.exit(f"{disk} is not image {image}: {found}")


def pristine(old, new, work):
    """Publishes both to a channel, and takes a machine's disk from one to the other in place."""
    store, disk = f"{work}/www", f"{work}/disk"
    shutil.rmtree(store)
    seconds = {}
    for name, image in (("old", old), ("new", new)):
        # What is built next to what is there stores each block once.
        start = time.monotonic()
        built = json.loads(run(PRISTINE, "image", "build", image, "-o", store, "--name", name, "--json"))
        seconds[f"build_{name}"] = time.monotonic() - start
        start = time.monotonic()
        published = json.loads(run(PRISTINE, "image", "publish", store, store, "--image", built["image"], "--channel", "stable",
                                   "--json"))
        seconds[f"publish_{name}"] = time.monotonic() - start
        # The machine's disk holds the image, in which free blocks are zero.
        if name == "old":
            fill(store, disk, built["image"])
    plan = json.loads(run(PRISTINE, "image", "apply", store, disk, "--image", "stable", "--dry-run", "--json"))
    applied = {}

    def apply(url):
        applied.update(json.loads(run(PRISTINE, "image", "apply", url, disk, "--image", "stable", "--json")))

    result = fetch(work, store, apply)
    check_is(store, disk, built["image"])
    result |= {
        "store": size_of(store), "delta": published["delta_bytes"], "method": applied["method"],
        "dry_run_bytes": plan["to_fetch_bytes"], "blocks_changed": applied["blocks_changed"],
        "blocks_moved": applied["blocks_moved"], "blocks_new": applied["blocks_new"],
        **{f"{name}_seconds": round(value, 1) for name, value in seconds.items()},
    }
    return result


def pristine_without_delta(old, new, work):
    """The same, without a delta in the store."""
    store, disk = f"{work}/www", f"{work}/disk"
    shutil.rmtree(store)
    ids = [json.loads(run(PRISTINE, "image", "build", image, "-o", store, "--json"))["image"] for image in (old, new)]
    fill(store, disk, ids[0])
    result = fetch(work, store, lambda url: run(PRISTINE, "image", "apply", url, disk, "--image", ids[1]))
    check_is(store, disk, ids[1])
    return result


OURS = {"pristine": pristine, "pristine-no-delta": pristine_without_delta}
PEERS = {"casync": casync, "zsync": zsync, "zchunk": zchunk, "rauc-adaptive": rauc, "img.zst": full_zst}


def measure(tool, function, old, new, out):
    """One measurement, unless it is there already."""
    path = f"{out}/{tool}.json"
    if not os.path.exists(path):
        work = f"{out}/work"
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(f"{work}/www")
        result = function(old, new, work)
        shutil.rmtree(work)
        with open(path + ".new", "w") as file:
            json.dump(result, file)
        os.rename(path + ".new", path)
    with open(path) as file:
        result = json.load(file)
    print(f"{os.path.basename(out):20} {tool:16} {result['bytes']:>12,}", flush=True)
    return result


def table(results, out):
    """The figures, and whether the goal is met."""
    tools = [*OURS, *PEERS]
    print(f"{'bytes fetched':22}", *(f"{tool:>17}" for tool in tools))
    good = True
    for pair, by_tool in results.items():
        ours = by_tool["pristine"]
        for kind in "", "-trimmed":
            row = [by_tool.get(tool if tool in OURS else tool + kind) for tool in tools]
            print(f"{pair + kind:22}", *(f"{result['bytes']:>17,}" for result in row))
            best = min(by_tool[tool + kind]["bytes"] for tool in PEERS)
            store = by_tool["casync" + kind]["store"]
            print(f"{'':22} {ours['bytes'] / best:.3f} of the best other; the store for both {ours['store']:,}, casync's {store:,}")
            if not kind:
                good &= ours["bytes"] <= 0.6 * best and ours["store"] < store
    with open(out + ".new", "w") as file:
        json.dump({pair: {tool: result["bytes"] for tool, result in by_tool.items()} for pair, by_tool in results.items()}
                  | {"details": results, "goal_met": good}, file, indent=1)
    os.rename(out + ".new", out)
    print("the goal (at most 0.6 of the best other, a smaller store) is", "met" if good else "NOT met")
    return good


def main():
    global PRISTINE
    images, trimmed, out, PRISTINE = map(os.path.abspath, sys.argv[1:5])
    only = sys.argv[5:]
    measures = [(tool, function, images) for tool, function in (OURS | PEERS).items()]
    measures += [(tool + "-trimmed", function, trimmed) for tool, function in PEERS.items()]
    results = {}
    for pair in PAIRS:
        os.makedirs(f"{out}/{pair}", exist_ok=True)
        for tool, function, source in measures:
            if not only or only == [pair, tool]:
                result = measure(tool, function, f"{source}/base.img", f"{source}/{pair}.img", f"{out}/{pair}")
                results.setdefault(pair, {})[tool] = result
    if not only:
        sys.exit(0 if table(results, out + ".json") else 1)


PRISTINE = "pristine"
main()
