// SPDX-License-Identifier: GPL-2.0

//! What the property tests share.

use proptest::test_runner::Config;

/// `cases` of them, or as many as PROPTEST_CASES says.
pub fn cases(cases: u32) -> Config {
    let default = Config::default();
    Config {
        cases: if std::env::var_os("PROPTEST_CASES").is_some() {
            default.cases
        } else {
            cases
        },
        // A failure prints its smallest input, which is then written into a test.
        failure_persistence: None,
        ..default
    }
}
