// SPDX-License-Identifier: GPL-2.0

use super::*;

fn policy() -> Policy {
    Policy {
        trust: Default::default(),
        image: ImageSpec::Channel("stable".into()),
        revert: Revert::Eager,
        provision: Provision::Auto,
        offline: Offline::Wait,
        damaged: Damaged::Refuse,
    }
}

fn instant() -> Policy {
    Policy {
        revert: Revert::Instant,
        ..policy()
    }
}

fn managed(dirty: u64, stale: u64, provisioning: bool) -> Local {
    Local::Managed(Facts {
        image: [7; 32],
        provisioning,
        dirty,
        stale,
        blocks: 100,
    })
}

#[test]
fn figure_2() {
    let p = policy();
    assert_eq!(need(&Local::Nothing, &p), Ok(Need::Fill));
    assert_eq!(need(&managed(0, 0, false), &p), Ok(Need::Update));
    assert_eq!(need(&managed(3, 0, false), &p), Ok(Need::Revert));
    assert_eq!(need(&managed(3, 1, false), &p), Ok(Need::Fill));
    assert_eq!(need(&managed(0, 0, true), &p), Ok(Need::Fill));
}

#[test]
fn instant_boots_with_stale_blocks() {
    let p = instant();
    assert_eq!(need(&managed(0, 0, false), &p), Ok(Need::Update));
    assert_eq!(need(&managed(3, 0, false), &p), Ok(Need::Revert));
    assert_eq!(need(&managed(3, 1, false), &p), Ok(Need::Revert));
    assert_eq!(need(&managed(0, 1, false), &p), Ok(Need::Serve));
    assert_eq!(p.fetch(&managed(3, 1, false)), Fetch::While);
    // How a disk is filled is for another setting to say.
    assert_eq!(need(&managed(0, 9, true), &p), Ok(Need::Fill));
    assert_eq!(p.fetch(&managed(0, 9, true)), Fetch::Before);
    assert_eq!(p.fetch(&Local::Nothing), Fetch::Before);
}

#[test]
fn provisioning_may_be_instant_too() {
    let mut p = policy();
    p.provision = Provision::Instant;
    assert_eq!(need(&Local::Nothing, &p), Ok(Need::Fill));
    assert_eq!(p.fetch(&Local::Nothing), Fetch::While);
    // One that was begun the other way is ended this way.
    assert_eq!(need(&managed(0, 9, true), &p), Ok(Need::Serve));
    // At the next boot eager means that all of the disk is right before the system starts.
    assert_eq!(need(&managed(0, 9, false), &p), Ok(Need::Fill));
    p.revert = Revert::Off;
    assert_eq!(need(&managed(2, 9, false), &p), Ok(Need::Serve));
    p.revert = Revert::Instant;
    assert_eq!(need(&managed(2, 9, false), &p), Ok(Need::Revert));
    p.provision = Provision::Force;
    assert_eq!(need(&managed(2, 9, false), &p), Ok(Need::Fill));
    assert_eq!(p.fetch(&managed(2, 9, false)), Fetch::Before);
}

#[test]
fn a_clean_disk_with_a_pinned_image_needs_no_store() {
    for mut p in [policy(), instant()] {
        p.image = ImageSpec::Id([7; 32]);
        assert_eq!(need(&managed(0, 0, false), &p), Ok(Need::Nothing));
        assert_eq!(need(&managed(1, 0, false), &p), Ok(Need::Revert));
        p.revert = Revert::Off;
        assert_eq!(need(&managed(1, 0, false), &p), Ok(Need::Nothing));
        p.image = ImageSpec::Id([8; 32]);
        assert_eq!(need(&managed(0, 0, false), &p), Ok(Need::Update));
    }
}

#[test]
fn identity_and_damage_are_refused_unless_told_otherwise() {
    let mut p = policy();
    let local = Local::Unusable(Failure::new(Kind::Metadata, "damaged"));
    assert_eq!(need(&local, &p).unwrap_err().kind, Kind::Metadata);
    p.damaged = Damaged::Reprovision;
    assert_eq!(need(&local, &p), Ok(Need::Fill));
    // A disk that fails or is in use is not a damaged one.
    let local = Local::Unusable(Failure::new(Kind::Device, "in use"));
    assert!(need(&local, &p).is_err());
    p.provision = Provision::Force;
    assert_eq!(need(&local, &p), Ok(Need::Fill));
}

#[test]
fn a_disk_is_not_filled_when_that_is_forbidden() {
    let mut p = policy();
    p.provision = Provision::Never;
    assert!(need(&Local::Nothing, &p).is_err());
    assert_eq!(need(&managed(0, 0, false), &p), Ok(Need::Update));
}

#[test]
fn what_is_half_restored_is_never_booted() {
    for policy in [Offline::Wait, Offline::BootAsIs, Offline::Refuse] {
        let without = without_store(Need::Fill, policy, Kind::Store);
        assert_ne!(without, Without::Boot, "{policy}");
    }
    let without = |need, policy| without_store(need, policy, Kind::Store);
    assert_eq!(without(Need::Fill, Offline::Wait), Without::Wait);
    assert_eq!(without(Need::Revert, Offline::Wait), Without::Wait);
    assert_eq!(without(Need::Revert, Offline::BootAsIs), Without::Boot);
    assert_eq!(without(Need::Revert, Offline::Refuse), Without::Fail);
    // Machines start when the server is down, if their disk is whole.
    assert_eq!(without(Need::Update, Offline::Wait), Without::Boot);
    assert_eq!(without(Need::Update, Offline::Refuse), Without::Fail);
}

#[test]
fn stale_blocks_wait_for_the_server_in_the_running_system() {
    let without = |policy, why| without_store(Need::Serve, policy, why);
    assert_eq!(without(Offline::Wait, Kind::Store), Without::Boot);
    assert_eq!(without(Offline::Wait, Kind::Network), Without::Wait);
    assert_eq!(without(Offline::BootAsIs, Kind::Network), Without::Boot);
    assert_eq!(without(Offline::Refuse, Kind::Store), Without::Fail);
}
