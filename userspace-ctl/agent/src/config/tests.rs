// SPDX-License-Identifier: GPL-2.0

use std::net::{IpAddr, Ipv4Addr};

use super::*;

const LEAST: &str =
    "pristine.data=/dev/vda pristine.store=http://10.0.2.2:8000 pristine.image=stable";

fn parse(line: &str) -> Result<Config, ConfigError> {
    let mut settings = Settings::default();
    settings.add_command_line(line);
    settings.config()
}

#[test]
fn the_least_configuration_has_sensible_defaults() {
    let config = parse(LEAST).unwrap();
    assert_eq!(config.data, DeviceSpec::Path("/dev/vda".into()));
    assert_eq!(config.metadata, None);
    assert_eq!(config.image, ImageSpec::Channel("stable".into()));
    assert_eq!(config.name, "root");
    assert_eq!(config.offline, Offline::Wait);
    assert_eq!(config.on_error, OnError::Retry);
    assert_eq!(config.ip, IpSpec::Dhcp);
    assert!(!config.debug && !config.allow_older);
    let config = parse(&format!(
        "{LEAST} pristine.revert=instant pristine.provision=instant"
    ));
    let config = config.unwrap();
    assert_eq!(
        (config.revert, config.provision),
        (Revert::Instant, Provision::Instant)
    );
}

#[test]
fn the_command_line_wins_over_the_file() {
    let mut settings = Settings::default();
    let file =
        "# a comment\nstore = http://a/\n image=\"old\"\ndata=SERIAL=x\npristine.revert = off\n";
    settings.add_file("agent.conf", file).unwrap();
    settings.add_command_line("quiet pristine.image=new pristine.debug ro");
    let config = settings.config().unwrap();
    assert_eq!(config.image, ImageSpec::Channel("new".into()));
    assert_eq!(config.store, StoreSpec::Http("http://a/".into()).into());
    assert_eq!(config.data, DeviceSpec::Serial("x".into()));
    assert_eq!(config.revert, Revert::Off);
    assert!(config.debug);
    assert!(settings.warnings().is_empty());
}

#[test]
fn unknown_settings_are_named_and_do_no_harm() {
    let mut settings = Settings::default();
    settings.add_command_line(&format!("{LEAST} pristine.colour=red"));
    assert_eq!(settings.warnings().len(), 1);
    assert!(settings.warnings()[0].contains("pristine.colour"));
    settings.config().unwrap();
}

#[test]
fn nonsense_is_refused_by_name() {
    for (bad, names) in [
        ("pristine.offline=maybe", "boot-as-is"),
        ("pristine.revert=", "eager"),
        ("pristine.undo=much", "512M"),
        ("pristine.undo=5KM", "512M"),
        ("pristine.undo=4K", "keeps nothing"),
        ("pristine.undo=99999999999T", "512M"),
        ("pristine.allow-older=maybe", "neither"),
        ("pristine.hydrate=never", "idle"),
        ("pristine.hydrate-rate=fast", "20M"),
        ("pristine.hydrate-rate=0", "20M"),
        ("pristine.hydrate-rate=5KK", "20M"),
        ("pristine.metadata=vdb", "PARTUUID="),
        ("pristine.store=ftp://x", "http://"),
        ("pristine.store=https://x", "each block is verified"),
        ("pristine.store=http://", "http://"),
        ("pristine.image=../x", "channel"),
        ("pristine.image=", "channel"),
        ("pristine.ip=10.0.0.1", "ADDRESS/PREFIX"),
        ("pristine.ip=10.0.0.1/33", "33"),
        ("pristine.ip=10.0.0.1/24,nowhere", "nowhere"),
        ("pristine.name=../../dev", "letters"),
        ("pristine.parallel=0", "1 to 64"),
        ("pristine.device-timeout=-1", "number"),
        ("pristine.debug=perhaps", "neither"),
        ("pristine.init=systemd", "absolute"),
    ] {
        let error = parse(&format!("{LEAST} {bad}")).unwrap_err().to_string();
        let key = bad.split('=').next().unwrap();
        assert!(
            error.contains(key) && error.contains(names),
            "{bad}: {error}"
        );
    }
    let error = parse("pristine.data=/dev/vda").unwrap_err().to_string();
    assert!(error.contains("pristine.store"), "{error}");
    let mut settings = Settings::default();
    let error = settings.add_file("f", "\nwhat\n").unwrap_err().to_string();
    assert!(error.contains("f, line 2"), "{error}");
}

#[test]
fn addresses() {
    assert_eq!(
        "10.0.2.15/24,10.0.2.2,10.0.2.3,fe80::1".parse(),
        Ok(IpSpec::Static {
            address: Ipv4Addr::new(10, 0, 2, 15),
            prefix: 24,
            gateway: Some(Ipv4Addr::new(10, 0, 2, 2)),
            dns: vec![
                IpAddr::V4(Ipv4Addr::new(10, 0, 2, 3)),
                "fe80::1".parse().unwrap()
            ],
        })
    );
    assert!(matches!(
        "192.168.1.2/16,,1.1.1.1".parse(),
        Ok(IpSpec::Static { gateway: None, .. })
    ));
}

#[test]
fn quotes_and_underscores_are_as_in_the_kernel() {
    let config = parse(&format!(
        "{LEAST} pristine.rootflags=\"data=ordered,x y\" pristine.device_timeout=7 init=/bin/sh"
    ))
    .unwrap();
    assert_eq!(config.rootflags, "data=ordered,x y");
    assert_eq!(config.device_timeout, Duration::from_secs(7));
    assert_eq!(config.init, "/bin/sh");
}

#[test]
fn the_way_on_is_known_even_if_the_rest_is_nonsense() {
    let mut settings = Settings::default();
    settings.add_command_line("pristine.onerror=poweroff pristine.data=?");
    assert!(settings.config().is_err());
    assert_eq!(settings.on_error(), OnError::Poweroff);
}

#[test]
fn a_token_is_taken_and_never_shown() {
    let config = parse(&format!("{LEAST} pristine.token=geheim")).unwrap();
    assert_eq!(config.token.as_ref().unwrap().as_str(), "geheim");
    assert!(!format!("{config:?}").contains("geheim"));
    let error = parse(&format!("{LEAST} pristine.token=\"ge heim\"")).unwrap_err();
    assert!(!error.to_string().contains("heim"), "{error}");
    assert!(error.to_string().contains("visible ASCII"), "{error}");
    assert_eq!(parse(LEAST).unwrap().token, None);
}

#[test]
fn keys_add_up() {
    let [a, b] = [
        "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3",
        "RWQf6LRCGA9i59SLOFxz6NxvASXDJeRtuZykwQepbDEGt87ig1BNpWaV",
    ];
    let count = |line: &str| parse(&format!("{LEAST} {line}")).map(|c| c.keys.iter().count());
    assert_eq!(count(""), Ok(0));
    assert_eq!(count(&format!("pristine.key={a}")), Ok(1));
    assert_eq!(count(&format!("pristine.key={a} pristine.key={b}")), Ok(2));
    assert_eq!(
        count(&format!("pristine.key={a},{b} pristine.key={b}")),
        Ok(2)
    );
    let mut settings = Settings::default();
    settings
        .add_file("agent.conf", &format!("key = {a}\nkey = {b}\n"))
        .unwrap();
    settings.add_command_line(LEAST);
    assert_eq!(settings.config().unwrap().keys.iter().count(), 2);
    let error = count("pristine.key=RWQx").unwrap_err().to_string();
    assert!(error.contains("not a public key"), "{error}");
}

#[test]
fn stores_add_up_and_the_command_line_replaces_those_of_the_file() {
    let mut settings = Settings::default();
    let file =
        "store = http://a, /srv/store\nstore = http://b\nstore = http://a\ndata=/dev/x\nimage=x\n";
    settings.add_file("agent.conf", file).unwrap();
    let config = settings.config().unwrap();
    assert_eq!(config.store.to_string(), "http://a, /srv/store, http://b");
    assert!(config.store.needs_network() && config.store.timeout.is_none());
    settings.add_command_line(
        "pristine.store=http://c pristine.fetch_timeout=3 pristine.store=http://d,http://e",
    );
    let config = settings.config().unwrap();
    assert_eq!(config.store.to_string(), "http://c, http://d, http://e");
    assert_eq!(config.store.timeout, Some(Duration::from_secs(3)));
    for (wrong, says) in [
        ("pristine.store=http://c,,http://d", "pristine.store"),
        ("pristine.store=ftp://c", "neither"),
        ("pristine.fetch-timeout=0", "1 to 600"),
    ] {
        let mut settings = settings.clone();
        settings.add_command_line(wrong);
        let error = settings.config().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
