# SPDX-License-Identifier: GPL-2.0
"""What taking changes back costs.

    revert.py guest MODULES               instant reverts of a device of 1 TiB; in the guest
    revert.py eager|boot DIRECTORY FILE   with whole machines; on the host, in the sysroot
    revert.py table DIRECTORY             joins revert-{instant,eager,boot}.json there; prints a table
"""

import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "../demo")]
from stacks import MIB, PRISTINE, run, sectors  # noqa: E402  (needs the path above)

SIZE_KIB = 1 << 30
DATA, META = "/dev/ram0", "/dev/mapper/meta"
DIRTY_MIB = {"1 MiB": 1, "100 MiB": 100, "10 GiB": 10 << 10, "1 TiB": None}
SET_DIRTY = "/run/payload/set-dirty"
IMAGE = "5c1f" * 16
ROUNDS = 3
EAGER_MIB = 256
UNDO_MIB = 512


# -- instant, in the guest --------------------------------------------------------------------------

def timed(*command):
    """What a command prints, and the milliseconds that it took."""
    begin = time.perf_counter_ns()
    done = run(*command)
    return done.stdout, (time.perf_counter_ns() - begin) / 1e6


def guest(modules):
    """Instant reverts of a device of 1 TiB."""
    run("modprobe", "-d", modules, "brd", "rd_nr=2", f"rd_size={SIZE_KIB}")
    run("dmsetup", "create", "meta", "--table", f"0 {sectors(DATA) // 1000 // 8 * 8} linear /dev/ram1 0")
    size = sectors(DATA) * 512 - MIB
    figures = {}
    for name, mib in {"nothing": 0, **DIRTY_MIB}.items():
        times = {"revert": [], "activate": []}
        for _ in range(ROUNDS):
            run(PRISTINE, "--json", "device", "format", DATA, "--metadata", META, "--force", "--initial", "clean",
                "--image", IMAGE, "--image-size", str(size))
            subprocess.run([SET_DIRTY, DATA, META, "full" if mib is None else f"spread:{mib}"], check=True)
            said, ms = timed(PRISTINE, "--json", "device", "revert", DATA, "--metadata", META)
            times["revert"].append(ms)
            reverted = json.loads(said)["reverted"]
            wanted = size // 4096 if mib is None else mib * 256
            if reverted != wanted:
                sys.exit(f"{name}: {reverted} blocks were reverted, not {wanted}")
            table = f"0 {size // 512} pristine {DATA} {META} 2 checkpoint_ms 0"
            _, ms = timed("dmsetup", "create", "bench", "--table", table)
            times["activate"].append(ms)
            run("dmsetup", "remove", "bench")
        for what, values in times.items():
            figures[f"{what}_ms {name}"] = round(statistics.median(values), 1)
            print(f"# {what} {name}: {figures[f'{what}_ms {name}']} ms", flush=True)
    print("BENCH " + json.dumps(figures), flush=True)


# -- eager, against a plain copy --------------------------------------------------------------------

COPY = """
set -e
mkdir -p /run/pristine
begin=$(date +%s%N)
curl -sS --fail URLS | dd of=/dev/vda bs=1M iflag=fullblock conv=fsync status=none
echo "COPY $(( ($(date +%s%N) - begin) / 1000000 ))"
insmod KO
status=0
build/userspace/pristine-agent run || status=$?
[ $status = 40 ]
"""


def eager(directory, path):
    """The agent's revert of a whole disk of bytes that do not compress, against curl and dd."""
    import lab  # noqa: PLC0415  (only the host has what it needs)
    os.makedirs(directory)
    raw = os.path.join(directory, "raw.img")
    dice = random.Random(4)
    with open(raw, "wb") as f:
        for _ in range(EAGER_MIB):
            f.write(dice.randbytes(MIB))
    store = lab.make_store(raw, directory)
    packs = [os.path.join(where[len(store) + 1:], name) for where, _, names in os.walk(os.path.join(store, "packs"))
             for name in names]
    packed = sum(os.path.getsize(os.path.join(store, pack)) for pack in packs)
    with open(os.path.join(store, "channels/stable"), encoding="ascii") as f:
        image = re.search(r"^image (\w+)$", f.read(), re.M)[1]
    data, meta = (os.path.join(directory, name) for name in ("data.img", "meta.img"))
    figures = {"mib": EAGER_MIB, "copy_ms": [], "eager_ms": [], "bytes_fetched": 0, "requests": 0}
    release = lab.vm.default_release()
    with lab.Server(store, directory) as server:
        for n in range(ROUNDS):
            # Another content than the image's, on disks that are allocated, so that both write over what is there.
            for name, size in ((data, os.path.getsize(raw) + (8 << 20)), (meta, 16 << 20)):
                subprocess.run(["dd", "if=/dev/zero", f"of={name}", "bs=1M", f"count={size >> 20}", "status=none"],
                               check=True)
            lab.pristine("device", "format", data, "--metadata", meta, "--force", "--initial", "dirty", "--image", image,
                         "--image-size", os.path.getsize(raw), "--generation", 1)
            urls = " ".join(f"{server.url}/{pack}" for pack in packs)
            command = COPY.replace("URLS", urls).replace("KO", f"build/{release}/dm-pristine.ko")
            boot = lab.vm.Vm(
                name=f"eager-{n}", command=command, net="", disks=[f"{data}.copy", data, meta], modules=["dm_mod"],
                memory=2048, log_dir=os.path.join(directory, f"boot-{n}"), timeout=600, quiet=True,
                append=f"pristine.data=/dev/vdb pristine.metadata=/dev/vdc pristine.store={server.url} "
                       "pristine.image=stable pristine.ip=off pristine.then=poweroff")
            shutil.copy(data, f"{data}.copy")
            status = boot.run()
            lines = [*boot.console, *boot.output]
            report = next((json.loads(found[1]) for found in map(lab.REPORT.search, lines) if found), None)
            copied = next((int(found[1]) for found in (re.search(r"COPY (\d+)", line) for line in lines) if found), None)
            if status != 0 or not report or not copied or report["blocks_fetched"] != EAGER_MIB * 256:
                raise lab.Failure(f"round {n} ended with {status}, {report}, {copied}; see {boot.log_dir}")
            figures["copy_ms"].append(copied)
            figures["eager_ms"].append(report["revert_ms"])
            figures.update({key: report[key] for key in ("bytes_fetched", "requests")})
    for what in ("copy", "eager"):
        figures[f"{what}_mib_s"] = round(EAGER_MIB / statistics.median(figures[f"{what}_ms"]) * 1000, 1)
    figures["packed_bytes"] = packed
    # Each round's two come right after each other, when the host is as busy for one as for the other.
    pairs = zip(figures["copy_ms"], figures["eager_ms"])
    figures["eager_to_copy"] = round(statistics.median(copy / taken for copy, taken in pairs), 2)
    keep(figures, path)


# -- boots ------------------------------------------------------------------------------------------

def boots(directory, path):
    """Boots of a Debian: clean, reverted instantly, eagerly, and from its undo area."""
    import instant  # noqa: PLC0415
    import lab  # noqa: PLC0415
    machine, _, store = instant.provisioned_debian(directory)
    sessions = {}
    for name, file, text in (("use", "mib", "300"), ("look", "page", "This is the master image.")):
        sessions[name] = os.path.join(directory, name)
        shutil.copytree(os.path.join(instant.SESSIONS, name), sessions[name])
        with open(os.path.join(sessions[name], file), "w", encoding="ascii") as f:
            f.write(text + "\n")
    figures = {}

    def boot(name, machine, session, settings):
        done = machine.boot(name, server.url, settings=f"{instant.END} {settings}", timeout=3600,
                            session=machine.session_disk(sessions[session]))
        if session == "look" and done.status != 0:
            raise lab.Failure(f"{name}: {done.lines('WRONG')}")
        report = instant.report(done)
        at = instant.times(done)
        services = re.search(r"at ([0-9.]+) s", done.lines("session: at [0-9.]+ s$")[0])[1]
        figures[name] = {
            "root_s": at["mounted"], "from_agent_to_root_s": round(at["mounted"] - at["version"], 3), "services_s": float(services),
            **{key: report[key] for key in ("total_ms", "revert_ms", "network_ms", "blocks_dirty", "blocks_left",
                                            "blocks_undone", "bytes_fetched", "requests")}}
        for line in done.lines("^helper "):
            state = json.loads(line.split(" ", 1)[1])
            figures[name]["helper_requests"] = sum(s["requests"] for s in state["sources"])
            figures[name]["helper_bytes"] = sum(s["bytes"] for s in state["sources"])

    undone = with_undo_area(machine.clone(os.path.join(directory, "undone")), store)
    with lab.Server(store, directory) as server:
        boot("clean", machine, "use", "pristine.revert=instant")
        other = machine.clone(os.path.join(directory, "other"))
        boot("instant", machine, "look", "pristine.revert=instant")
        boot("eager", other, "look", "")
        boot("clean-undo", undone, "use", "pristine.revert=undo")
        boot("undo", undone, "look", "pristine.revert=undo")
        if figures["undo"]["blocks_undone"] != figures["undo"]["blocks_dirty"]:
            raise lab.Failure(f"the undo area did not have all originals: {figures['undo']}")
    keep(figures, path)


def with_undo_area(machine, store):
    """The machine, whose disk is the image's, with new metadata that has room for all that its session changes."""
    import lab  # noqa: PLC0415
    image = json.loads(lab.pristine("image", "list", store, "--json"))["channels"][0]
    os.unlink(machine.metadata)
    with open(machine.metadata, "wb") as f:
        f.truncate(UNDO_MIB + 64 << 20)
    lab.pristine("device", "format", machine.data, "--metadata", machine.metadata, "--force", "--initial", "clean",
                 "--image", image["image"], "--image-size", str(image["image_bytes"]), "--generation", str(image["generation"]),
                 "--undo", f"{UNDO_MIB}M")
    return machine


def keep(figures, path):
    """Writes the figures to a file."""
    with open(path, "w", encoding="ascii") as f:
        json.dump(figures, f, indent=1)


def table(directory):
    """Joins what there is, and prints it."""
    result = {}
    for part in ("instant", "eager", "boot"):
        path = os.path.join(directory, f"revert-{part}.json")
        if os.path.exists(path):
            with open(path, encoding="ascii") as f:
                result[part] = json.load(f)
    keep(result, os.path.join(directory, "revert.json"))
    if "instant" in result:
        print("instant revert of a device of 1 TiB, and its activation with stale blocks")
        for name in ("nothing", *DIRTY_MIB):
            ms = result["instant"]
            print(f"    {name + ' dirty':<24}{ms[f'revert_ms {name}']:>10,.1f} ms{ms[f'activate_ms {name}']:>10,.1f} ms")
    if "eager" in result:
        e = result["eager"]
        print(f"eager revert of {e['mib']} MiB: {e['eager_mib_s']} MiB/s; curl and dd: {e['copy_mib_s']} MiB/s; "
              f"{e['eager_to_copy']} of it; {e['requests']} requests, {e['bytes_fetched']:,} bytes")
    for name, b in result.get("boot", {}).items():
        print(f"boot, {name:<16}: agent to root {b['from_agent_to_root_s']:6.2f} s, root at {b['root_s']:6.2f} s, services at "
              f"{b['services_s']:6.2f} s; the agent fetched {b['bytes_fetched']:,} bytes in {b['requests']} requests, the helper "
              f"{b.get('helper_bytes', 0):,} in {b.get('helper_requests', 0)}")


def main():
    """See above."""
    what, *rest = sys.argv[1:]
    {"guest": guest, "eager": eager, "boot": boots, "table": table}[what](*rest)


if __name__ == "__main__":
    main()
