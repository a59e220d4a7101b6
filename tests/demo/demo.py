# SPDX-License-Identifier: GPL-2.0
"""The demo's story; started by tests/demo/run."""

import json
import os
import re
import shutil
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import lab  # noqa: E402  (needs the path above)

OUT = os.path.join(lab.TOP, "build/demo")
TERMINAL = sys.stdout.isatty()
COLOR = TERMINAL and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
PROGRESS = re.compile(r"pristine-agent: (\w+): (\d+) %")


def paint(code, text):
    """Text in a colour, where the terminal takes it."""
    return f"\x1b[{code}m{text}\x1b[0m" if COLOR else text


class Story:
    """Numbered steps, remarks below them, and a bar for what takes long."""

    def __init__(self, steps):
        self.steps = steps
        self.step_number = 0
        self.step_begin = 0.0
        self.bar_shown = -1

    def step(self, title):
        """Begins a step."""
        self.step_number += 1
        self.step_begin = time.monotonic()
        print()
        print(paint("1", f"[{self.step_number}/{self.steps}] {title}"), flush=True)

    def note(self, text=""):
        """Says something below the step."""
        self.clear()
        print(f"  {text}" if text else "", flush=True)

    def clear(self):
        """Takes the bar away."""
        if TERMINAL and self.bar_shown >= 0:
            print("\r\x1b[K", end="")
        self.bar_shown = -1

    def bar(self, what, percent):
        """Shows how far something has come: a bar on a terminal, a line now and then elsewhere."""
        if TERMINAL:
            width = 40
            filled = width * percent // 100
            print(f"\r\x1b[K  {what} [{'#' * filled}{'.' * (width - filled)}] {percent:3d} %", end="", flush=True)
            self.bar_shown = percent
        elif percent // 20 > self.bar_shown // 20 or self.bar_shown < 0:
            print(f"  {what}: {percent} %", flush=True)
            self.bar_shown = percent

    def listen(self, line):
        """What a machine's console says, as the story tells it."""
        found = PROGRESS.search(line)
        if found:
            self.bar(found.group(1), int(found.group(2)))
        elif "pristine-agent: report" in line:
            pass
        elif line.startswith("pristine-agent: "):
            self.note(paint("2", line))
        elif line.startswith("session: "):
            self.note(paint("36", line))

    def took(self):
        """Seconds since the step began."""
        return time.monotonic() - self.step_begin


def count(number):
    """A number for people."""
    return f"{number:,}"


def size(number):
    """A number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            break
        number /= 1024
    else:
        unit = "GiB"
    return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"


def must(condition, what):
    """Ends the demo if something is not as it must be."""
    if not condition:
        raise lab.Failure(what)


def picture(story, machine):
    """Shows the disk."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns - 2, 120))
    for line in machine.map(width=width, rows=10, color=COLOR).splitlines():
        story.note(line)


def tell():
    """The story. Returns the report."""
    begin = time.monotonic()
    master = os.environ["PRISTINE_MASTER"]
    work = os.path.join(OUT, "machine")
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    image_bytes = os.path.getsize(master)
    story = Story(6)
    sessions = os.path.join(lab.HERE, "sessions")

    story.step("Publish the master image, and serve it over HTTP")
    store = lab.make_store(master, OUT)
    packed = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(store) for f in files)
    story.note(f"a Debian 13 of {size(image_bytes)}; {size(packed)} in the store ({story.took():.1f} s)")
    server = lab.Server(store, OUT)
    try:
        story.step("Switch on a machine with an empty disk; pull the plug in the middle of a destructive session")
        machine = lab.Machine(work, image_bytes)
        first = machine.boot("provision", server.url, on_line=story.listen, cut="session: unplug me",
                             session=machine.session_disk(os.path.join(sessions, "break"),
                                                          os.environ["DEMO_PACKAGE"]))
        must(first.was_cut, "the session did not come to its end")
        must(first.report and first.report["mode"] == "provision", "the machine was not provisioned")
        story.note(f"the plug is pulled ({story.took():.0f} s; provisioning {first.report['provision_ms'] / 1000:.1f} s)")

        story.step("The disk, as the machine left it")
        changed = lab.differing_blocks(machine.data, master)
        before = machine.counts()
        picture(story, machine)
        story.note(f"{count(len(changed))} blocks differ from the master image; "
                   f"{count(before['dirty'])} are recorded as dirty")
        must(len(changed) > 0, "the session changed nothing")

        story.step("Switch it on again: the agent fetches what changed, and nothing else")
        second = machine.boot("revert", server.url, on_line=story.listen, settings="pristine.then=poweroff")
        report = second.report
        must(report is not None, "the agent did not report")
        picture(story, machine)
        must(report["blocks_fetched"] + report["blocks_zeroed"] == len(changed),
             f"{len(changed)} blocks had changed, {report['blocks_fetched']} were fetched and "
             f"{report['blocks_zeroed']} made zero")
        identical = lab.is_identical(machine, master)
        story.note(f"compared with the master image, all {count(image_bytes // lab.BLOCK)} blocks: "
                   + (paint("1;32", "identical") if identical else paint("1;31", "DIFFERENT")))

        story.step("And now with the system: is it the Debian that was published?")
        third = machine.boot("check", server.url, on_line=story.listen,
                             session=machine.session_disk(os.path.join(sessions, "check")))
        must(third.status == 0, "the system is not what it was")
        must(third.report["mode"] == "clean", "the disk was not clean")
    finally:
        server.stop()

    result = {
        "blocks_total": report["blocks_total"],
        "blocks_changed": len(changed),
        "blocks_dirty": report["blocks_dirty"],
        "blocks_fetched": report["blocks_fetched"],
        "blocks_zeroed": report["blocks_zeroed"],
        "blocks_kept": report["blocks_kept"],
        "bytes_fetched": report["bytes_fetched"],
        "image_bytes": image_bytes,
        "store_bytes": packed,
        "provision_ms": first.report["provision_ms"],
        "provision_bytes_fetched": first.report["bytes_fetched"],
        "revert_ms": report["revert_ms"],
        "identical": identical,
        "image": report["image"],
        "kernel": os.environ["KREL"],
        "kvm": lab.vm.kvm_works(os.environ["KREL"]),
        "prepare_s": int(os.environ.get("DEMO_PREPARED", "0")),
        "story_s": round(time.monotonic() - begin, 1),
    }
    story.step("What happened")
    rows = [
        ("the machine's disk", f"{count(result['blocks_total'])} blocks, {size(image_bytes)}"),
        ("changed by the session", f"{count(len(changed))} blocks "
                                   f"({100 * len(changed) / result['blocks_total']:.1f} % of the disk)"),
        ("fetched to take it back", f"{count(result['blocks_fetched'])} blocks, {size(result['bytes_fetched'])} "
                                    f"({100 * result['bytes_fetched'] / image_bytes:.2f} % of the image's size)"),
        ("time to provision", f"{result['provision_ms'] / 1000:.1f} s"),
        ("time to revert", f"{result['revert_ms'] / 1000:.1f} s"),
        ("the whole disk compared", "identical to the master image" if identical else "DIFFERENT"),
    ]
    for what, value in rows:
        story.note(f"{what:<26} {value}")
    if not result["kvm"]:
        story.note(paint("2", "(the machine's CPU was emulated; with KVM these times are several times shorter)"))
    return result


def main():
    """Tells the story and writes the report."""
    path = os.path.join(OUT, "report.json")
    if os.path.exists(path):
        os.unlink(path)
    try:
        result = tell()
    except (lab.Failure, lab.MachineError) as e:
        print(f"\ndemo: error: {e}\n    the machine's consoles are in {OUT}/machine/boot-*", file=sys.stderr)
        return 1
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(result, f, indent=2)
        f.write("\n")
    os.rename(path + ".tmp", path)
    print()
    verdict = "The machine is its master image again." if result["identical"] else "The machine is NOT its master image."
    print(paint("1;32" if result["identical"] else "1;31", verdict))
    print(f"Report: {os.path.relpath(path, lab.TOP)}; the machine's consoles: build/demo/machine/boot-*/console.log")
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
