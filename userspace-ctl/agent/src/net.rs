// SPDX-License-Identifier: GPL-2.0

//! The network, as far as fetching an image needs it.
//!
//! The work is done by busybox, which the initramfs carries anyway: `ip` and `udhcpc`. The agent is udhcpc's
//! script itself: called with an event's name and a lease in its environment, it writes the lease to a file.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::config::IpSpec;
use crate::console::{debug, say, warn};
use crate::failure::{Failure, Kind};

/// Where leases lie.
const LEASES: &str = "/run/pristine";
/// Says to the agent that it is udhcpc's script.
pub const SCRIPT_MARK: &str = "PRISTINE_LEASE";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What a DHCP server gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The machine's own address.
    pub address: Ipv4Addr,
    /// Bits of the network.
    pub prefix: u8,
    /// The way to other networks.
    pub gateway: Option<Ipv4Addr>,
    /// Name servers.
    pub dns: Vec<String>,
}

impl Lease {
    /// From udhcpc's environment.
    pub fn from_environment(var: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let words = |name: &str| -> Vec<String> {
            var(name)
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect()
        };
        let address = var("ip")?.parse().ok()?;
        // `mask` is a number of bits, `subnet` a dotted quad; some versions have only the one, some the other.
        let prefix = var("mask")
            .and_then(|m| m.parse().ok())
            .or_else(|| {
                let mask: Ipv4Addr = var("subnet")?.parse().ok()?;
                u8::try_from(u32::from(mask).count_ones()).ok()
            })
            .filter(|p| *p <= 32)
            .unwrap_or(24);
        Some(Self {
            address,
            prefix,
            gateway: words("router").first().and_then(|r| r.parse().ok()),
            dns: words("dns"),
        })
    }

    fn text(&self) -> String {
        let gateway = self.gateway.map(|g| g.to_string()).unwrap_or_default();
        format!(
            "{}/{}\n{gateway}\n{}\n",
            self.address,
            self.prefix,
            self.dns.join(" ")
        )
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let (address, prefix) = lines.next()?.split_once('/')?;
        Some(Self {
            address: address.parse().ok()?,
            prefix: prefix.parse().ok()?,
            gateway: lines.next().and_then(|g| g.parse().ok()),
            dns: lines
                .next()
                .unwrap_or("")
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
        })
    }
}

/// What the agent does as udhcpc's script. Returns the exit code.
pub fn script(event: &str) -> u8 {
    let Ok(path) = std::env::var(SCRIPT_MARK) else {
        return 0;
    };
    if !matches!(event, "bound" | "renew") {
        return 0;
    }
    let lease = Lease::from_environment(|name| std::env::var(name).ok());
    match lease.map(|l| fs::write(path, l.text())) {
        Some(Ok(())) => 0,
        _ => 1,
    }
}

fn busybox() -> Option<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(PathBuf::from)
        .find(|p| p.exists())
}

fn run(arguments: &[&str]) -> Result<(), Failure> {
    let Some(busybox) = busybox() else {
        return Err(Failure::new(
            Kind::Network,
            "there is no busybox to set up the network with",
        )
        .advise(
            "add busybox to the initramfs, or set up the network before and use pristine.ip=off",
        ));
    };
    debug(arguments.join(" "));
    let output = Command::new(busybox)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Failure::new(Kind::Network, format!("cannot run busybox: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().last().unwrap_or("").to_owned();
    Err(Failure::new(
        Kind::Network,
        format!("`{}` failed: {said}", arguments.join(" ")),
    ))
}

/// The interfaces to try: the one asked for, or all with hardware behind them.
fn candidates(sys: &Path, wanted: Option<&str>) -> Vec<String> {
    if let Some(name) = wanted {
        return match sys.join(name).exists() {
            true => vec![name.to_owned()],
            false => vec![],
        };
    }
    let mut names: Vec<String> = fs::read_dir(sys)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n != "lo" && sys.join(n).join("device").exists())
        .collect();
    names.sort();
    names
}

fn has_carrier(sys: &Path, name: &str) -> bool {
    fs::read_to_string(sys.join(name).join("carrier")).is_ok_and(|c| c.trim() == "1")
}

/// Brings the network up. Interfaces are tried in turn, those with a carrier first.
///
/// # Errors
///
/// None of them got an address within `limit`.
pub fn up(ip: &IpSpec, interface: Option<&str>, limit: Duration) -> Result<(), Failure> {
    if *ip == IpSpec::Off {
        return Ok(());
    }
    let sys = Path::new("/sys/class/net");
    let begin = Instant::now();
    let mut said = 0;
    if let Err(failure) = run(&["ip", "link", "set", "lo", "up"]) {
        debug(failure);
    }
    let mut last = String::from("there is no network interface");
    loop {
        let mut names = candidates(sys, interface);
        for name in &names {
            if let Err(failure) = run(&["ip", "link", "set", name, "up"]) {
                last = failure.what;
            }
        }
        names.retain(|n| has_carrier(sys, n));
        for name in &names {
            match configure(ip, name) {
                Ok(address) => {
                    say(format_args!("{name} has the address {address}"));
                    return Ok(());
                }
                Err(failure) => last = format!("{name}: {}", failure.what),
            }
        }
        if names.is_empty() && !candidates(sys, interface).is_empty() {
            last = "no interface has a carrier; is the cable in?".into();
        }
        let waited = begin.elapsed();
        if waited >= limit {
            let there = candidates(sys, None).join(", ");
            return Err(Failure::new(
                Kind::Network,
                format!("no network after {} s: {last}", limit.as_secs()),
            )
            .advise(format_args!(
                "check the cable, the DHCP server, pristine.ip and pristine.interface; interfaces: {}",
                if there.is_empty() { "none (is the driver in the initramfs?)" } else { &there }
            )));
        }
        if waited.as_secs() / 5 >= said && waited.as_secs() >= 1 {
            said = waited.as_secs() / 5 + 1;
            say(format_args!(
                "waiting for the network (for {} s): {last}",
                waited.as_secs()
            ));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn configure(ip: &IpSpec, name: &str) -> Result<String, Failure> {
    let lease = match ip {
        IpSpec::Off => return Ok(String::new()),
        IpSpec::Dhcp => dhcp(name)?,
        IpSpec::Static {
            address,
            prefix,
            gateway,
            dns,
        } => Lease {
            address: *address,
            prefix: *prefix,
            gateway: *gateway,
            dns: dns.iter().map(ToString::to_string).collect(),
        },
    };
    let address = format!("{}/{}", lease.address, lease.prefix);
    run(&["ip", "addr", "flush", "dev", name])?;
    run(&["ip", "addr", "add", &address, "dev", name])?;
    if let Some(gateway) = lease.gateway {
        let gateway = gateway.to_string();
        run(&[
            "ip", "route", "replace", "default", "via", &gateway, "dev", name,
        ])?;
    }
    if !lease.dns.is_empty() {
        let mut text = String::new();
        for server in &lease.dns {
            text.extend(["nameserver ", &server.to_string(), "\n"]);
        }
        let _ = fs::create_dir_all("/etc");
        if let Err(e) = fs::write(RESOLV_CONF, text) {
            warn(format_args!("cannot write {RESOLV_CONF}: {e}"));
        }
    }
    Ok(address)
}

fn dhcp(name: &str) -> Result<Lease, Failure> {
    let fail = |what: String| Failure::new(Kind::Network, what);
    let me =
        std::env::current_exe().map_err(|e| fail(format!("cannot find the agent itself: {e}")))?;
    let path = format!("{LEASES}/lease.{name}");
    let _ = fs::create_dir_all(LEASES);
    let _ = fs::remove_file(&path);
    let Some(busybox) = busybox() else {
        return Err(fail("there is no busybox for DHCP".into())
            .advise("add busybox to the initramfs, or use pristine.ip=ADDRESS/PREFIX"));
    };
    // Four requests two seconds apart, then it gives up (-n) and the next interface has its turn.
    let status = Command::new(busybox)
        .args([
            "udhcpc", "-i", name, "-f", "-q", "-n", "-t", "4", "-T", "2", "-s",
        ])
        .arg(&me)
        .env(SCRIPT_MARK, &path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(|e| fail(format!("cannot run udhcpc: {e}")))?;
    let lease = fs::read_to_string(&path)
        .ok()
        .and_then(|t| Lease::parse(&t));
    lease.ok_or_else(|| fail(format!("no DHCP server answered ({status})")))
}

/// What the environment of a process is, for [`script`]'s caller to decide whether it is meant.
pub fn is_script(arguments: &[String]) -> Option<String> {
    let environment: BTreeMap<String, String> = std::env::vars().collect();
    match arguments {
        [event] if environment.contains_key(SCRIPT_MARK) => Some(event.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(vars: &[(&str, &str)]) -> Option<Lease> {
        Lease::from_environment(|n| {
            vars.iter()
                .find(|(k, _)| *k == n)
                .map(|(_, v)| (*v).to_owned())
        })
    }

    #[test]
    fn leases_survive_the_file() {
        let full = lease(&[
            ("ip", "10.0.2.15"),
            ("mask", "24"),
            ("router", "10.0.2.2 10.0.2.9"),
            ("dns", "10.0.2.3 1.1.1.1"),
        ])
        .unwrap();
        assert_eq!(full.gateway, Some(Ipv4Addr::new(10, 0, 2, 2)));
        assert_eq!(Lease::parse(&full.text()), Some(full));
        let bare = lease(&[("ip", "10.0.2.15"), ("subnet", "255.255.0.0")]).unwrap();
        assert_eq!(bare.prefix, 16);
        assert_eq!(Lease::parse(&bare.text()), Some(bare));
    }

    #[test]
    fn a_lease_without_an_address_is_none() {
        assert_eq!(lease(&[("mask", "24")]), None);
        assert_eq!(lease(&[("ip", "nonsense")]), None);
        assert_eq!(Lease::parse(""), None);
    }

    #[test]
    fn interfaces_are_those_with_hardware() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["lo", "eth1", "eth0", "bond0"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        for name in ["eth0", "eth1"] {
            fs::create_dir(dir.path().join(name).join("device")).unwrap();
        }
        fs::write(dir.path().join("eth1/carrier"), "1\n").unwrap();
        assert_eq!(candidates(dir.path(), None), ["eth0", "eth1"]);
        assert_eq!(candidates(dir.path(), Some("bond0")), ["bond0"]);
        assert!(candidates(dir.path(), Some("eth7")).is_empty());
        assert!(has_carrier(dir.path(), "eth1") && !has_carrier(dir.path(), "eth0"));
    }
}
