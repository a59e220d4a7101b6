# SPDX-License-Identifier: GPL-2.0
"""Scenarios with whole machines that boot while their blocks are still in the store.

tests/vm/instant.sh runs each as `python3 instant.py NAME DIRECTORY`; what it makes goes to the directory, figures to
figures.json there.
"""

import json
import os
import re
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import lab  # noqa: E402  (needs the path above)
from scenarios import END, OFF, SESSIONS, clean_means_equal, identical, must, provisioned_debian, said, small, small_image  # noqa: E402

INSTANT = "pristine.revert=instant"
# A read that is never answered would keep the machine until the test's own limit.
LIMIT = 400


def report(boot):
    """The agent's report, which must be there."""
    must(boot.report is not None, f"the agent did not report; last: {boot.console[-6:]}")
    return boot.report


def is_report(boot, **expected):
    """The agent's report says this."""
    found = report(boot)
    for key, value in expected.items():
        must(found[key] == value, f"{key} is {found[key]}, not {value}, in the report: {found}")
    return found


def stale(machine):
    """How many blocks are stale, as the metadata lies there."""
    return machine.counts()["stale"]


def times(boot):
    """When the agent began and when the root was mounted, in seconds of guest time, as the session says."""
    found = {}
    for line in boot.lines("^time "):
        _, what, at = line.split()
        found.setdefault(what, float(at))
    must({"version", "mounted"} <= found.keys(), f"the session does not say when the root was mounted: {found}")
    return found


def to_root(machine, url, directory, rounds=3, **expected):
    """Milliseconds from the agent's start to the mounted root, with copies of a machine that are cut off then. An emulated
    machine is as fast as its host lets it be from moment to moment, so the least of some is nearest to the truth. The
    agent's report must be as expected."""
    least = None
    for n in range(rounds):
        copy = machine.clone(os.path.join(directory, f"copy-{n}"))
        boot = copy.boot("to-root", url, settings=f"{END} {INSTANT}", cut="pristine-agent: mounted .* ms after")
        must(boot.was_cut, "the root was not mounted")
        is_report(boot, **expected)
        line = boot.lines("pristine-agent: mounted .* ms after")[0]
        took = int(re.search(r"(\d+) ms after", line)[1]) - report(boot)["begin_ms"]
        least = took if least is None else min(least, took)
        for image in (copy.data, copy.metadata):
            os.unlink(image)
    return least


def publish(raw, directory, store):
    """Publishes one more generation; returns what the tool says of it."""
    built = os.path.join(directory, "built")
    shutil.rmtree(built, ignore_errors=True)
    lab.pristine("image", "build", raw, "--output", built, "--level", 3)
    said_of_it = lab.pristine("image", "publish", built, store, "--channel", "stable", "--json")
    shutil.rmtree(built)
    return json.loads(said_of_it)


def differing(one, other):
    """How many blocks differ between two images of one size."""
    return len(lab.differing_blocks(one, other))


class Late:
    """A server that is down until a console says a certain thing."""

    def __init__(self, store, directory, port, pattern):
        self.arguments = (store, directory, port)
        self.pattern = pattern
        self.server = None

    def on_line(self, line):
        if not self.server and re.search(self.pattern, line):
            self.server = lab.Server(*self.arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.server:
            self.server.stop()


# -- a small system ---------------------------------------------------------------------------------

def changed(directory):
    """A small machine whose session changed something, with the server's port."""
    machine, master, store = small(directory)
    with lab.Server(store, directory) as server:
        machine.boot("provision", server.url, settings=f"{OFF} {END}")
        boot = machine.boot("change", server.url, settings=f"{END} {INSTANT}")
        is_report(boot, mode="clean", instant=False, blocks_left=0)
        said(boot, "/etc/note says original")
        return machine, master, store, server.port


def instant_revert_of_a_small_system(directory):
    """What a session changed is gone at the next boot, with nothing fetched before it; in the end the disk is whole."""
    machine, master, store, port = changed(directory)
    dirty = machine.counts()["dirty"]
    must(dirty > 0, "the session changed nothing")
    with lab.Server(store, directory, port=port) as server:
        boot = machine.boot("revert", server.url, settings=f"{END} {INSTANT} nowrite untilwhole", timeout=LIMIT)
        found = is_report(boot, mode="revert", instant=True, blocks_dirty=dirty, blocks_left=dirty, blocks_fetched=0)
        must(found["requests"] == 1, f"the agent needed more than the channel's pointer: {found}")
        said(boot, "/etc/note says original")
        must(stale(machine) == 0, "blocks are stale although the helper had all the time it wanted")
        clean_means_equal(machine, master, "after the instant revert")
        # Made stale, and not booted: what an instant revert leaves when the power goes right after it.
        boot = machine.boot("cut", server.url, settings=f"{OFF} {END} {INSTANT}")
        is_report(boot, mode="revert", instant=True)
        left = stale(machine)
        must(left > 0 and machine.counts()["dirty"] == 0, f"{machine.counts()} after an instant revert")
        boot = machine.boot("on", server.url, settings=f"{END} {INSTANT} nowrite untilwhole", timeout=LIMIT)
        is_report(boot, mode="serve", instant=True, blocks_stale=left, blocks_left=left, blocks_fetched=0)
        said(boot, "/etc/note says original")
        # Whoever wants the disk whole before the boot gets that.
        machine.boot("eager", server.url, settings=f"{OFF} {END}")
        identical(machine, master)


def undo_of_a_small_system(directory):
    """What a session changed is put back from the undo area, with no server at all, also after a cut in the middle; and what
    a small area did not take needs the server, which `offline` is for."""
    undo = "pristine.revert=undo"
    machine, master, store = small(directory, metadata=40 << 20)
    with lab.Server(store, directory) as server:
        url, port = server.url, server.port
        machine.boot("provision", url, settings=f"{OFF} {END} {undo} pristine.undo=32M")
        identical(machine, master)
    boot = machine.boot("change", url, settings=f"{END} {undo} pristine.offline=boot-as-is")
    said(boot, "/etc/note says original")
    dirty = machine.counts()["dirty"]
    must(dirty > 0, "the session changed nothing")
    boot = machine.boot("cut", url, settings=f"{END} {undo} pristine.ip=off", cut="blocks put back|blocks are dirty")
    must(boot.was_cut, "the machine was not cut off")
    # An image that is named by its id leaves nothing to ask for.
    image = re.search(r"[0-9a-f]{64}", lab.pristine("image", "list", store, "--json")).group()
    dirty = sum(machine.counts()[k] for k in ("dirty", "stale"))
    boot = machine.boot("undo", url, image=image, settings=f"{OFF} {END} {undo} pristine.ip=off pristine.offline=refuse")
    found = is_report(boot, mode="revert" if dirty else "clean", instant=False, blocks_undone=dirty, requests=0, bytes_fetched=0)
    must(found["blocks_left"] == 0, f"blocks are left: {found}")
    identical(machine, master)
    # The area is of use again, and a channel that cannot be asked is no reason not to boot.
    boot = machine.boot("again", url, settings=f"{END} {undo}")
    said(boot, "/etc/note says original")
    dirty = machine.counts()["dirty"]
    boot = machine.boot("channel", url, settings=f"{OFF} {END} {undo}")
    is_report(boot, mode="revert", blocks_dirty=dirty, blocks_undone=dirty, bytes_fetched=0)
    identical(machine, master)
    with lab.Server(store, directory, port=port) as server:
        machine.boot("small", server.url, settings=f"{OFF} {END} {undo} pristine.provision=force pristine.undo=96K")
    # More than the area has room for.
    boot = machine.boot("fill", url, settings=f"{END} {undo} pristine.offline=boot-as-is busy", cut="small: round 5")
    must(boot.was_cut, "the session did not come far")
    dirty = machine.counts()["dirty"]
    boot = machine.boot("refuse", url, settings=f"{END} {undo} pristine.offline=refuse")
    said(boot, "dirty blocks have no original in the undo area")
    said(boot, "error: cannot reach")
    must(machine.counts()["dirty"] == dirty, "the disk was changed although it could not be put back as a whole")
    with lab.Server(store, directory, port=port) as server:
        boot = machine.boot("rest", server.url, settings=f"{OFF} {END} {undo}")
        found = is_report(boot, mode="revert", blocks_dirty=dirty)
        must(0 < found["blocks_undone"] < dirty, f"the area had {found['blocks_undone']} of {dirty} blocks")
        rest = sum(found[k] for k in ("blocks_fetched", "blocks_zeroed", "blocks_kept"))
        must(rest == dirty - found["blocks_undone"], f"not the rest alone came from the store: {found}")
    identical(machine, master)


def instant_policies_without_a_server(directory):
    """With the server down: nothing becomes stale that could not be read; what is stale waits, and says so."""
    machine, master, store, port = changed(directory)
    url = f"http://10.0.2.2:{port}"
    before = machine.counts()["dirty"]
    image = json.loads(lab.pristine("image", "list", store, "--json"))
    image = re.search(r"[0-9a-f]{64}", json.dumps(image)).group()
    for name in ("stable", image):
        boot = machine.boot("refuse", url, image=name, settings=f"{END} {INSTANT} pristine.offline=refuse")
        said(boot, "error: cannot reach")
        boot = machine.boot("wait", url, image=name, settings=f"{END} {INSTANT}",
                            cut="waiting for the store .pristine.offline=wait.: attempt 2")
        must(boot.was_cut, "the machine did not wait for the store")
        counts = machine.counts()
        must(counts["stale"] == 0 and counts["dirty"] == before, f"without the store: {counts}, {before} dirty before")
        boot = machine.boot("as-is", url, image=name, settings=f"{END} {INSTANT} nowrite pristine.offline=boot-as-is")
        is_report(boot, mode="as-is", instant=False, blocks_left=0)
        said(boot, "/etc/note says changed")
        before = machine.counts()["dirty"]
    # From here on blocks are stale, and among them those that a boot needs first.
    with lab.Server(store, directory, port=port):
        machine.boot("stale", url, settings=f"{OFF} {END} {INSTANT}")
    boot = machine.boot("refuse", url, settings=f"{END} {INSTANT} pristine.offline=refuse")
    said(boot, "error: cannot reach")
    boot = machine.boot("eager", url, settings=f"{END} pristine.offline=boot-as-is")
    said(boot, "the disk holds nothing that could be booted until then")
    left = stale(machine)
    waits = f"{left} blocks are stale: what reads one of them waits until {re.escape(url)} serves again"
    for name in ("stable", image):
        with Late(store, directory, port, waits) as late:
            boot = machine.boot("late", url, image=name, on_line=late.on_line, timeout=LIMIT,
                                settings=f"{END} {INSTANT} nowrite untilwhole")
        is_report(boot, mode="serve", instant=True, blocks_left=left)
        said(boot, "booting what is on the disk, without the store .it is the image, but not all of it is here")
        said(boot, "/etc/note says original")
        must(stale(machine) == 0, "blocks are stale although the server came back")
        with lab.Server(store, directory, port=port):
            machine.boot("change", url, settings=f"{END} {INSTANT}")
            machine.boot("stale", url, settings=f"{OFF} {END} {INSTANT}")
        left = stale(machine)
        waits = f"{left} blocks are stale: what reads"


def instant_generations_of_a_small_system(directory):
    """A new generation is there at once; an older one is refused; an empty disk is a system at once."""
    machine, master, store, port = changed(directory)
    old_store = os.path.join(directory, "old-store")
    shutil.copytree(store, old_store)
    second = os.path.join(directory, "second.img")
    small_image(second, 2, note="successor")
    publish(second, directory, store)
    differ = differing(second, master)
    dirty = machine.counts()["dirty"]
    with lab.Server(store, directory, port=port) as server:
        boot = machine.boot("update", server.url, settings=f"{END} {INSTANT} nowrite untilwhole", timeout=LIMIT)
        found = is_report(boot, mode="update", instant=True, generation=2, blocks_fetched=0)
        must(differ <= found["blocks_left"] <= differ + dirty, f"{differ} differ, {dirty} were dirty: {found}")
        said(boot, "/etc/note says successor")
        must(stale(machine) == 0, "blocks are stale although the helper had all the time it wanted")
        clean_means_equal(machine, second, "after the update")
    with lab.Server(old_store, directory, port=port) as server:
        boot = machine.boot("older", server.url, settings=f"{END} nowrite pristine.revert=off")
        said(boot, "refused: stable is generation 1 .* this disk has generation 2")
        said(boot, "/etc/note says successor")
        boot = machine.boot("older", server.url, settings=f"{END} {INSTANT} nowrite untilwhole pristine.allow-older",
                            timeout=LIMIT)
        is_report(boot, mode="update", generation=1)
        said(boot, "/etc/note says original")
    fresh = lab.Machine(os.path.join(directory, "fresh"), 64 << 20, metadata=4 << 20)
    with lab.Server(store, directory, port=port) as server:
        boot = fresh.boot("first", server.url, settings=f"{END} {INSTANT} pristine.provision=instant", timeout=LIMIT)
        found = is_report(boot, mode="provision", instant=True, blocks_fetched=0)
        must(found["blocks_left"] == found["blocks_total"], f"a fresh disk is not all stale: {found}")
        said(boot, "/etc/note says successor")
        boot = fresh.boot("second", server.url, settings=f"{END} {INSTANT} nowrite untilwhole", timeout=LIMIT)
        said(boot, "/etc/note says successor")
        must(stale(fresh) == 0, "blocks are stale although the helper had all the time it wanted")
        fresh.boot("eager", server.url, settings=f"{OFF} {END}")
        identical(fresh, second)


# -- a real Debian ----------------------------------------------------------------------------------

def look(machine, directory, page, packages, *flags):
    """The session that looks at the machine, and what it must find: the web server's page, packages in their versions."""
    path = os.path.join(directory, "look")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(os.path.join(SESSIONS, "look"), path)
    lines = [f"{name} {version}" for name, version in packages.items()]
    for name, content in (("page", [page]), ("packages", lines), *((flag, []) for flag in flags)):
        with open(os.path.join(path, name), "w", encoding="ascii") as f:
            f.writelines(line + "\n" for line in content)
    return machine.session_disk(path)


def upgraded_debian():
    """The Debian that the package manager upgraded, and the versions of what became newer, before and after."""
    image = os.environ["PRISTINE_UPGRADED"]
    with open(image + ".packages", encoding="ascii") as f:
        rows = [line.split() for line in f]
    return image, *({row[0]: row[n] for row in rows if row[n] != "-"} for n in (1, 2))


def diff_names_packages(store, images, old, new):
    """`image diff` between two generations tells the packages that were upgraded."""
    diff = json.loads(lab.pristine("image", "diff", store, *images, "--json"))
    told = {p["package"]: (p["old"], p["new"]) for p in diff["packages"] if p["old"] != p["new"]}
    must(told == {name.split(":")[0]: (old.get(name), new.get(name)) for name in {**old, **new}},
         f"image diff names other packages than were upgraded: {told}")
    return {key: diff[key] for key in ("blocks_changed", "blocks_zero", "blocks_moved", "blocks_new")}


def as_published(store, raw, directory):
    """What machines get of an image: the same, but zeros where the file system holds nothing, which is what is free and
    what was in the journal."""
    path = os.path.join(directory, "published.img")
    with open(path, "wb"):
        pass
    lab.pristine("image", "apply", store, path, "--image", "stable")
    with open(path, "rb") as f:
        for block in lab.differing_blocks(path, raw):
            f.seek(block * lab.BLOCK)
            must(not any(f.read(lab.BLOCK)), f"block {block} of the published image is neither zero nor that of {raw}")
    return path


class Packs:
    """What a server sends of packs, from here on."""

    def __init__(self, server):
        self.log = server.log
        self.begin = os.path.getsize(self.log)

    def sent(self):
        """Requests and bytes."""
        with open(self.log, encoding="ascii") as f:
            f.seek(self.begin)
            lengths = [int(line.split()[5]) for line in f if " GET /packs/" in line]
        return {"pack_requests": len(lengths), "pack_bytes": sum(lengths)}


def instant_revert_of_a_debian(directory):
    """A session dirties more than a GiB; the reboot takes no longer than a clean one, and reads right from the start. So it
    does when the package manager made a new generation; that costs what differs, and only what is read at once."""
    machine, master, store = provisioned_debian(directory)
    second, old, new = upgraded_debian()
    # Of the second generation alone, so that machines can be sent to either.
    next_store = os.path.join(directory, "store")
    shutil.copytree(store, next_store)
    first = re.search(r"[0-9a-f]{64}", lab.pristine("image", "list", store, "--json")).group()
    published = publish(second, directory, next_store)
    figures = {"packages": len(new), "delta_bytes": published["delta_bytes"],
               "diff": diff_names_packages(next_store, (first, published["image"]), old, new)}
    second = as_published(next_store, second, directory)
    os.mkdir(os.path.join(directory, "next"))
    with lab.Server(store, directory) as server, lab.Server(next_store, os.path.join(directory, "next")) as next_server:
        instant_revert(machine, master, old, directory, server, next_server, figures)
        instant_upgrade(machine, master, second, new, directory, next_server, figures)
    with open(os.path.join(directory, "figures.json"), "w", encoding="ascii") as f:
        json.dump(figures, f, indent=1)
    print(f"figures: {json.dumps(figures)}")


def instant_revert(machine, master, packages, directory, server, next_server, figures):
    """A session leaves more than a GiB, which is reverted while the system runs."""
    mib = figures["mib"] = 1200 if os.environ.get("TEST_LONG") else 300
    use = os.path.join(directory, "use")
    shutil.copytree(os.path.join(SESSIONS, "use"), use)
    with open(os.path.join(use, "mib"), "w", encoding="ascii") as f:
        f.write(f"{mib}\n")
    figures["clean_to_root_ms"] = to_root(machine, server.url, os.path.join(directory, "clean"), mode="clean")
    boot = machine.boot("use", server.url, settings=f"{END} {INSTANT}", session=machine.session_disk(use), timeout=1200)
    said(boot, "session: rebooting")
    is_report(boot, mode="clean", instant=False)
    figures["clean"] = {**times(boot), "total_ms": report(boot)["total_ms"]}
    dirty = machine.counts()["dirty"]
    must(dirty * lab.BLOCK >= mib << 20, f"only {dirty} blocks are dirty")

    figures["instant_to_root_ms"] = to_root(machine, server.url, os.path.join(directory, "instant"), mode="revert", instant=True)
    # The same, and a new generation at the same moment.
    figures["upgrade_to_root_ms"] = to_root(machine, next_server.url, os.path.join(directory, "upgrade"), mode="update",
                                            instant=True, generation=2)
    for what in ("instant", "upgrade"):
        more = figures[f"{what}_to_root_ms"] - figures["clean_to_root_ms"]
        must(more < 1000, f"to the mounted root it took {more} ms more than a clean boot ({what})")
    # Slow enough for the session to meet blocks that are stale.
    boot = machine.boot("instant", server.url, settings=f"{END} {INSTANT} pristine.hydrate-rate=150K", timeout=1200,
                        session=look(machine, directory, "This is the master image.", packages, "slow"))
    found = is_report(boot, mode="revert", instant=True, blocks_dirty=dirty, blocks_left=dirty, blocks_fetched=0)
    must(boot.status == 0, f"the system is not what it was: {boot.lines('WRONG')}")
    figures["instant"] = {**times(boot), **{k: found[k] for k in ("total_ms", "revert_ms", "requests", "bytes_fetched")}}
    must(stale(machine) == 0, "blocks are stale at the end")
    clean_means_equal(machine, master, "after the hydration")


def instant_upgrade(machine, master, second, packages, directory, server, figures):
    """A generation that differs by an upgrade of packages: what differs becomes stale, and is fetched when it is read, or
    in the background."""
    differ, dirty = differing(second, master), machine.counts()["dirty"]
    must(differ == figures["diff"]["blocks_changed"], f"{differ} blocks differ, image diff says {figures['diff']}")
    page = "This is the second generation."
    packs = Packs(server)
    boot = machine.boot("upgrade", server.url, settings=f"{END} {INSTANT} pristine.hydrate=off", timeout=1200,
                        session=look(machine, directory, page, packages, "slow", "leave"))
    found = is_report(boot, mode="update", instant=True, generation=2, blocks_fetched=0)
    must(boot.status == 0, f"the system is not the second generation: {boot.lines('WRONG')}")
    begin, left = found["blocks_left"], stale(machine)
    must(differ <= begin <= differ + dirty, f"{differ} differ, {dirty} were dirty: {found}")
    must(0 < left < begin, f"{left} of {begin} blocks are stale although nothing but what is read was to be fetched")
    read = packs.sent()
    must(0 < read["pack_bytes"] <= begin * lab.BLOCK, f"more was sent than the {begin} blocks that differ: {read}")
    figures["upgrade"] = {**times(boot), "differ": differ, "dirty": dirty, "blocks_left": begin, "blocks_left_later": left, **read}

    dirty = machine.counts()["dirty"]
    packs = Packs(server)
    boot = machine.boot("hydrate", server.url, settings=f"{END} {INSTANT}", timeout=1200,
                        session=look(machine, directory, page, packages))
    found = is_report(boot, instant=True, generation=2, blocks_fetched=0)
    must(boot.status == 0, f"the system is not the second generation: {boot.lines('WRONG')}")
    must(left <= found["blocks_left"] <= left + dirty, f"{left} were stale, {dirty} dirty: {found}")
    must(stale(machine) == 0, "blocks are stale at the end")
    rest = packs.sent()
    must(rest["pack_bytes"] <= found["blocks_left"] * lab.BLOCK, f"more was sent than was stale: {rest}, {found}")
    figures["hydrate"] = {**times(boot), "dirty": dirty, "blocks_left": found["blocks_left"], **rest}
    clean_means_equal(machine, second, "after the upgrade")
    machine.boot("eager", server.url, settings=f"{OFF} {END}")
    identical(machine, second)


SCENARIOS = [
    instant_revert_of_a_small_system, undo_of_a_small_system, instant_policies_without_a_server, instant_generations_of_a_small_system,
    instant_revert_of_a_debian,
]


if __name__ == "__main__":
    sys.exit(lab.run_scenario(SCENARIOS))
