//! An adapter's files on their way in.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use tempfile::TempDir;

use crate::adapter::archive;
use crate::adapter::files::{FILES, PICKLE, WEIGHTS, open_optional, steady};
use crate::{Error, Result};

/// An adapter's files on their way in: a private folder in the store that is deleted if it is not published.
pub struct Upload {
    folder: TempDir,
    /// Most bytes of its files together.
    limit: u64,
}

impl Upload {
    pub(super) fn new(folder: TempDir, limit: u64) -> Self {
        Upload { folder, limit }
    }

    /// The folder to write `adapter_config.json`, `adapter_model.safetensors` and `labels.json`/`labels.txt` into.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Unpacks a `.tar`, `.tar.gz` or `.zip` (told apart by content) that was written to `file`, then deletes it.
    pub fn unpack(&self, file: &Path) -> Result<()> {
        let unpacked = archive::unpack(file, self.path(), self.limit);
        let deleted = fs::remove_file(file);
        unpacked?;
        deleted.map_err(|e| Error::internal(format!("the archive could not be deleted: {e}")))
    }

    /// Copies the adapter files of a local directory.
    pub(super) fn copy_from(&self, directory: &Path) -> Result<()> {
        steady(directory, || self.copy(directory))
    }

    fn copy(&self, directory: &Path) -> Result<()> {
        let mut left = self.limit;
        let mut found = false;
        for name in FILES {
            let failed = |e: std::io::Error| Error::internal(format!("{name} could not be copied: {e}"));
            let path = self.path().join(name);
            let Some((mut from, _)) = open_optional(directory, name)? else {
                // It may have been there, and so here, when the files changed while they were copied.
                if path.exists() {
                    fs::remove_file(path).map_err(failed)?;
                }
                continue;
            };
            found = true;
            let mut to = File::create(path).map_err(failed)?;
            let mut buffer = vec![0; 1 << 16];
            loop {
                let read = from.read(&mut buffer).map_err(failed)?;
                if read == 0 {
                    break;
                }
                left = left.checked_sub(read as u64).ok_or_else(|| self.too_large(name))?;
                to.write_all(&buffer[..read]).map_err(failed)?;
            }
        }
        if !found {
            return Err(Error::unprocessable(format!(
                "{} holds none of {FILES:?}{}",
                directory.display(),
                if directory.is_dir() { "" } else { " (it is not a directory)" }
            )));
        }
        // Only so that the reader can say that a pickle is there instead of the weights.
        if directory.join(PICKLE).exists() {
            File::create(self.path().join(PICKLE))
                .map_err(|e| Error::internal(format!("{PICKLE} could not be noted: {e}")))?;
        }
        Ok(())
    }

    /// Refuses files that are larger together than the limit.
    pub(super) fn check_size(&self) -> Result<()> {
        let mut left = self.limit;
        for name in FILES {
            if let Some((_, length)) = open_optional(self.path(), name)? {
                left = left.checked_sub(length).ok_or_else(|| self.too_large(name))?;
            }
        }
        Ok(())
    }

    /// Size of the weights; 0 if there are none.
    pub(super) fn weights(&self) -> u64 {
        fs::metadata(self.path().join(WEIGHTS)).map_or(0, |meta| meta.len())
    }

    fn too_large(&self, name: &str) -> Error {
        Error::too_large(format!("the adapter's files up to {name} are larger than {} bytes together", self.limit))
    }
}
