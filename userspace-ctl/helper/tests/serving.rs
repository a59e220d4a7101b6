// SPDX-License-Identifier: GPL-2.0

//! A helper and its kernel: requests, hydration, coming and going.
// A single run of blocks is a trace, too.
#![allow(clippy::single_range_in_vec_init)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{places, settings, Kernel, Running};
use pristine_helper::helper::{Helper, Places, Settings};
use pristine_helper::pace::Hydrate;
use pristine_helper::source::Source;
use pristine_helper::state::AtomicFile;
use pristine_helper::stop::{End, Stop};
use pristine_helper::trace::{self, Recorder};
use pristine_store::{put_trace, HttpOptions, ImageId};
use pristine_testkit::{sample_image, FaultyServer, TestStore};

const SHORT: Duration = Duration::from_millis(300);

struct Lab {
    image: Vec<u8>,
    id: ImageId,
    store: TestStore,
    server: FaultyServer,
}

/// An image of 16 MiB (4096 blocks) on a server.
fn lab() -> Lab {
    let image = sample_image(1, 16);
    let (store, id) = TestStore::with_image(&image).unwrap();
    let server = FaultyServer::start(&store.root()).unwrap();
    Lab {
        image,
        id,
        store,
        server,
    }
}

impl Lab {
    fn kernel(&self) -> Arc<Kernel> {
        Kernel::new(self.id, &self.image, 0, 12)
    }

    fn urls(&self) -> [String; 1] {
        [self.server.url()]
    }

    fn rules(&self, rules: &str) {
        self.server.set_rules(rules.parse().unwrap());
    }
}

#[test]
fn reads_are_served_and_the_rest_is_hydrated() {
    let lab = lab();
    let kernel = lab.kernel();
    kernel.write(5);
    kernel.write(3000);
    let helper = Running::start(&kernel, &lab.urls(), settings(Hydrate::Full));
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let kernel = &kernel;
            scope.spawn(move || {
                for n in 0..100 {
                    let block = (n * 7919 + thread * 1033) % 4080;
                    if ![5, 3000].iter().any(|w| (block..block + 4).contains(w)) {
                        kernel.read(block..block + 1 + n % 4);
                    }
                }
            });
        }
    });
    assert_eq!(helper.join(), End::Complete);
    assert_eq!(kernel.stale_blocks(), 0);
    kernel.check(&[5, 3000]);
    let (offered, in_vain) = kernel.offered();
    // Requests and offers of the same blocks may cross.
    assert!(in_vain * 4 <= offered, "{in_vain} of {offered}");
    // Each frame about once: 16 MiB are some 100 frames in requests of up to 1 MiB.
    assert!(lab.server.requests() < 150, "{}", lab.server.requests());
}

#[test]
fn hydration_alone_fetches_each_byte_once_and_zeros_not_at_all() {
    let lab = lab();
    let kernel = lab.kernel();
    let one = Settings {
        hydrators: 1,
        ..settings(Hydrate::Full)
    };
    assert_eq!(
        Running::start(&kernel, &lab.urls(), one).join(),
        End::Complete
    );
    kernel.check(&[]);
    assert_eq!(kernel.offered(), (4096, 0));
    assert!(lab.server.requests() < 40, "{}", lab.server.requests());
    // 4 MiB of zeros in one call.
    assert!(kernel.order().iter().any(|r| r.end - r.start >= 1024));
}

#[test]
fn nothing_is_hydrated_that_is_not_stale() {
    let lab = lab();
    let kernel = lab.kernel();
    kernel.only_stale(&[0..3, 64..65, 1000..1100, 2500..2501, 4095..4096]);
    Running::complete(&kernel, &lab.urls(), settings(Hydrate::Idle), &[]);
    assert_eq!(kernel.offered(), (3 + 1 + 100 + 1 + 1, 0));
}

#[test]
fn without_hydration_only_what_is_asked_for_comes_and_the_rest_of_its_frames() {
    let lab = lab();
    let kernel = lab.kernel();
    let helper = Running::start(&kernel, &lab.urls(), settings(Hydrate::Off));
    kernel.read(100..110);
    kernel.read(2000..2001);
    let until = Instant::now() + Duration::from_secs(10);
    while kernel.offered().0 < 22 + 31 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(SHORT);
    assert_eq!(kernel.stale_blocks(), 4096 - 2 * 32);
    assert_eq!(kernel.offered(), (22 + 31, 0));
    assert_eq!(helper.terminate(), End::Asked);
    kernel.check(&[]);
}

#[test]
fn neighbours_in_a_frame_are_offered_and_need_no_second_fetch() {
    let lab = lab();
    let kernel = lab.kernel();
    // So slow that nothing but neighbours comes.
    let slow = Settings {
        rate: Some(1),
        ..settings(Hydrate::Idle)
    };
    let helper = Running::start(&kernel, &lab.urls(), slow);
    kernel.read(100..101);
    let until = Instant::now() + Duration::from_secs(10);
    while kernel.offered().0 < 31 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    let before = lab.server.requests();
    kernel.read(96..128);
    assert_eq!(lab.server.requests(), before);
    helper.terminate();
    kernel.check(&[]);
}

#[test]
fn a_frame_is_fetched_once_however_many_want_it() {
    let lab = lab();
    lab.rules("packs/:delay=200");
    let kernel = lab.kernel();
    let helper = Running::start(&kernel, &lab.urls(), settings(Hydrate::Off));
    kernel.read(4095..4096);
    let before = lab.server.requests();
    let ids: Vec<u64> = (0..32).map(|b| kernel.ask(b..b + 1)).collect();
    for id in ids {
        kernel.wait(id, Duration::from_secs(20)).unwrap();
    }
    assert!(
        lab.server.requests() - before <= 2,
        "{}",
        lab.server.requests()
    );
    helper.terminate();
    kernel.check(&[]);
}

#[test]
fn device_blocks_of_several_image_blocks_and_a_device_that_is_larger() {
    let lab = lab();
    let kernel = Kernel::new(lab.id, &lab.image, 1 << 20, 14);
    Running::complete(
        &kernel,
        &lab.urls(),
        settings(Hydrate::Full),
        &[0..16, 1000..1088],
    );
}

#[test]
fn a_killed_helper_loses_no_request() {
    let lab = lab();
    let kernel = lab.kernel();
    lab.rules("packs/:hang");
    let first = Running::start(&kernel, &lab.urls(), settings(Hydrate::Idle));
    let ids: Vec<u64> = (0..20).map(|n| kernel.ask(n * 100..n * 100 + 3)).collect();
    assert_eq!(kernel.wait(ids[0], SHORT), Err(-1));
    first.kill();
    // With no helper at all they wait, too.
    assert_eq!(kernel.wait(ids[7], SHORT), Err(-1));
    lab.rules("");
    let second = Running::start(&kernel, &lab.urls(), settings(Hydrate::Idle));
    for id in ids {
        kernel.wait(id, Duration::from_secs(20)).unwrap();
    }
    assert_eq!(second.join(), End::Complete);
    kernel.check(&[]);
}

#[test]
fn a_helper_is_replaced_under_load() {
    let lab = lab();
    let kernel = lab.kernel();
    let mut helpers = vec![Running::start(&kernel, &lab.urls(), settings(Hydrate::Off))];
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let kernel = &kernel;
            scope.spawn(move || {
                for n in 0..200 {
                    let block = (n * 7919 + thread * 1033) % 4090;
                    kernel.read(block..block + 2);
                }
            });
        }
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(40));
            helpers.push(Running::start(&kernel, &lab.urls(), settings(Hydrate::Off)));
        }
    });
    let last = helpers.pop().unwrap();
    for helper in helpers {
        assert_eq!(helper.join(), End::TakenOver);
    }
    assert_eq!(last.terminate(), End::Asked);
    kernel.check(&[]);
}

#[test]
fn a_suspended_device_is_waited_for() {
    let lab = lab();
    let kernel = lab.kernel();
    let helper = Running::start(&kernel, &lab.urls(), settings(Hydrate::Full));
    kernel.read(0..4);
    kernel.suspend(true);
    let id = kernel.ask(4000..4001);
    std::thread::sleep(SHORT);
    let stale = kernel.stale_blocks();
    std::thread::sleep(SHORT);
    assert_eq!(
        kernel.stale_blocks(),
        stale,
        "a suspended device is left alone"
    );
    kernel.suspend(false);
    kernel.wait(id, Duration::from_secs(10)).ok();
    assert_eq!(helper.join(), End::Complete);
    kernel.check(&[]);
}

#[test]
fn a_device_that_goes_away_ends_it() {
    let lab = lab();
    let kernel = lab.kernel();
    let helper = Running::start(&kernel, &lab.urls(), settings(Hydrate::Off));
    kernel.read(0..1);
    kernel.remove();
    assert_eq!(helper.join(), End::Gone);
}

#[test]
fn what_is_in_hand_is_finished_at_the_end() {
    let lab = lab();
    let kernel = lab.kernel();
    lab.rules("packs/:delay=200");
    let helper = Running::start(&kernel, &lab.urls(), settings(Hydrate::Off));
    let id = kernel.ask(77..78);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(helper.terminate(), End::Asked);
    assert_eq!(kernel.wait(id, Duration::ZERO), Ok(()));
    kernel.check(&[]);
}

#[test]
fn a_boot_trace_is_recorded_and_followed() {
    let lab = lab();
    let dir = tempfile::tempdir().unwrap();
    let name = trace::file_name(&lab.id);
    let with_trace = || Places {
        state: Some(AtomicFile::new(dir.path(), "state.json").unwrap()),
        trace: Some(AtomicFile::new(dir.path(), &name).unwrap()),
        ..places()
    };
    let kernel = lab.kernel();
    let helper = Running::start_in(&kernel, &lab.urls(), settings(Hydrate::Off), with_trace());
    for block in [3900u64, 10, 1500] {
        kernel.read(block..block + 2);
    }
    helper.recorder.end();
    kernel.read(700..701);
    helper.terminate();
    let recorded = std::fs::read(dir.path().join(&name)).unwrap();
    let runs = trace::parse(&recorded, &lab.id).unwrap();
    assert_eq!(runs, [3900..3902, 10..12, 1500..1502]);
    let state = std::fs::read(dir.path().join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    assert_eq!(state["answered"], 4);
    assert_eq!(state["ended"], "asked to stop");

    // The next boot finds it there before it asks.
    let kernel = lab.kernel();
    let one = Settings {
        hydrators: 1,
        ..settings(Hydrate::Idle)
    };
    let helper = Running::start_in(&kernel, &lab.urls(), one, with_trace());
    assert_eq!(helper.join(), End::Complete);
    kernel.check(&[]);
    assert_eq!(kernel.order()[..3], [3900..3902, 10..12, 1500..1502]);

    // Garbage is no reason not to work.
    std::fs::write(dir.path().join(&name), &recorded[..recorded.len() / 2]).unwrap();
    let kernel = lab.kernel();
    let helper = Running::start_in(&kernel, &lab.urls(), settings(Hydrate::Full), with_trace());
    assert_eq!(helper.join(), End::Complete);
    kernel.check(&[]);
}

#[test]
fn who_reads_in_a_row_finds_the_next_blocks_there() {
    let lab = lab();
    lab.rules("packs/:delay=50");
    let kernel = lab.kernel();
    let helper = Running::start(&kernel, &lab.urls(), settings(Hydrate::Off));
    // 8 MiB, 128 KiB at a time; 64 reads that would all wait.
    let mut asked = 0;
    for first in (0..2048).step_by(32) {
        let before = kernel.requests();
        kernel.read(first..first + 32);
        asked += u64::from(kernel.requests() > before);
        // A reader that is slower than the store: with each step but the first, only its marker is asked for.
        let due = (first + 32 + 64).min(2048);
        let until = Instant::now() + Duration::from_secs(10);
        while first >= 64 && kernel.stale_in(first + 32..due) > 1 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    assert!(asked < 20, "{asked} of 64 reads asked");
    let (offered, in_vain) = kernel.offered();
    assert!(offered > 1500, "{offered}");
    assert!(in_vain < 64, "{in_vain} in vain");
    // It goes no further than the largest step.
    assert!(kernel.stale_blocks() >= 4096 - 2048 - 1024 - 64);
    helper.terminate();
    kernel.check(&[]);
}

#[test]
fn the_trace_of_the_store_is_followed_by_all_machines() {
    let lab = lab();
    let store = lab.store.open().unwrap();
    // Far apart, each more than one offer may have.
    let order = [2000..2600, 40..41, 1000..1400, 3900..3902];
    put_trace(store.as_ref(), lab.id, &order).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let name = trace::file_name(&lab.id);
    let own = Places {
        trace: Some(AtomicFile::new(dir.path(), &name).unwrap()),
        ..places()
    };
    // What this machine recorded comes first.
    std::fs::write(dir.path().join(&name), trace::format(&lab.id, &[77..79])).unwrap();
    let kernel = lab.kernel();
    let one = Settings {
        hydrators: 1,
        ..settings(Hydrate::Full)
    };
    let helper = Running::start_in(&kernel, &lab.urls(), one, own);
    assert_eq!(helper.join(), End::Complete);
    kernel.check(&[]);
    let expected: Vec<u64> = [77..79].into_iter().chain(order).flatten().collect();
    // What was kept with it, the rest of its frames, comes after each.
    let offered: Vec<u64> = kernel.order().into_iter().flatten().collect();
    let of_trace = offered.iter().filter(|block| expected.contains(block));
    assert!(of_trace.eq(&expected));
    let others = offered
        .iter()
        .position(|b| !expected.iter().any(|e| e / 32 == b / 32));
    assert!(others.unwrap() >= expected.len());
}

#[test]
fn a_trace_of_garbage_harms_nothing() {
    let lab = lab();
    let path = lab.store.root().join(format!("traces/{}.trace", lab.id));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let endless: Vec<_> = (0..70_000).map(|n| n..u64::from(u32::MAX)).collect();
    for garbage in [
        b"garbage".to_vec(),
        vec![0; 5 << 20],
        // It names what the device does not have, for ever.
        trace::format(&lab.id, &endless),
    ] {
        std::fs::write(&path, garbage).unwrap();
        let kernel = lab.kernel();
        Running::complete(&kernel, &lab.urls(), settings(Hydrate::Full), &[5..6]);
    }
}

#[test]
fn a_store_that_does_not_answer_about_the_trace_holds_nothing_up() {
    let lab = lab();
    lab.rules("traces/:hang");
    let kernel = lab.kernel();
    Running::complete(&kernel, &lab.urls(), settings(Hydrate::Full), &[5..6]);
}

#[test]
fn a_directory_is_a_store_too() {
    let lab = lab();
    let kernel = lab.kernel();
    let root = lab.store.root().display().to_string();
    Running::complete(&kernel, &[root], settings(Hydrate::Full), &[0..256]);
}

/// What was read of the old generation's manifest is not taken for the new one's.
#[test]
fn stores_go_on_with_another_generation() {
    let lab = lab();
    let next = sample_image(2, 16);
    let next_id = lab.store.add(&next, "next").unwrap();
    let http = HttpOptions::default();
    let mut sources = vec![Source::new(&lab.server.url(), http, None).unwrap()];
    let mut places = places();
    for (id, image) in [(lab.id, &lab.image), (next_id, &next), (lab.id, &lab.image)] {
        let kernel = Kernel::new(id, image, 0, 12);
        let channel = kernel.attach();
        let recorder = Arc::new(Recorder::new(Duration::ZERO));
        let (stop, settings) = (Arc::new(Stop::default()), settings(Hydrate::Full));
        let helper = Helper::new(&channel, sources, settings, places, stop, recorder).unwrap();
        assert_eq!(helper.run(), End::Complete);
        kernel.check(&[]);
        (sources, places) = helper.into_parts();
    }
}
