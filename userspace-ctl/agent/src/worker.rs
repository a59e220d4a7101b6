// SPDX-License-Identifier: GPL-2.0

//! The agent's work from the first look at the machine to an active managed device: a checklist.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pristine_metadata::{
    Access, Class, Devices, MetaDevice, Metadata, Planes, Select, Stores, Superblock,
};
use pristine_store::{news, News, TrustPolicy};

use crate::config::{Config, ImageSpec, Provision, Settings, Then};
use crate::console::{say, set_debug, warn, watch_silence};
use crate::devices::{self, Places};
use crate::failure::{Failure, Kind};
use crate::flow::{self, Facts, Fetch, Local, Mode, Need, Policy, Prepared, Without};
use crate::master::{Master, Traffic};
use crate::report::Report;
use crate::restore::{Done, Options, Pace, Progress};
use crate::store_master::{ask, StoreMaster};
use crate::{activate, helper, modules, net, trust, undo};

/// The file of settings in the initramfs.
pub const CONFIG_FILE: &str = "/etc/pristine/agent.conf";

/// How often progress is said, usually and with `pristine.debug`.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);
const PROGRESS_EVERY_DEBUG: Duration = Duration::from_millis(100);
/// The longest wait before the next attempt.
pub const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Attempts for each request to the store.
const ATTEMPTS: u32 = 5;
/// The longest wait for the network when nothing but news may come over it.
const SHORT_WAIT: Duration = Duration::from_secs(10);

/// The settings of this machine, from the file and the kernel command line.
///
/// # Errors
///
/// A file that cannot be read as settings.
pub fn settings() -> Result<Settings, Failure> {
    let mut settings = Settings::default();
    match std::fs::read_to_string(CONFIG_FILE) {
        Ok(text) => settings.add_file(CONFIG_FILE, &text)?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => warn(format_args!("cannot read {CONFIG_FILE}: {e}")),
    }
    match std::fs::read_to_string("/proc/cmdline") {
        Ok(line) => settings.add_command_line(&line),
        Err(e) => warn(format_args!("cannot read the kernel command line: {e}")),
    }
    Ok(settings)
}

/// The wait before attempt `n` (the second is number 1): 1 s, 2 s, 4 s, ... 60 s.
pub fn backoff(n: u32) -> Duration {
    Duration::from_secs(1 << n.saturating_sub(1).min(6)).min(LONGEST_WAIT)
}

/// What the work ended with.
pub struct Outcome {
    /// The managed device; `None` when it was not to be activated.
    pub device: Option<PathBuf>,
    /// What follows.
    pub then: Then,
}

/// Does everything up to an active device. `attempt` counts from 1 and goes into the report.
///
/// # Errors
///
/// Whatever stands in the way; the disk is left so that the next attempt goes on from there.
pub fn work(config: &Config, attempt: u64) -> Result<Outcome, Failure> {
    let begin = Instant::now();
    set_debug(config.debug);
    watch_silence();
    modules::load_listed(Path::new(modules::LIST));
    let places = Places::default();
    let data = devices::wait(&config.data, "data device", config.device_timeout, &places)?;
    let metadata = match &config.metadata {
        Some(spec) => Some(devices::wait(
            spec,
            "metadata device",
            config.device_timeout,
            &places,
        )?),
        None => None,
    };
    // What an attempt before this one left.
    helper::stop(&config.name);
    activate::deactivate(&config.name)?;

    let devices = Devices::new(&data, metadata.as_ref());
    let mut report = Report {
        data: data.display().to_string(),
        attempts: attempt,
        begin_ms: uptime_ms(),
        ..Report::default()
    };
    bring(config, &devices, &mut report)?;

    let mut device = None;
    if config.then == Then::Boot {
        // Read again from the disk: what the kernel is told is what is there.
        let superblock = *Metadata::open(&devices, Access::Read)?.superblock();
        let managed = activate::activate(config, &data, metadata.as_deref(), &superblock)?;
        report.device = managed.path().display().to_string();
        device = Some(managed.path());
        report.blocks_left = managed.status.stale;
        if report.blocks_left > 0 {
            // Before anything reads from the device: such a read would wait for it.
            helper::start(&managed.device, config, false)?;
        } else if config.peers.is_some() {
            // Whatever keeps it from that, this machine has all that it needs.
            if let Err(failure) = helper::start(&managed.device, config, true) {
                warn(format_args!("neighbours are not served: {failure}"));
            }
        }
    }
    report.total_ms = millis(begin);
    report.mode = report.mode();
    report.publish(Path::new(crate::report::PATH))?;
    Ok(Outcome {
        device,
        then: config.then,
    })
}

pub(crate) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Since the kernel started.
pub fn uptime_ms() -> u64 {
    let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(up.tv_sec * 1000 + up.tv_nsec / 1_000_000).unwrap_or(0)
}

fn policy(config: &Config) -> Result<Policy, Failure> {
    Ok(Policy {
        trust: trust::policy(config)?,
        image: config.image.clone(),
        revert: config.revert,
        provision: config.provision,
        offline: config.offline,
        damaged: config.damaged,
    })
}

/// What is on the disk, with its metadata open if there is any. `reading` when that is all it is for.
fn look(devices: &Devices) -> (Local, Option<(Metadata, Planes)>) {
    let opened = Metadata::open(devices, Access::Write).and_then(|mut m| {
        let (planes, _) = m.load()?;
        Ok((m, planes))
    });
    match opened {
        Ok((metadata, _)) if metadata.superblock().needs_check => {
            let what =
                "the metadata is marked as needing a check: a device failed while it was in use";
            let failure = Failure::new(Kind::Metadata, what).advise(
                "look at it with `pristine device check`; pristine.damaged=reprovision fills the disk again",
            );
            (Local::Unusable(failure), None)
        }
        Ok((metadata, planes)) => {
            let facts = Facts::new(metadata.superblock(), &planes);
            (Local::Managed(facts), Some((metadata, planes)))
        }
        Err(e) if e.class() == Class::NotFormatted => (Local::Nothing, None),
        Err(e) => (Local::Unusable(e.into()), None),
    }
}

/// Makes the disk right, or finds that it may stay as it is.
fn bring(config: &Config, devices: &Devices, report: &mut Report) -> Result<(), Failure> {
    let policy = policy(config)?;
    let mut tries = 0;
    loop {
        // Each round looks at the disk afresh: after a failed one, more of it may be right, or less bootable.
        let (local, mut open) = look(devices);
        let need = flow::need(&local, &policy)?;
        if let Local::Managed(facts) = &local {
            report.found(facts);
            describe(facts);
        } else {
            say("the data device is not managed yet");
        }
        if policy.provision != Provision::Force {
            if let Some((metadata, planes)) = &mut open {
                if undo::all(&policy, metadata, planes, report)? {
                    continue;
                }
            }
        }
        if need == Need::Nothing {
            return stay(&local, report);
        }
        if policy.fetch(&local) == Fetch::While && config.then == Then::Boot {
            helper::check()?;
        }
        let result = with_store(config, devices, &policy, need, &local, open, report);
        let failure = match result {
            Ok(()) => return Ok(()),
            Err(failure) => failure,
        };
        if !failure.kind.is_offline() {
            return Err(failure);
        }
        // It may have begun to overwrite what could have been booted until then.
        let (local, open) = look(devices);
        drop(open);
        let need = flow::need(&local, &policy)?;
        match flow::without_store(need, policy.offline, failure.kind) {
            Without::Boot => {
                crate::console::error(&failure);
                warn(format_args!(
                    "booting what is on the disk, without the store ({})",
                    match need {
                        Need::Revert => "changes included",
                        Need::Serve => "it is the image, but not all of it is here",
                        _ => "it is the image, if perhaps not the newest",
                    }
                ));
                stay(&local, report)?;
                if report.blocks_left > 0 {
                    warn(format_args!(
                        "{} blocks are stale: what reads one of them waits until {} serves again",
                        report.blocks_left, config.store
                    ));
                }
                return Ok(());
            }
            Without::Fail => {
                return Err(match need {
                    Need::Fill => failure.clone().advise(format_args!(
                        "{}; the disk holds nothing that could be booted until then",
                        failure.advice
                    )),
                    _ => failure,
                })
            }
            Without::Wait => {
                crate::console::error(&failure);
                tries += 1;
                let wait = backoff(tries);
                say(format_args!(
                    "waiting for the store (pristine.offline=wait): attempt {} in {} s",
                    tries + 1,
                    wait.as_secs()
                ));
                std::thread::sleep(wait);
            }
        }
    }
}

fn describe(facts: &Facts) {
    let of = facts.blocks;
    match (facts.dirty, facts.stale) {
        (0, 0) => say(format_args!("all {of} blocks are clean")),
        (dirty, 0) => say(format_args!("{dirty} of {of} blocks are dirty")),
        (dirty, stale) => say(format_args!(
            "{dirty} of {of} blocks are dirty, {stale} stale: an earlier run did not come to its end"
        )),
    }
}

fn stay(local: &Local, report: &mut Report) -> Result<(), Failure> {
    if let Local::Managed(facts) = local {
        report.found(facts);
        report.mode = flow::as_found(facts).word();
        report.image = hex(&facts.image);
        report.blocks_left = facts.stale;
        report.instant = facts.stale > 0;
    }
    Ok(())
}

fn hex(id: &[u8; 32]) -> String {
    pristine_shared::table::Hex(id).to_string()
}

/// What the store is needed for.
fn with_store(
    config: &Config,
    devices: &Devices,
    policy: &Policy,
    need: Need,
    local: &Local,
    open: Option<(Metadata, Planes)>,
    report: &mut Report,
) -> Result<(), Failure> {
    let begin = Instant::now();
    if config.store.needs_network() {
        // A disk that could be booted as it is does not wait long for a network that may not be there.
        let limit = match need {
            Need::Update => config.network_timeout.min(SHORT_WAIT),
            _ => config.network_timeout,
        };
        net::up(&config.ip, config.interface.as_deref(), limit)?;
    }
    report.network_ms = millis(begin);
    say(format_args!("asking {} for {}", config.store, config.image));
    let fetch = policy.fetch(local);
    let mut open = open;
    // Unless blocks have to be fetched now, who asks for the image may find that nothing of it is needed.
    if need == Need::Update || (fetch == Fetch::While && need != Need::Fill) {
        if let Some((mut metadata, mut planes)) = open.take() {
            let sb = *metadata.superblock();
            let disk = (sb.generation, &sb.image_id);
            let must_serve = need != Need::Update;
            let asked = ask(
                &config.store,
                &config.access(),
                &config.image,
                &policy.trust,
                disk,
                config.allow_older,
                must_serve,
            )?;
            report.requests = asked.1.requests;
            report.bytes_fetched = asked.1.bytes;
            if let News::Older(generation) = asked.0 {
                refuse_older(config, generation, sb.generation);
            }
            if asked.0 != News::Moved {
                report.image = hex(&sb.image_id);
                report.generation = sb.generation;
                report.image_bytes = sb.image_bytes;
                if fetch == Fetch::Before {
                    return stay(local, report);
                }
                undo::some(policy, &mut metadata, &mut planes, report)?;
                let prepared = flow::revert_instantly(metadata, planes, config.revert)?;
                return boot_on(&prepared, config, report, asked.1, begin);
            }
            open = Some((metadata, planes));
        }
    }
    let fresh = open.is_none() || policy.provision == Provision::Force;
    let disk = open.as_ref().map(|(m, _)| *m.superblock());
    let mut master = open_master(config, &policy.trust, disk.as_ref().filter(|_| !fresh))?;
    report.image = hex(&master.id());
    report.generation = match master.generation() {
        0 => disk
            .filter(|sb| sb.image_id == master.id())
            .map_or(0, |sb| sb.generation),
        generation => generation,
    };
    report.image_bytes = master.bytes();

    let mut prepared = if fresh {
        let was_managed = open.is_some();
        drop(open);
        let force = policy.provision == Provision::Force || !is_new(devices);
        let stores = Stores::<MetaDevice>::open(devices, Access::Write)?;
        // A disk that was managed before holds most of the image already.
        flow::begin(
            stores,
            &master,
            force,
            was_managed || force,
            fetch,
            config.undo,
        )?
    } else {
        let Some((mut metadata, mut planes)) = open else {
            return Err(Failure::new(Kind::Internal, "the metadata was not opened"));
        };
        undo::some(policy, &mut metadata, &mut planes, report)?;
        flow::prepare(metadata, planes, &mut master, config.revert, fetch)?
    };
    if fresh {
        report.found(&prepared.before);
    }
    let result = match fetch {
        Fetch::While => boot_on(&prepared, config, report, master.traffic(), begin),
        Fetch::Before => carry_out(&mut prepared, config, &mut master, report, begin),
    };
    // Also after a failure: what it cost so far.
    report.bytes_fetched = master.traffic().bytes;
    report.requests = master.traffic().requests;
    result
}

/// Opens the image that the disk is to be: the channel's, unless that is older than what the disk has.
fn open_master(
    config: &Config,
    trust: &TrustPolicy,
    disk: Option<&Superblock>,
) -> Result<StoreMaster, Failure> {
    let access = config.access();
    let open = |image: &ImageSpec| {
        StoreMaster::open(
            &config.store,
            &access,
            image,
            trust,
            config.parallel,
            ATTEMPTS,
        )
        .map(|master| master.with_peers(config.peers.is_some()))
    };
    let master = open(&config.image)?;
    let Some(sb) = disk else { return Ok(master) };
    let here = (master.generation(), &master.id());
    let disk = (sb.generation, &sb.image_id);
    if config.allow_older {
        master.may_go_back(trust, disk)?;
    }
    match news(here, disk, config.allow_older) {
        News::Older(generation) => {
            refuse_older(config, generation, sb.generation);
            open(&ImageSpec::Id(sb.image_id))
        }
        News::Current | News::Moved => Ok(master),
    }
}

fn refuse_older(config: &Config, channel: u64, disk: u64) {
    warn(format_args!(
        "refused: {} is generation {channel} in {}, and this disk has generation {disk} already; it stays as it is. If \
         it is meant (another channel, a store that was set up anew), start once with pristine.allow-older",
        config.image, config.store
    ));
}

/// With all that was to be done before the boot done: stale blocks come while the system runs.
fn boot_on(
    prepared: &Prepared<MetaDevice>,
    config: &Config,
    report: &mut Report,
    traffic: Traffic,
    begin: Instant,
) -> Result<(), Failure> {
    let done = Done {
        commits: prepared.commits,
        ..Done::default()
    };
    let stale = prepared.planes.count(Select::Stale);
    report.did(prepared.mode, &done, traffic, millis(begin));
    report.blocks_left = stale;
    report.instant = stale > 0;
    if stale > 0 {
        say(format_args!(
            "{} {} at once: {stale} of {} blocks are stale, and come from {} while the system runs",
            prepared.mode.doing(),
            config.image,
            prepared.planes.blocks(),
            config.store
        ));
    }
    Ok(())
}

/// Whether there is no metadata at all: then formatting must not be forced over whatever else there is.
fn is_new(devices: &Devices) -> bool {
    matches!(Metadata::open(devices, Access::Read), Err(e) if e.class() == Class::NotFormatted)
}

fn carry_out(
    prepared: &mut Prepared<MetaDevice>,
    config: &Config,
    master: &mut StoreMaster,
    report: &mut Report,
    begin: Instant,
) -> Result<(), Failure> {
    let mode = prepared.mode;
    let stale = prepared.planes.count(Select::Stale);
    if stale > 0 {
        say(format_args!(
            "{} {} {}: {stale} of {} blocks",
            mode.doing(),
            if mode == Mode::Provision {
                "from"
            } else {
                "to"
            },
            config.image,
            prepared.planes.blocks(),
        ));
    }
    let Some(mut disk) = prepared.metadata.data_file() else {
        return Err(Failure::new(
            Kind::Device,
            "the data device cannot be opened again",
        ));
    };
    let mut said = |p: Progress| {
        let percent = (p.blocks * 100).checked_div(p.total).unwrap_or(100);
        say(format_args!(
            "{}: {percent} % ({} of {} blocks)",
            mode.doing(),
            p.blocks,
            p.total
        ));
    };
    let every = if config.debug {
        PROGRESS_EVERY_DEBUG
    } else {
        PROGRESS_EVERY
    };
    let mut pace = Pace::new(every, &mut said);
    let done = prepared.finish(
        &mut disk,
        master,
        Options::default().batch_blocks,
        &mut pace,
    )?;
    report.did(mode, &done, master.traffic(), millis(begin));
    if stale > 0 {
        say(format_args!(
            "{} done: {} blocks fetched, {} zeroed, {} were right already",
            mode.doing(),
            done.fetched,
            done.zeroed,
            done.kept
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_minute() {
        let waits: Vec<u64> = (1..10).map(|n| backoff(n).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    }
}
