// SPDX-License-Identifier: GPL-2.0

//! Error codes that the kernel crate of some supported kernel does not name (7.2 has the first 40 or so alone).

use kernel::bindings;
use kernel::ffi::c_int;
use kernel::prelude::*;

/// Codes besides those of `kernel::error::code`. Becomes an [`Error`] by `From`.
#[derive(Clone, Copy)]
pub enum Errno {
    /// There is no data of this kind.
    NoData = bindings::ENODATA as isize,
    /// The other side speaks another version.
    Proto = bindings::EPROTO as isize,
    /// Another has taken over.
    Shutdown = bindings::ESHUTDOWN as isize,
    /// There is no connection yet.
    NotConn = bindings::ENOTCONN as isize,
    /// The version or a feature is not known here.
    ProtoNoSupport = bindings::EPROTONOSUPPORT as isize,
    /// What was local is no longer valid.
    Stale = bindings::ESTALE as isize,
    /// The structure on disk is damaged.
    Unclean = bindings::EUCLEAN as isize,
    /// The device is another one.
    MediumType = bindings::EMEDIUMTYPE as isize,
}

impl From<Errno> for Error {
    fn from(code: Errno) -> Error {
        // CAST: Error codes are small.
        Error::from_errno(-(code as isize as c_int))
    }
}
