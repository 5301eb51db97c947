//! The files that make up an adapter, and how they are opened.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::base::labels::{LABELS_JSON, LABELS_TEXT};
use crate::{Error, Result};

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

/// Which shard holds which tensor, where the weights are in several files.
pub(super) const INDEX: &str = "adapter_model.safetensors.index.json";
/// The texts' side: an adapter's own tokens and turns.
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// What a GGUF file is called here, whatever it was called.
pub(super) const GGUF: &str = "adapter_model.gguf";

/// Every file that has a say in what an adapter computes, sorted by name; beside them, shards of the weights, or one GGUF
/// file in place of configuration and weights.
pub(super) const FILES: [&str; 8] =
    [CONFIG, WEIGHTS, INDEX, CHAT_TEMPLATE, LABELS_JSON, LABELS_TEXT, TOKENIZER, TOKENIZER_CONFIG];

/// The name under which a file of an adapter is kept; `None` for what is no such file.
pub fn kept_name(name: &str) -> Option<&str> {
    match FILES.contains(&name) || is_shard(name) {
        true => Some(name),
        // What macOS puts beside a file, under its name with `._` in front, is none.
        false => (name.ends_with(".gguf") && !name.starts_with("._")).then_some(GGUF),
    }
}

/// `adapter_model-00001-of-00002.safetensors`.
pub(super) fn is_shard(name: &str) -> bool {
    let numbers = name.strip_prefix("adapter_model-").and_then(|n| n.strip_suffix(".safetensors")?.split_once("-of-"));
    let number = |n: &str| n.len() == 5 && n.bytes().all(|c| c.is_ascii_digit());
    numbers.is_some_and(|(this, of)| number(this) && number(of))
}

/// The files of the adapter in `directory`, by the names they are kept under; none where it is no directory. One file of
/// weights goes before shards, and a configuration before a GGUF file.
pub fn adapter_files(directory: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let failed = |e: std::io::Error| Error::internal(format!("{} could not be listed: {e}", directory.display()));
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        // Nor is what no directory can be called, as clients may name it.
        Err(e)
            if matches!(
                e.kind(),
                ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::InvalidInput | ErrorKind::InvalidFilename
            ) =>
        {
            return Ok(BTreeMap::new());
        }
        Err(e) => return Err(failed(e)),
    };
    let mut names = vec![];
    for entry in entries {
        names.extend(entry.map_err(failed)?.file_name().into_string());
    }
    Ok(choose(names)?.into_iter().map(|(kept, name)| (kept, directory.join(name))).collect())
}

/// Which of the files in a folder are the adapter's: their names there, by the names they are kept under.
pub(super) fn choose(names: impl IntoIterator<Item = String>) -> Result<BTreeMap<String, String>> {
    let (mut files, mut ggufs) = (BTreeMap::new(), vec![]);
    for name in names {
        match kept_name(&name) {
            Some(GGUF) => ggufs.push(name),
            Some(kept) => drop(files.insert(kept.to_string(), name.clone())),
            None => {}
        }
    }
    if files.contains_key(WEIGHTS) {
        files.retain(|name, _| !is_shard(name) && name != INDEX);
    }
    if !files.contains_key(CONFIG) {
        ggufs.sort();
        match ggufs.as_slice() {
            [] => {}
            [one] => {
                files.retain(|name, _| !is_weights(name));
                files.insert(GGUF.to_string(), one.clone());
            }
            [one, two, ..] => {
                return Err(Error::unprocessable(format!("there are two GGUF files, {one} and {two}; expected one")));
            }
        }
    }
    Ok(files)
}

/// Whether a file of this name holds numbers, or says where they are.
pub(super) fn is_weights(name: &str) -> bool {
    [WEIGHTS, INDEX, GGUF].contains(&name) || is_shard(name)
}

/// Whether a folder looks like an adapter's.
pub fn is_adapter(directory: &Path) -> bool {
    let listed = adapter_files(directory);
    listed.map_or(true, |files| files.contains_key(CONFIG) || files.contains_key(GGUF))
}

/// PEFT's older format, which runs code on loading.
pub(super) const PICKLE: &str = "adapter_model.bin";

/// Largest JSON or text file that is read into memory. Tokenizers of 256 thousand tokens have 35 MB; some keep the texts of
/// all added tokens in the settings beside them too.
fn max_text(name: &str) -> u64 {
    match name {
        TOKENIZER => 64 << 20,
        TOKENIZER_CONFIG => 16 << 20,
        _ => 1 << 20,
    }
}

/// How often files that change while they are read are read again, and how long the first wait is; each next one is
/// twice as long.
const RETRIES: u32 = 4;
const FIRST_WAIT: Duration = Duration::from_millis(50);

pub(super) fn pickle_error(found: &str) -> Error {
    Error::unprocessable(format!(
        "{found} is a Python pickle, which is refused because loading one runs code; save the adapter as {WEIGHTS} \
         (save_pretrained with safe_serialization=True)"
    ))
}

/// Opens a regular file of the directory and tells its length; `None` if there is none of that name.
pub(super) fn open_optional(directory: &Path, name: &str) -> Result<Option<(File, u64)>> {
    open_at(&directory.join(name), name)
}

/// The same at a path; `name` is for messages.
pub(super) fn open_at(path: &Path, name: &str) -> Result<Option<(File, u64)>> {
    let failed = |e: std::io::Error| Error::internal(format!("{name} could not be opened: {e}"));
    // Asked before opening: opening a named pipe would wait for a writer.
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() => {}
        Ok(_) => return Err(Error::unprocessable(format!("{name} is not a regular file"))),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    }
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let length = file.metadata().map_err(failed)?.len();
    Ok(Some((file, length)))
}

/// Runs `read` until the files of `directory` are the same before and after it, so that what it returns is not a mix
/// of two adapters.
pub(super) fn steady<T>(directory: &Path, mut read: impl FnMut() -> Result<T>) -> Result<T> {
    for retry in 0..=RETRIES {
        if retry > 0 {
            std::thread::sleep(FIRST_WAIT * 2u32.pow(retry - 1));
        }
        let before = state_of(directory);
        let result = read();
        if state_of(directory) == before {
            return result;
        }
    }
    Err(Error::unavailable(format!(
        "the files in {} change while they are read; try again when they are complete",
        directory.display()
    )))
}

/// What changes with every replacement of and write to the adapter's files: inode, length and times.
fn state_of(directory: &Path) -> Vec<(PathBuf, Option<[i64; 6]>)> {
    let state = |path: &Path| {
        let meta = std::fs::metadata(path).ok()?;
        let (inode, length) = (meta.ino() as i64, meta.len() as i64);
        Some([inode, length, meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()])
    };
    adapter_files(directory).unwrap_or_default().into_values().map(|path| (path.clone(), state(&path))).collect()
}

/// Reads a small file whole; `None` if there is none of that name.
pub(super) fn read_optional(directory: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let Some((file, length)) = open_optional(directory, name)? else { return Ok(None) };
    let (mut bytes, most) = (Vec::new(), max_text(name));
    // One byte more than allowed, so that a file that grows meanwhile is noticed too.
    file.take(most + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::internal(format!("{name} could not be read: {e}")))?;
    if bytes.len() as u64 > most {
        return Err(Error::unprocessable(format!(
            "{name} has {} bytes; at most {most} are read",
            length.max(bytes.len() as u64)
        )));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn files_that_change_while_they_are_read_are_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let weights = folder.path().join(WEIGHTS);
        let mut reads = 0;
        let read = steady(folder.path(), || {
            reads += 1;
            if reads <= 2 {
                // The same length, as when a training run saves again.
                std::fs::write(&weights, vec![reads as u8]).unwrap();
            }
            Ok(reads)
        });
        assert_eq!(read.unwrap(), 3);
        let error = steady(folder.path(), || -> Result<()> {
            reads += 1;
            std::fs::write(&weights, vec![0; reads as usize]).unwrap();
            Err(Error::unprocessable("half of a file"))
        });
        let error = error.unwrap_err();
        assert!(error.kind == ErrorKind::Unavailable && error.message.contains("change while"), "{error}");
        let error = steady(folder.path(), || -> Result<()> { Err(Error::unprocessable("broken")) }).unwrap_err();
        assert_eq!(error.message, "broken");
    }
}
