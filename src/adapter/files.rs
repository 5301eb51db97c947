//! The files that make up an adapter, and how they are opened.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::adapter::labels::{LABELS_JSON, LABELS_TEXT};
use crate::{Error, Result};

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

/// Every file that has a say in what an adapter computes, sorted by name.
pub(super) const FILES: [&str; 4] = [CONFIG, WEIGHTS, LABELS_JSON, LABELS_TEXT];

/// PEFT's older format, which runs code on loading.
pub(super) const PICKLE: &str = "adapter_model.bin";

/// Largest JSON or text file that is read into memory.
const MAX_TEXT: u64 = 4 << 20;

pub(super) fn pickle_error(found: &str) -> Error {
    Error::unprocessable(format!(
        "{found} is a Python pickle, which is refused because loading one runs code; save the adapter as {WEIGHTS} \
         (save_pretrained with safe_serialization=True)"
    ))
}

/// Opens a regular file of the directory and tells its length; `None` if there is none of that name.
pub(super) fn open_optional(directory: &Path, name: &str) -> Result<Option<(File, u64)>> {
    let path = directory.join(name);
    let failed = |e: std::io::Error| Error::internal(format!("{name} could not be opened: {e}"));
    // Asked before opening: opening a named pipe would wait for a writer.
    match std::fs::metadata(&path) {
        Ok(meta) if meta.is_file() => {}
        Ok(_) => return Err(Error::unprocessable(format!("{name} is not a regular file"))),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    }
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let length = file.metadata().map_err(failed)?.len();
    Ok(Some((file, length)))
}

/// Reads a small file whole; `None` if there is none of that name.
pub(super) fn read_optional(directory: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let Some((file, length)) = open_optional(directory, name)? else { return Ok(None) };
    let mut bytes = Vec::new();
    // One byte more than allowed, so that a file that grows meanwhile is noticed too.
    file.take(MAX_TEXT + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::internal(format!("{name} could not be read: {e}")))?;
    if bytes.len() as u64 > MAX_TEXT {
        return Err(Error::unprocessable(format!(
            "{name} has {} bytes; at most {MAX_TEXT} are read",
            length.max(bytes.len() as u64)
        )));
    }
    Ok(Some(bytes))
}

/// Keeps messages readable whatever a file holds: at most `length` characters.
pub(super) fn shorten(text: &str, length: usize) -> String {
    match text.char_indices().nth(length) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}
