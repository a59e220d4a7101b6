# SPDX-License-Identifier: GPL-2.0
"""Scenarios with whole machines: provisioning, use, power cuts, and what goes wrong before a system starts.

tests/vm/e2e.sh runs each as `python3 scenarios.py NAME DIRECTORY`; what it makes goes to the directory.
"""

import fcntl
import hashlib
import os
import random
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import faulty  # noqa: E402  (needs the path above)
import lab  # noqa: E402

SESSIONS = os.path.join(lab.HERE, "sessions")
SHARED = os.path.join(lab.TOP, "build/test/e2e")
OFF = "pristine.then=poweroff"
# After a failure the machine goes off, so that the test ends.
END = "pristine.onerror=poweroff"


def must(condition, what):
    """Fails the scenario if something is not as it must be."""
    if not condition:
        raise lab.Failure(what)


def said(boot, pattern):
    """The machine said something that matches."""
    must(boot.lines(pattern), f"the console does not say {pattern!r}; last: {boot.console[-4:]}")


def identical(machine, master):
    """The whole data device is what it must be."""
    must(lab.is_identical(machine, master), f"the disk differs from its master image in blocks "
         f"{lab.differing_blocks(machine.data, master)[:10]}... or holds something behind it")


# -- what scenarios share ---------------------------------------------------------------------------

def shared(name, inputs, make):
    """A directory that is made once for all scenarios with the same inputs."""
    key = hashlib.sha256("\n".join(map(str, inputs)).encode()).hexdigest()[:12]
    path = os.path.join(SHARED, f"{name}-{key}")
    os.makedirs(SHARED, exist_ok=True)
    with open(os.path.join(SHARED, f".{name}.lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            # Those of other inputs are of no use any more.
            for old in os.listdir(SHARED):
                if old.startswith(name + "-"):
                    shutil.rmtree(os.path.join(SHARED, old), ignore_errors=True)
            os.makedirs(path + ".tmp")
            make(path + ".tmp")
            os.rename(path + ".tmp", path)
    return path


def stamp(path):
    """Changes when the file does."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def debian():
    """The master image of a real Debian, and a store that has it."""
    master = os.environ["PRISTINE_MASTER"]
    tools = [master, stamp(lab.CLI)]
    return master, os.path.join(shared("debian-store", tools, lambda d: lab.make_store(master, d)), "store")


def provisioned_debian(directory):
    """A machine that holds the Debian already, and was never booted; master and store as well."""
    master, store = debian()

    def make(path):
        with lab.Server(store, path) as server:
            machine = lab.Machine(path, os.path.getsize(master))
            machine.boot("provision", server.url, settings=f"{OFF} {END}")
            identical(machine, master)

    made = shared("provisioned", [master, stamp(lab.CLI), stamp(lab.AGENT)], make)
    machine = lab.Machine.__new__(lab.Machine)
    machine.__dict__.update(directory=made, data=os.path.join(made, "data.img"), boots=0,
                            metadata=os.path.join(made, "metadata.img"), initrd=os.path.join(made, "initramfs"))
    machine = machine.clone(os.path.join(directory, "machine"))
    # The module and the agent as they are now.
    machine.initrd = os.path.join(directory, "initramfs")
    lab.initramfs_build.build(machine.initrd, lab.vm.default_release(), agent=lab.AGENT)
    return machine, master, store


INIT = """#!/bin/busybox sh
/bin/busybox mount -o remount,rw /
/bin/busybox echo "small: the system runs, /etc/note says $(/bin/busybox cat /etc/note)" >/dev/console
/bin/busybox grep -q nowrite /proc/cmdline || /bin/busybox echo changed >/etc/note
n=0
while /bin/busybox grep -q busy /proc/cmdline; do
	/bin/busybox dd if=/dev/zero of=/data/$((n % 24)) bs=20k seek=$((n % 40)) count=9 conv=notrunc,fsync 2>/dev/null
	/bin/busybox mv /data/$(((n + 5) % 24)) /data/new$n && /bin/busybox mv /data/new$n /data/$(((n + 5) % 24))
	n=$((n + 1))
	/bin/busybox echo "small: round $n" >/dev/console
done
# The helper's watcher removes it when nothing is stale any more.
while /bin/busybox grep -q untilwhole /proc/cmdline && [ -e /run/pristine/helper-root.pid ]; do /bin/busybox sleep 0.2; done
/bin/busybox sync
/bin/busybox poweroff -f
"""


def small_image(path, seed, note="original"):
    """A small image with a system that says something, changes a file and goes off."""
    tree = path + ".tree"
    for name in ("bin", "sbin", "etc", "dev", "proc", "sys", "run", "data"):
        os.makedirs(os.path.join(tree, name))
    shutil.copy("/usr/bin/busybox", os.path.join(tree, "bin/busybox"))
    with open(os.path.join(tree, "sbin/init"), "w", encoding="ascii") as f:
        f.write(INIT)
    os.chmod(os.path.join(tree, "sbin/init"), 0o755)
    with open(os.path.join(tree, "etc/note"), "w", encoding="ascii") as f:
        f.write(note + "\n")
    dice = random.Random(1)
    for n in range(24):
        # Every eighth file is another one in each image.
        with open(os.path.join(tree, f"data/{n}"), "wb") as f:
            f.write((random.Random(seed * 100 + n) if n % 8 == 0 else dice).randbytes(1 << 20))
    with open(path, "wb") as f:
        f.truncate(64 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, "-U", "6f3c1f7e-0d4b-4a53-9a1f-2f0d5b1c7e12",
                    "-E", "hash_seed=3b9d1c52-7c0e-4c1c-8f5e-0a1b2c3d4e5e,lazy_itable_init=0", path],
                   check=True, env={**os.environ, "E2FSPROGS_FAKE_TIME": "1700000000"})
    shutil.rmtree(tree)


def small(directory, **options):
    """A small master image, a store that has it, and an empty machine for it."""
    os.makedirs(directory, exist_ok=True)
    master = os.path.join(directory, "master.img")
    small_image(master, 1)
    store = lab.make_store(master, directory)
    return lab.Machine(os.path.join(directory, "machine"), 64 << 20, metadata=options.pop("metadata", 4 << 20),
                       **options), master, store


# -- a real Debian ----------------------------------------------------------------------------------

def revert_after_a_reboot(directory):
    """A session breaks the system and reboots in order: the revert fetches what changed, exactly."""
    machine, master, store = provisioned_debian(directory)
    session = os.path.join(directory, "session")
    shutil.copytree(os.path.join(SESSIONS, "break"), session)
    with open(os.path.join(session, "reboot"), "w", encoding="ascii"):
        pass
    with lab.Server(store, directory) as server:
        boot = machine.boot("session", server.url, settings=END,
                            session=machine.session_disk(session, os.environ["DEMO_PACKAGE"]))
        said(boot, "session: rebooting")
        must(boot.report["mode"] == "clean" and boot.report["blocks_fetched"] == 0, "a clean disk was fetched")
        changed = len(lab.differing_blocks(machine.data, master))
        dirty = machine.counts()["dirty"]
        must(1000 < changed <= dirty, f"{changed} blocks changed, {dirty} are dirty: no superset")
        boot = machine.boot("revert", server.url, settings=f"{OFF} {END}")
        identical(machine, master)
        report = boot.report
        must(report["mode"] == "revert" and report["blocks_dirty"] == dirty, f"report: {report}")
        must(report["blocks_fetched"] + report["blocks_zeroed"] == changed,
             f"{changed} blocks changed, but {report['blocks_fetched']} fetched, {report['blocks_zeroed']} zeroed")
        must(report["bytes_fetched"] < os.path.getsize(master) // 20, f"bytes_fetched: {report['bytes_fetched']}")
        boot = machine.boot("check", server.url, settings=END,
                            session=machine.session_disk(os.path.join(SESSIONS, "check")))
        must(boot.status == 0, f"the system is not what it was: {boot.lines('WRONG')}")


def convergence_of_cuts_in_session_and_revert(directory):
    """The power goes in the middle of a session, and again in the middle of the revert."""
    machine, master, store = provisioned_debian(directory)
    with lab.Server(store, directory) as server:
        boot = machine.boot("session", server.url, settings=END, cut="session: unplug me",
                            session=machine.session_disk(os.path.join(SESSIONS, "break"),
                                                         os.environ["DEMO_PACKAGE"]))
        must(boot.was_cut, "the session came to no end")
        changed = lab.differing_blocks(machine.data, master)
        must(changed, "the session changed nothing")
        clean_means_equal(machine, master, "the session was cut")
        # The first progress comes before the first batch is done.
        boot = machine.boot("cut", server.url, settings=f"{OFF} {END}", cut="reverting: ")
        must(boot.was_cut, "the revert was not cut")
        must(machine.counts()["stale"] > 0, "the cut revert left nothing to do")
        boot = machine.boot("revert", server.url, settings=f"{OFF} {END}")
        must(boot.report["blocks_stale"] > 0, "the second revert did not go on from the first")
        identical(machine, master)


def convergence_of_cuts_in_provisioning(directory):
    """The power goes twice in the middle of provisioning; each time it goes on from where it was."""
    master, store = debian()
    machine = lab.Machine(os.path.join(directory, "machine"), os.path.getsize(master))
    with lab.Server(store, directory) as server:
        stale = machine_blocks = os.path.getsize(master) // lab.BLOCK
        for cut in ("provisioning: ([4-9]|[1-9]\\d) %", "provisioning: [1-9]\\d %"):
            boot = machine.boot("cut", server.url, settings=f"{OFF} {END} pristine.debug", cut=cut)
            must(boot.was_cut, "provisioning was not cut")
            left = machine.counts()["stale"]
            must(0 < left <= stale, f"{left} stale blocks after the cut, {stale} before")
            stale = left
        boot = machine.boot("provision", server.url, settings=f"{OFF} {END}")
        must(boot.report["mode"] == "provision", f"report: {boot.report}")
        must(boot.report["blocks_stale"] == stale < machine_blocks, "it began again instead of going on")
        identical(machine, master)


def clean_means_equal(machine, master, when):
    """Rules 2 and 4: what the metadata calls clean is the master's, byte for byte."""
    runs = [(r["start"], r["start"] + r["blocks"]) for r in machine.counts()["runs"] if r["state"] != "clean"]
    for block in lab.differing_blocks(machine.data, master):
        must(any(a <= block < b for a, b in runs), f"{when}: block {block} differs and is called clean")


def convergence_of_cuts_that_lose_writes(directory):
    """Disks with volatile caches; the power goes in provisioning, in use and in reverts, and takes with it, at random,
    what was not flushed. Nothing that differs is ever called clean, and it ends at the same bytes."""
    machine, master, store = small(directory)
    dice = random.Random(int(os.environ.get("TEST_SEED", "1")))
    rounds = 12 if os.environ.get("TEST_LONG") else 4
    lost = 0
    with lab.Server(store, directory) as server:

        def cut(what, pattern, settings):
            nonlocal lost
            boot = machine.boot(what, server.url, settings=f"{END} {settings}", cut=pattern, seed=dice.randrange(1 << 30),
                                timeout=200)
            lost += boot.lost_sectors
            if boot.was_cut:
                clean_means_equal(machine, master, f"boot {machine.boots} ({what}) was cut")
            return boot

        # The first progress comes with the first blocks.
        boot = cut("provision", "provisioning: ", OFF)
        must(boot.was_cut, "provisioning was not cut")
        for n in range(rounds):
            boot = cut("use", f"small: round {dice.randint(1, 25)}$", "busy")
            must(boot.was_cut, "the session was not cut")
            if n % 2:
                cut("revert", "reverting: ", OFF)
        boot = machine.boot("revert", server.url, settings=f"{OFF} {END}")
        must(boot.report is not None, "the last revert did not come to its end")
        identical(machine, master)
    must(lost > 0, "no cut lost anything: the test tests nothing")


# -- a small system ---------------------------------------------------------------------------------

def small_system_and_its_policies(directory):
    """Clean boots without a server; what a session changes comes back, stays with revert=off or boot-as-is."""
    machine, master, store = small(directory)
    with lab.Server(store, directory) as server:
        url = server.url
        boot = machine.boot("first", url, settings=END)
        said(boot, "small: the system runs, /etc/note says original")
        boot = machine.boot("revert", url, settings=f"{END} nowrite pristine.debug")
        said(boot, "/etc/note says original")
        must(boot.report["mode"] == "revert", f"report: {boot.report}")
        boot = machine.boot("clean", url, settings=f"{END} {OFF}")
        boot = machine.boot("change", url, settings=END)
        boot = machine.boot("keep", url, settings=f"{END} nowrite pristine.revert=off")
        said(boot, "/etc/note says changed")
        must(boot.report["mode"] == "as-is", f"report: {boot.report}")
    # From here on the server is down.
    boot = machine.boot("refuse", url, settings=f"{END} pristine.offline=refuse")
    said(boot, "error: cannot reach .*")
    said(boot, "what to do: is the server up")
    boot = machine.boot("as-is", url, settings=f"{END} nowrite pristine.offline=boot-as-is")
    said(boot, "booting what is on the disk, without the store .changes included")
    said(boot, "/etc/note says changed")
    with lab.Server(store, directory) as server:
        machine.boot("revert", server.url, settings=f"{OFF} {END}")
        identical(machine, master)
        url = server.url
    boot = machine.boot("clean", url, settings=f"{END} nowrite")
    said(boot, "it is the image, if perhaps not the newest")
    said(boot, "/etc/note says original")


def convergence_with_a_server_that_is_down(directory):
    """An empty machine waits for its server, and is provisioned when that comes."""
    machine, master, store = small(directory)
    with lab.Server(store, directory) as server:
        port = server.port
    servers = []

    def on_line(line):
        if "waiting for the store (pristine.offline=wait): attempt 2" in line and not servers:
            servers.append(lab.Server(store, directory, port=port))

    try:
        boot = machine.boot("wait", f"http://10.0.2.2:{port}", settings=f"{OFF} {END}", on_line=on_line)
    finally:
        for server in servers:
            server.stop()
    said(boot, "cannot reach")
    must(boot.report["mode"] == "provision", f"report: {boot.report}")
    identical(machine, master)
    other = lab.Machine(os.path.join(directory, "other"), 64 << 20)
    boot = other.boot("refuse", f"http://10.0.2.2:{port}", settings=f"{END} pristine.offline=boot-as-is")
    said(boot, "the disk holds nothing that could be booted until then")
    with open(other.data, "rb") as f:
        must(not any(f.read()), "a machine that got no image wrote to its disk")


def convergence_with_a_faulty_server(directory):
    """The server answers 500, stops in the middle of blocks, serves wrong ones: nothing wrong is ever kept."""
    fresh, master, store = small(directory)
    for fault in faulty.FAULTS:
        machine = fresh.clone(os.path.join(directory, f"sometimes-{fault}"))
        with faulty.Faulty(store, fault, times=5) as server:
            boot = machine.boot("sometimes", server.url, settings=f"{OFF} {END}")
            must(boot.report["mode"] == "provision", f"report: {boot.report}")
            must(server.spoilt == 5, f"only {server.spoilt} answers were spoilt")
        identical(machine, master)

        machine = fresh.clone(os.path.join(directory, f"always-{fault}"))
        with faulty.Faulty(store, fault, times=None) as server:
            boot = machine.boot("always", server.url, settings=f"{OFF} {END} pristine.offline=refuse")
        must(boot.report is None, "a machine without its image reported success")
        said(boot, {"500": "answered HTTP 500", "stop": "stopped after", "wrong": "wrong content"}[fault])
        said(boot, "going off .pristine.onerror=poweroff")
        counts = machine.counts()
        must(counts["stale"] > 0, "blocks that never arrived are not called stale")
        with lab.Server(store, directory) as server:
            machine.boot("good", server.url, settings=f"{OFF} {END}")
        identical(machine, master)


def an_update_fetches_what_differs(directory):
    """The channel moves on: the machine follows, and fetches only the blocks that differ."""
    machine, master, store = small(directory, metadata=0)
    second = os.path.join(directory, "second.img")
    small_image(second, 2, note="successor")
    with lab.Server(store, directory) as server:
        boot = machine.boot("first", server.url, settings=f"{OFF} {END}")
        must(not lab.differing_blocks(machine.data, master), "not provisioned (metadata in the tail)")
        built = os.path.join(directory, "second")
        lab.pristine("image", "build", second, "--output", built, "--level", 3)
        lab.pristine("image", "publish", built, store, "--channel", "stable")
        boot = machine.boot("update", server.url, settings=f"{END} nowrite")
        said(boot, "/etc/note says successor")
        report = boot.report
        must(report["mode"] == "update" and report["generation"] == 2, f"report: {report}")
        with open(master, "rb") as a, open(second, "rb") as b:
            left, right = a.read(), b.read()
        differ = sum(left[n:n + lab.BLOCK] != right[n:n + lab.BLOCK] for n in range(0, len(right), lab.BLOCK))
        must(report["blocks_fetched"] + report["blocks_zeroed"] == differ,
             f"{differ} blocks differ, {report['blocks_fetched']} were fetched")
        machine.boot("revert", server.url, settings=f"{OFF} {END}")
        must(not lab.differing_blocks(machine.data, second), "not updated")


def too_small_a_disk_is_refused(directory):
    """A data device that the image does not fit on is left alone."""
    machine, _, store = small(directory, spare=-(8 << 20))
    with lab.Server(store, directory) as server:
        boot = machine.boot("small", server.url, settings=f"{OFF} {END}")
    said(boot, "error: .*the image")
    said(boot, "what to do: use a larger device")
    with open(machine.data, "rb") as f:
        must(not any(f.read()), "the disk was written to")


def identity_and_damage_are_refused(directory):
    """Metadata of another device, and damaged metadata, stop the machine until somebody decides."""
    machine, master, store = small(directory)
    with lab.Server(store, directory) as server:
        url = server.url
        machine.boot("first", url, settings=f"{OFF} {END}")
        other = lab.Machine(os.path.join(directory, "other"), 64 << 20, metadata=4 << 20)
        other.boot("other", url, settings=f"{OFF} {END}")

        mixed = machine.clone(os.path.join(directory, "mixed"))
        shutil.copy(other.metadata, mixed.metadata)
        boot = mixed.boot("mixed", url, settings=END)
        must(boot.report is None, "the metadata of another device was taken")
        said(boot, "error: .*another")
        said(boot, "pristine.damaged=reprovision")

        damaged = machine.clone(os.path.join(directory, "damaged"))
        with open(damaged.metadata, "r+b") as f:
            for page in (0, 15):
                f.seek(page * lab.BLOCK + 100)
                byte = f.read(1)[0]
                f.seek(page * lab.BLOCK + 100)
                f.write(bytes([byte ^ 4]))
        boot = damaged.boot("damaged", url, settings=END)
        must(boot.report is None, "damaged metadata was taken")
        said(boot, "what to do: .*pristine.damaged=reprovision")
        boot = damaged.boot("again", url, settings=f"{OFF} {END} pristine.damaged=reprovision")
        must(boot.report["mode"] == "provision" and boot.report["blocks_fetched"] == 0,
             f"what was right on the disk was fetched again: {boot.report}")
        identical(damaged, master)


def bad_settings_are_named(directory):
    """A setting that is unknown is named; one that makes no sense stops the machine, with what it may be."""
    machine, _, store = small(directory)
    with lab.Server(store, directory) as server:
        url = server.url
        boot = machine.boot("nonsense", url, settings=f"{END} pristine.offline=maybe")
        said(boot, "error: pristine.offline=maybe: not one of wait, boot-as-is, refuse")
        boot = machine.boot("unknown", url, settings=f"{END} {OFF} pristine.colour=red")
        said(boot, "warning: the kernel command line has an unknown setting, pristine.colour")
        boot = machine.boot("channel", url, image="beta", settings=f"{END} pristine.offline=refuse")
        said(boot, "error: channel beta is not in")
        boot = machine.boot("device", url, settings=f"{END} pristine.data=SERIAL=nosuch pristine.device-timeout=3")
        said(boot, "the data device SERIAL=nosuch did not appear in 3 s")
        said(boot, "what to do: .*there is: .*vda, vdb")
        boot = machine.boot("init", url, settings=f"{END} init=/sbin/nosuch")
        said(boot, "error: the root has no /sbin/nosuch")
        boot = machine.boot("network", url, net=None,
                            settings=f"{END} pristine.provision=force pristine.offline=refuse pristine.network-timeout=3")
        said(boot, "no network after 3 s: there is no network interface")


def a_module_of_another_kernel_is_refused(directory):
    """An initramfs with the module of another kernel says so."""
    release = lab.vm.default_release()
    with open(os.path.join(lab.TOP, "build", release, "dm-pristine.ko"), "rb") as f:
        module = f.read()
    at = module.index(b"vermagic=") + len(b"vermagic=")
    wrong = os.path.join(directory, "wrong.ko")
    with open(wrong, "wb") as f:
        f.write(module[:at] + b"9" + module[at + 1:])
    initrd = os.path.join(directory, "wrong-initramfs")
    lab.initramfs_build.build(initrd, release, target=wrong, agent=lab.AGENT)
    machine, _, store = small(directory, initrd=initrd)
    with lab.Server(store, directory) as server:
        boot = machine.boot("wrong", server.url, settings=END)
    said(boot, f"error: .*9{release[1:6]}.*")
    said(boot, "what to do: make the initramfs again with the module for the kernel that runs")


SCENARIOS = [
    revert_after_a_reboot, convergence_of_cuts_in_session_and_revert, convergence_of_cuts_in_provisioning,
    convergence_of_cuts_that_lose_writes, small_system_and_its_policies, convergence_with_a_server_that_is_down, convergence_with_a_faulty_server,
    an_update_fetches_what_differs, too_small_a_disk_is_refused, identity_and_damage_are_refused,
    bad_settings_are_named, a_module_of_another_kernel_is_refused,
]


if __name__ == "__main__":
    sys.exit(lab.run_scenario(SCENARIOS))
