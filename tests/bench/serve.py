# SPDX-License-Identifier: GPL-2.0
"""An image of 2 GiB for 200 clients at once, from `pristine serve` and from nginx.

    serve.py measure WORK LOAD FILE ROUNDS SECONDS    measures; WORK is a directory for 2 GiB
    serve.py table FILE                               prints the result

The image is noise, so its packs are as large as it is. All of it is in the page cache. Clients fetch for as long as a round
takes, each from another place: whole packs; ranges of 2 MiB, as a machine that takes all of an image; ranges of 64 KiB at random
places, as machines that read what they need. What they get is not kept (userspace-ctl/server/examples/load.rs).

The last line of each mode is the median of the rounds' ratios: throughput, nginx's p99 to ours, its CPU time to ours.

nginx has its best settings for static files: sendfile, tcp_nopush, one worker for one CPU, no log.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time

PRISTINE = "build/userspace/pristine"
SIZE = 2 << 30
CLIENTS = 200
MODES = ["packs", "ranges", "frames"]
PACK_ROUNDS = 3
SERVERS = ["pristine", "nginx"]
TICKS = os.sysconf("SC_CLK_TCK")

NGINX = """
worker_processes 1;
daemon off;
master_process off;
pid {work}/nginx.pid;
error_log {work}/nginx.log error;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    tcp_nodelay on;
    keepalive_requests 1000000000;
    server {{
        listen 127.0.0.1:{port};
        root {store};
    }}
}}
"""


def run(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def make_store(work):
    image, store = f"{work}/image", f"{work}/store"
    run("dd", "if=/dev/urandom", f"of={image}", "bs=1M", f"count={SIZE >> 20}", "status=none")
    run(PRISTINE, "--quiet", "image", "build", image, "-o", store, "--channel", "bench")
    os.unlink(image)
    # Into the page cache.
    for directory, _, files in os.walk(f"{store}/packs"):
        for name in files:
            with open(f"{directory}/{name}", "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
    return store


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port):
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    sys.exit(f"nothing listens on port {port}")


def start(server, work, store):
    """Starts a server on the first CPU."""
    port = free_port()
    if server == "nginx":
        with open(f"{work}/nginx.conf", "w", encoding="utf-8") as file:
            file.write(NGINX.format(work=work, port=port, store=store))
        command = ["nginx", "-p", work, "-c", f"{work}/nginx.conf"]
    else:
        command = [PRISTINE, "--quiet", "serve", store, "--listen", f"127.0.0.1:{port}", "--threads", "1"]
    # nginx would serve as a user that may not read the store.
    if server == "nginx":
        command += ["-g", "user root;"]
    process = subprocess.Popen(["taskset", "-c", "0", *command], stdout=subprocess.DEVNULL)
    wait_for(port)
    return process, port


def cpu_seconds(process):
    with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(work, load, path, rounds, seconds):
    store = make_store(work)
    servers = {server: start(server, work, store) for server in SERVERS}
    # The first round is for what is made once, and does not count.
    samples = {mode: {server: [] for server in SERVERS} for mode in MODES}
    try:
        for turn in range(rounds + 1):
            for mode in MODES:
                # Who fetches a whole pack takes all of it, whatever the time: that is 12 GiB in a round.
                if mode == "packs" and turn > PACK_ROUNDS:
                    continue
                for server in SERVERS if turn % 2 else SERVERS[::-1]:
                    process, port = servers[server]
                    before = cpu_seconds(process)
                    said = run("taskset", "-c", "1", load, f"127.0.0.1:{port}", store, mode, str(CLIENTS),
                               str(seconds if turn else 1))
                    sample = json.loads(said)
                    spent = cpu_seconds(process) - before
                    sample["cpu_s_per_gib"] = spent / (sample.pop("bytes") / (1 << 30))
                    sample["cpu_us_per_request"] = spent * 1e6 / max(sample["requests"], 1)
                    if turn:
                        samples[mode][server].append(sample)
    finally:
        for process, _ in servers.values():
            process.terminate()
            process.wait()
    result = {}
    for mode in MODES:
        result[mode] = {}
        for server in SERVERS:
            of = samples[mode][server]
            result[mode][server] = {key: round(statistics.median(s[key] for s in of), 3) for key in of[0]}
        pairs = list(zip(samples[mode]["pristine"], samples[mode]["nginx"]))
        result[mode]["ratio"] = round(statistics.median(p["mibs"] / n["mibs"] for p, n in pairs), 3)
        # What other work on the host does to the rates it hardly does to this.
        result[mode]["cpu_ratio"] = round(
            statistics.median(n["cpu_s_per_gib"] / p["cpu_s_per_gib"] for p, n in pairs), 3)
        result[mode]["p99_ratio"] = round(statistics.median(n["p99_ms"] / p["p99_ms"] for p, n in pairs), 3)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


def table(path):
    with open(path, encoding="utf-8") as file:
        result = json.load(file)
    print(f"{'':8} {'server':10} {'MiB/s':>9} {'p50 ms':>9} {'p99 ms':>9} {'CPU us/req':>10} {'CPU s/GiB':>10}")
    for mode, of in result.items():
        for server in SERVERS:
            s = of[server]
            print(f"{mode:8} {server:10} {s['mibs']:9.0f} {s['p50_ms']:9.2f} {s['p99_ms']:9.2f} "
                  f"{s['cpu_us_per_request']:10.1f} {s['cpu_s_per_gib']:10.3f}")
        print(f"{mode:8} {'of nginx':10} {of['ratio']:9.2f} {'':9} {of['p99_ratio']:9.2f} {'':10} {of['cpu_ratio']:10.2f}"
              "    (above 1: better)")


if __name__ == "__main__":
    if len(sys.argv) == 7 and sys.argv[1] == "measure":
        measure(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    elif len(sys.argv) == 3 and sys.argv[1] == "table":
        table(sys.argv[2])
    else:
        sys.exit(__doc__)
