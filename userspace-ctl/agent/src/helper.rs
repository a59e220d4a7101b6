// SPDX-License-Identifier: GPL-2.0

//! The helper, `pristined`, which fetches stale blocks for the kernel while the system runs. The agent starts it once the
//! managed device is active, and before anything reads from that.
//!
//! It must live longer than the initramfs: an init that takes over moves `/dev`, `/proc`, `/sys` and `/run` into the
//! system's root and deletes everything else. So it gets a mount namespace and a root of its own, in memory, with those
//! four bound into it, its program and the name servers: all paths go on meaning what they meant, and nothing of it is
//! on the device that it serves. It leads a session of its own, and its name begins with `@`, which asks systemd to spare it
//! until the file systems are gone at shutdown.
//!
//! A second process, the agent's program again, starts it, and starts it again should it fail: for as long as blocks are
//! stale, somebody must serve. Both end when nothing is stale, when another helper took the device over, or when the device
//! is gone.
//!
//! The network is what the agent made of it: an address that stays until the system's own configuration takes the
//! interface over. While that changes it, the helper tries again. The lease of DHCP is not renewed by the agent.

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{
    mount, mount_bind, mount_bind_recursive, mount_change, mount_move, MountFlags,
    MountPropagationFlags,
};
use rustix::process::{chroot, kill_process_group, setsid, Pid, Signal};

use pristine_device::control::{Control, Id};
use pristine_device::dm::Device;
use pristine_store::sealed::IDENTITY_FILE;
use pristine_store::TOKEN_VARIABLE;

use crate::config::Config;
use crate::console::{debug, say, warn};
use crate::failure::{Failure, Kind};
use crate::worker::backoff;

/// Where the helper's program may be in the initramfs; in the root of its own it is the first.
const PROGRAMS: [&str; 2] = [PROGRAM, "/usr/local/sbin/pristined"];
const PROGRAM: &str = "/usr/sbin/pristined";
/// The argument that makes the agent's program the one that watches over the helper.
pub const WATCH: &str = "--watch-helper";
/// What both are called; the first character is for systemd.
const NAME: &str = "@pristined";
const WATCHER: &str = "@pristine-agent";
/// Where its files are; `/run` goes on into the system.
const RUN: &str = "/run/pristine";
/// Where the root of its own is made.
const ROOT: &str = "/helper-root";

/// How long the agent waits to see the helper at work. The boot goes on without it, as reads wait for it.
const SEEN_IN: Duration = Duration::from_secs(2);

fn pid_file(name: &str) -> PathBuf {
    Path::new(RUN).join(format!("helper-{name}.pid"))
}

/// Where the helper says what it does.
fn state_file(name: &str) -> PathBuf {
    Path::new(RUN).join(format!("helper-{name}.json"))
}

fn fail(what: String) -> Failure {
    Failure::new(Kind::Internal, what)
}

/// The helper's program.
fn program() -> Option<&'static str> {
    PROGRAMS.into_iter().find(|p| Path::new(p).is_file())
}

/// Makes sure that there is a helper to start, before blocks become stale that only it can bring back.
///
/// # Errors
///
/// There is none.
pub fn check() -> Result<(), Failure> {
    if program().is_some() {
        return Ok(());
    }
    Err(Failure::new(
        Kind::Config,
        format!(
            "there is no {PROGRAM} in the initramfs, and without it nobody serves stale blocks"
        ),
    )
    .advise("make the initramfs again with it (scripts/initramfs), or use pristine.revert=eager"))
}

/// Starts the helper for a managed device. Where blocks are stale, waits a moment to see it at work.
///
/// # Errors
///
/// It cannot be started.
pub fn start(device: &Device, config: &Config, device_is_whole: bool) -> Result<(), Failure> {
    check()?;
    let name = device.name.as_str();
    let id = Id {
        major: device.major,
        minor: device.minor,
    };
    let begin = Instant::now();
    fs::create_dir_all(RUN).map_err(|e| fail(format!("cannot make {RUN}: {e}")))?;
    let log = kmsg();
    let mut watcher = Command::new("/proc/self/exe")
        .arg0(WATCHER)
        .args([WATCH, name, &config.store.to_string()])
        .args(arguments(name, config))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.map_or_else(Stdio::null, Stdio::from))
        // Not among the arguments, which all users can see.
        .envs(
            config
                .token
                .as_ref()
                .map(|token| (TOKEN_VARIABLE, token.as_str())),
        )
        .spawn()
        .map_err(|e| fail(format!("cannot start the helper: {e}")))?;
    if device_is_whole {
        // It is for the neighbours alone then, and never attaches.
        return Ok(());
    }
    let attached = || {
        let stats = Control::open().and_then(|c| c.fetch_stats(id));
        stats.is_ok_and(|s| s.attached != 0)
    };
    loop {
        if attached() {
            debug(format_args!(
                "the helper is at work after {} ms",
                begin.elapsed().as_millis()
            ));
            return Ok(());
        }
        if let Ok(Some(status)) = watcher.try_wait() {
            if status.success() {
                say("the helper found nothing stale");
                return Ok(());
            }
            return Err(
                fail(format!("the helper's watcher ended at once ({status})"))
                    .advise("the kernel's messages (dmesg) say why"),
            );
        }
        if begin.elapsed() > SEEN_IN {
            warn("the helper is not at work yet; what reads a stale block waits for it");
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends the helper that an earlier attempt started, if it is still there.
pub fn stop(name: &str) {
    let path = pid_file(name);
    let Some(pid) = fs::read_to_string(&path)
        .ok()
        .and_then(|t| t.trim().parse().ok())
        .and_then(Pid::from_raw)
    else {
        return;
    };
    let command = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
    // The number may be another process's by now.
    let alive = || fs::read_to_string(&command).is_ok_and(|c| c.starts_with(WATCHER));
    let begin = Instant::now();
    let mut signal = Signal::TERM;
    while alive() {
        // The watcher leads a group of its own with the helper in it.
        let _ = kill_process_group(pid, signal);
        std::thread::sleep(Duration::from_millis(20));
        if begin.elapsed() > Duration::from_secs(2) {
            signal = Signal::KILL;
        }
        if begin.elapsed() > Duration::from_secs(5) {
            warn(format_args!("process {pid:?}, the helper, does not end"));
            break;
        }
    }
    let _ = fs::remove_file(path);
}

fn kmsg() -> Option<File> {
    OpenOptions::new().write(true).open("/dev/kmsg").ok()
}

/// What the watcher does: `arguments` are the managed device, the stores, and then the helper's own. It ends with the
/// helper's work.
pub fn watch(arguments: &[&str]) -> ExitCode {
    let [name, stores, arguments @ ..] = arguments else {
        return ExitCode::from(Kind::Config.code());
    };
    // The agent's terminal and process group are none of its business.
    let _ = setsid();
    if let Err(e) = fs::write(pid_file(name), format!("{}\n", std::process::id())) {
        log(&format!("cannot write {}: {e}", pid_file(name).display()));
    }
    let identity = arguments.iter().position(|word| *word == "--identity");
    let identity = identity.and_then(|at| arguments.get(at + 1));
    let identity = identity.map_or(IDENTITY_FILE, |path| *path);
    if let Err(e) = own_root(stores, identity) {
        log(&format!(
            "the helper has no root of its own, and may fail when the system starts: {e}"
        ));
    }
    let mut failures = 0;
    loop {
        let begin = Instant::now();
        let status = helper(arguments).spawn().and_then(|mut child| child.wait());
        let over = status.as_ref().is_ok_and(|s| s.code().is_some_and(is_over));
        if over || !is_active(name) {
            let _ = fs::remove_file(pid_file(name));
            return ExitCode::SUCCESS;
        }
        // One that has worked for a while is not one that cannot.
        failures = match begin.elapsed() > Duration::from_secs(60) {
            true => 1,
            false => failures + 1,
        };
        let wait = backoff(failures);
        let how = status.map_or_else(
            |e| format!("cannot be started: {e}"),
            |s| format!("ended ({s})"),
        );
        log(&format!(
            "the helper {how}; starting it again in {} s",
            wait.as_secs()
        ));
        std::thread::sleep(wait);
    }
}

/// Whether a helper that ends with this code is not needed any more: nothing is stale (or it was asked to end), another
/// one took the device over, the device is gone.
fn is_over(code: i32) -> bool {
    matches!(code, 0 | 20 | 21)
}

fn helper(arguments: &[&str]) -> Command {
    let mut command = Command::new(program().unwrap_or(PROGRAM));
    command
        .arg0(NAME)
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .envs(std::env::var_os(TOKEN_VARIABLE).map(|token| (TOKEN_VARIABLE, token)))
        .current_dir("/");
    command
}

fn arguments(name: &str, config: &Config) -> Vec<String> {
    let mut words = vec!["--device".into(), name.into()];
    for store in &config.store.stores {
        words.extend(["--store".into(), store.to_string()]);
    }
    if let Some(timeout) = config.store.timeout {
        words.extend(["--stall".into(), timeout.as_secs().to_string()]);
        words.extend(["--connect".into(), timeout.as_secs().to_string()]);
    }
    words.extend(["--hydrate".into(), config.hydrate.to_string()]);
    if let Some(rate) = &config.hydrate_rate {
        words.extend(["--rate".into(), rate.clone()]);
    }
    if let Some(peers) = &config.peers {
        words.extend(["--peers".into(), "--peers-port".into()]);
        words.push(peers.port.to_string());
        for net in &peers.from {
            words.extend(["--peers-from".into(), net.to_string()]);
        }
        if let Some(rate) = &peers.rate {
            words.extend(["--peers-rate".into(), rate.clone()]);
        }
    }
    if let Some(identity) = &config.identity {
        words.extend(["--identity".into(), identity.display().to_string()]);
    }
    words.extend(["--state".into(), state_file(name).display().to_string()]);
    words.extend(["--trace-dir".into(), RUN.into(), "--kmsg".into()]);
    words
}

/// For the watcher, whose console is the kernel's log alone.
fn log(text: &str) {
    use std::io::Write;
    if let Some(mut kmsg) = kmsg() {
        let _ = kmsg.write_all(format!("<4>{}: {text}\n", crate::console::NAME).as_bytes());
    }
}

/// Whether there is a device-mapper device of this name.
fn is_active(name: &str) -> bool {
    let Ok(entries) = fs::read_dir("/sys/class/block") else {
        // Better once too often than a machine that hangs.
        return true;
    };
    entries.flatten().any(|e| {
        fs::read_to_string(e.path().join("dm/name")).is_ok_and(|found| found.trim() == name)
    })
}

/// Moves this process into a mount namespace and a root of its own, with the directories among `stores` and the file with
/// the identity.
fn own_root(stores: &str, identity: &str) -> Result<(), String> {
    let step = |what: &str, result: rustix::io::Result<()>| {
        result.map_err(|e| format!("cannot {what}: {e}"))
    };
    leave_mounts().map_err(|e| format!("cannot leave the mount namespace: {e}"))?;
    step(
        "make mounts private",
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        ),
    )?;
    fs::create_dir_all(ROOT).map_err(|e| format!("cannot make {ROOT}: {e}"))?;
    step(
        "mount a tmpfs",
        mount(
            "pristined",
            ROOT,
            "tmpfs",
            MountFlags::NOSUID,
            Some(c"mode=0755,size=16m"),
        ),
    )?;
    let dirs = ["/dev", "/proc", "/sys", "/run"].map(PathBuf::from);
    let directories = stores.split(", ").map(PathBuf::from);
    let directories = directories.filter(|store| store.is_absolute() && store.is_dir());
    for dir in dirs.into_iter().chain(directories) {
        let to = below_root(&dir);
        fs::create_dir_all(&to).map_err(|e| format!("cannot make {}: {e}", to.display()))?;
        step(
            &format!("bind {}", dir.display()),
            mount_bind_recursive(&dir, &to),
        )?;
    }
    // The file stays there even when it is deleted from the initramfs.
    let (from, to) = (program().unwrap_or(PROGRAM), below_root(Path::new(PROGRAM)));
    to.parent()
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| fs::write(&to, ""))
        .map_err(|e| format!("cannot make {}: {e}", to.display()))?;
    step(&format!("bind {from}"), mount_bind(from, &to))?;
    let identity = Path::new(identity);
    if identity.exists() {
        let to = below_root(identity);
        let copied = to.parent().map_or(Ok(()), fs::create_dir_all);
        // With its permissions.
        copied
            .and_then(|()| fs::copy(identity, &to).map(drop))
            .map_err(|e| format!("cannot copy {}: {e}", identity.display()))?;
    }
    let _ = fs::create_dir_all(below_root(Path::new("/etc")));
    for file in ["/etc/resolv.conf", "/etc/hosts"] {
        // Without them there are no names, and addresses still work.
        let _ = fs::copy(file, below_root(Path::new(file)));
    }
    std::env::set_current_dir(ROOT).map_err(|e| format!("cannot enter {ROOT}: {e}"))?;
    step("move the root", mount_move(".", "/"))?;
    step("enter the root", chroot("."))?;
    std::env::set_current_dir("/").map_err(|e| format!("cannot enter /: {e}"))
}

fn below_root(path: &Path) -> PathBuf {
    Path::new(ROOT).join(path.strip_prefix("/").unwrap_or(path))
}

fn leave_mounts() -> rustix::io::Result<()> {
    use rustix::thread::{unshare_unsafe, UnshareFlags};
    #[allow(unsafe_code)]
    // SAFETY: it is unsafe because of UnshareFlags::FILES, which is not among the flags: file descriptors stay shared.
    unsafe {
        unshare_unsafe(UnshareFlags::NEWNS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    #[test]
    fn the_helper_is_called_as_agreed() {
        let mut settings = Settings::default();
        settings.add_command_line(
            "pristine.data=/dev/vda pristine.store=http://10.0.2.2:8000 pristine.image=lab",
        );
        let words = arguments("root", &settings.config().unwrap()).join(" ");
        assert_eq!(
            words,
            "--device root --store http://10.0.2.2:8000 --hydrate idle \
             --state /run/pristine/helper-root.json --trace-dir /run/pristine --kmsg"
        );
        settings.add_command_line(
            "pristine.hydrate=full pristine.hydrate-rate=20M pristine.store=http://b pristine.store=/srv/store \
             pristine.fetch_timeout=3",
        );
        let words = arguments("root", &settings.config().unwrap()).join(" ");
        assert!(
            words.contains(
                "--store http://10.0.2.2:8000 --store http://b --store /srv/store --stall 3 --connect 3 \
                 --hydrate full --rate 20M --state"
            ),
            "{words}"
        );
        settings.add_command_line("pristine.peers=on pristine.peers-from=10.1.0.0/16,fe80::/10");
        let words = arguments("root", &settings.config().unwrap()).join(" ");
        assert!(
            words.contains(
                "20M --peers --peers-port 7117 --peers-from 10.1.0.0/16 --peers-from fe80::/10 --state"
            ),
            "{words}"
        );
        for wrong in [
            "peers=perhaps",
            "peers-port=0",
            "peers-from=10.1.0.0/33",
            "peers-rate=0",
        ] {
            let mut settings = settings.clone();
            settings.add_command_line(&format!("pristine.{wrong}"));
            let error = settings.config().unwrap_err().to_string();
            assert!(error.contains(wrong), "{error}");
        }
        settings.add_command_line("pristine.identity=/etc/id");
        let words = arguments("root", &settings.config().unwrap()).join(" ");
        assert!(words.contains("--identity /etc/id --state"), "{words}");
    }

    #[test]
    fn paths_move_below_the_root() {
        assert_eq!(
            below_root(Path::new("/usr/x")),
            Path::new("/helper-root/usr/x")
        );
    }
}
