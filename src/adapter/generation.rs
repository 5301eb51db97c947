//! The content hash that identifies an adapter.

use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::Result;
use crate::adapter::Generation;
use crate::adapter::files::{adapter_files, open_at};

/// SHA-256 over a framing of the files: for each file in the order of their names the length of its name, its name, the
/// length of its content (lengths as little-endian u64), its content. No two sets of files share a framing.
pub(super) struct GenerationHasher(Sha256);

impl GenerationHasher {
    /// Lets `each` add every file, in their order.
    pub fn over<T>(
        files: impl IntoIterator<Item = T>,
        mut each: impl FnMut(T, &mut Self) -> Result<()>,
    ) -> Result<Generation> {
        let mut hasher = GenerationHasher(Sha256::new());
        files.into_iter().try_for_each(|file| each(file, &mut hasher))?;
        Ok(hasher.finish())
    }

    /// Starts a file; exactly `length` bytes of [`Self::update`] must follow.
    pub fn file(&mut self, name: &str, length: u64) {
        self.0.update((name.len() as u64).to_le_bytes());
        self.0.update(name.as_bytes());
        self.0.update(length.to_le_bytes());
    }

    pub fn update(&mut self, content: &[u8]) {
        self.0.update(content);
    }

    fn finish(self) -> Generation {
        Generation::new(hex(&self.0.finalize()))
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The generation of the adapter files in `directory`, whether or not they are a valid adapter.
pub fn generation_of(directory: &Path) -> Result<Generation> {
    let mut buffer = vec![0; 1 << 18];
    GenerationHasher::over(adapter_files(directory)?, |(name, path), hasher| {
        let Some((mut file, length)) = open_at(&path, &name)? else { return Ok(()) };
        hasher.file(&name, length);
        loop {
            let read = file.read(&mut buffer).map_err(|e| crate::Error::from(e).context(&name))?;
            if read == 0 {
                return Ok(());
            }
            hasher.update(&buffer[..read]);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(files: &[(&str, &[u8])]) -> Generation {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        generation_of(dir.path()).unwrap()
    }

    #[test]
    fn it_depends_on_names_and_contents_of_the_files_that_matter() {
        let files: &[(&str, &[u8])] = &[("adapter_config.json", b"ab"), ("adapter_model.safetensors", b"c")];
        let generation = hash(files);
        assert_eq!(generation.as_str().len(), 64);
        assert_eq!(hash(&[files[1], files[0], ("README.md", b"x"), ("optimizer.pt", b"y")]), generation);
        assert_ne!(hash(&[("adapter_config.json", b"a"), ("adapter_model.safetensors", b"bc")]), generation);
        assert_ne!(hash(&[files[0], files[1], ("labels.txt", b"")]), generation);
        assert_ne!(hash(&[files[0], ("labels.json", b"c")]), hash(&[files[0], ("labels.txt", b"c")]));
    }
}
