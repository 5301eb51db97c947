//! Whether files have changed.

use std::path::Path;
use std::time::SystemTime;

/// What tells a file's content from another's without reading it: when it was written, and how long it is.
#[derive(Debug, PartialEq, Eq)]
pub struct Stamp(Vec<Option<(SystemTime, u64)>>);

impl Stamp {
    pub fn of<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Self {
        let stamp = |path: P| {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        Stamp(paths.into_iter().map(stamp).collect())
    }
}
