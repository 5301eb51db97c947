//! An adapter's files on their way in.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::adapter::archive;
use crate::adapter::files::{FILES, GGUF, PICKLE, adapter_files, open_at, steady};
use crate::{Error, Result};

/// An adapter's files on their way in: a private folder in the store that is deleted if it is not published.
pub struct Upload {
    folder: TempDir,
    /// Most bytes of its files together.
    limit: u64,
}

impl Upload {
    /// Into `folder`, of at most `limit` bytes, also after unpacking.
    pub fn new(folder: TempDir, limit: u64) -> Self {
        Upload { folder, limit }
    }

    /// The folder to write the adapter's files into: `adapter_config.json`, `adapter_model.safetensors` or its shards,
    /// `labels.json` or `labels.txt`; or one `.gguf` file.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Unpacks a `.tar`, `.tar.gz` or `.zip` (told apart by content) that was written to `file`, then deletes it. A GGUF
    /// file is taken as it is.
    pub fn unpack(&self, file: &Path) -> Result<()> {
        let mut start = [0; 4];
        let is_gguf = File::open(file).and_then(|mut f| f.read_exact(&mut start)).is_ok() && &start == b"GGUF";
        if is_gguf {
            let failed = |e| Error::internal(format!("the upload could not be moved: {e}"));
            return fs::rename(file, self.path().join(GGUF)).map_err(failed);
        }
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
        let files = adapter_files(directory)?;
        // What was there, and so is here, when the files changed while they were copied.
        for (name, path) in adapter_files(self.path())?.into_iter().filter(|(name, _)| !files.contains_key(name)) {
            fs::remove_file(path).map_err(|e| Error::internal(format!("{name} could not be removed: {e}")))?;
        }
        for (name, path) in &files {
            let failed = |e: std::io::Error| Error::from(e).context(format!("{name} could not be copied"));
            let Some((mut from, _)) = open_at(path, name)? else { continue };
            let mut to = File::create(self.path().join(name)).map_err(failed)?;
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
        if files.is_empty() {
            return Err(Error::unprocessable(format!(
                "{} holds none of {FILES:?} and no .gguf file{}",
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
        for (name, path) in adapter_files(self.path())? {
            if let Some((_, length)) = open_at(&path, &name)? {
                left = left.checked_sub(length).ok_or_else(|| self.too_large(&name))?;
            }
        }
        Ok(())
    }

    /// Moves its folder into another one of the same file system, and tells where it is.
    pub(super) fn keep_in(self, folder: &Path) -> Result<PathBuf> {
        let from = self.folder.keep();
        let to = folder.join(from.file_name().unwrap_or_default());
        let failed = |e| Error::internal(format!("{} could not be moved: {e}", from.display()));
        fs::rename(&from, &to).map_err(failed)?;
        Ok(to)
    }

    /// Size of the files that matter.
    pub(super) fn size(&self) -> u64 {
        let files = adapter_files(self.path()).unwrap_or_default().into_values();
        files.filter_map(|path| Some(fs::metadata(path).ok()?.len())).sum()
    }

    fn too_large(&self, name: &str) -> Error {
        Error::too_large(format!("the adapter's files up to {name} are larger than {} bytes together", self.limit))
    }
}
