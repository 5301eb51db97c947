//! A `.safetensors` file, read front to back: header first, then one tensor after another.
//!
//! Not memory-mapped: a mapped file that somebody truncates kills the process, and these files come from users.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::adapter::files::{PICKLE, WEIGHTS, open_optional, pickle_error, shorten};
use crate::adapter::generation::GenerationHasher;
use crate::{Error, Result};

/// Longest header. An adapter of all linear layers of 128 decoder layers needs about 270 KiB. What a hostile one of
/// short numbers becomes in memory is about 60 times its length.
const MAX_HEADER: u64 = 2 << 20;
/// Longest tensor name, in bytes.
const MAX_NAME: usize = 512;
/// Bytes read at once; a multiple of every element's size.
const CHUNK: usize = 1 << 18;

/// An `adapter_model.safetensors` whose header has been checked against the file's length.
pub(super) struct TensorFile {
    file: File,
    /// Everything before the data: the length field and the JSON.
    head: Vec<u8>,
    metadata: Metadata,
    /// In the order of the data, which is without gaps.
    names: Vec<String>,
}

impl TensorFile {
    pub fn open(directory: &Path) -> Result<Self> {
        let Some((mut file, length)) = open_optional(directory, WEIGHTS)? else {
            if directory.join(PICKLE).exists() {
                return Err(pickle_error(PICKLE));
            }
            return Err(Error::unprocessable(format!("{WEIGHTS} is missing")));
        };
        let mut start = [0; 8];
        let read = read_full(&mut file, &mut start)?;
        if read < 8 {
            return Err(bad(format!(
                "the file has only {length} bytes; expected at least the 8 of the header's length"
            )));
        }
        let header = u64::from_le_bytes(start);
        if header > MAX_HEADER {
            let too_long = || bad(format!("the header claims {header} bytes; at most {MAX_HEADER} are accepted"));
            return Err(other_format(&start).unwrap_or_else(too_long));
        }
        if header > length - 8 {
            return Err(bad(format!("the header claims {header} bytes but only {} follow", length - 8)));
        }
        let mut head = vec![0; 8 + header as usize];
        head[..8].copy_from_slice(&start);
        if read_full(&mut file, &mut head[8..])? < header as usize {
            return Err(bad("the file ends inside the header"));
        }
        let metadata = parse_header(&head[8..])?;
        let expected = head.len() as u64 + metadata.data_len() as u64;
        if expected != length {
            return Err(bad(format!("the file has {length} bytes but its header describes {expected}")));
        }
        let names = metadata.offset_keys();
        if let Some(name) = names.iter().find(|name| name.len() > MAX_NAME || name.contains(char::is_control)) {
            let shown = shorten(&format!("{name:?}"), MAX_NAME);
            return Err(bad(format!("the tensor name {shown} is longer than {MAX_NAME} or has control characters")));
        }
        Ok(TensorFile { file, head, metadata, names })
    }

    /// Size of the file in bytes.
    pub fn len(&self) -> u64 {
        (self.head.len() + self.metadata.data_len()) as u64
    }

    /// How many numbers are in it.
    pub fn numbers(&self) -> usize {
        self.tensors().map(|(_, info)| info.shape.iter().product::<usize>()).sum()
    }

    /// In the order of the file.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.names.iter().filter_map(|name| Some((name.as_str(), self.metadata.info(name)?)))
    }

    /// Hands every tensor's numbers to `each`, in the order of the file, and the bytes they were made of to `hasher`.
    /// Fails at the first number that is not finite.
    pub fn read(mut self, hasher: &mut GenerationHasher, mut each: impl FnMut(&str, Vec<f32>)) -> Result<()> {
        self.hash_head(hasher);
        let mut chunk = vec![0; CHUNK];
        for name in &self.names {
            let Some(info) = self.metadata.info(name) else { continue };
            let mut left = info.data_offsets.1 - info.data_offsets.0;
            let decode = decoder(name, info.dtype)?;
            let mut values = Vec::with_capacity(info.shape.iter().product());
            while left > 0 {
                let part = &mut chunk[..left.min(CHUNK)];
                read_data(&mut self.file, part)?;
                hasher.update(part);
                let from = values.len();
                decode(part, &mut values);
                if let Some(at) = values[from..].iter().position(|v| !v.is_finite()) {
                    return Err(Error::unprocessable(format!(
                        "tensor {name}: the value at {:?} is {}; expected finite numbers",
                        coordinates(from + at, &info.shape),
                        values[from + at]
                    )));
                }
                left -= part.len();
            }
            each(name, values);
        }
        Ok(())
    }

    /// Hands the file's bytes to `hasher`, whatever the numbers are.
    pub fn hash(mut self, hasher: &mut GenerationHasher) -> Result<()> {
        self.hash_head(hasher);
        let mut chunk = vec![0; CHUNK];
        let mut left = self.metadata.data_len();
        while left > 0 {
            let part = &mut chunk[..left.min(CHUNK)];
            read_data(&mut self.file, part)?;
            hasher.update(part);
            left -= part.len();
        }
        Ok(())
    }

    fn hash_head(&self, hasher: &mut GenerationHasher) {
        hasher.file(WEIGHTS, self.len());
        hasher.update(&self.head);
    }
}

/// Refuses dtypes that are not read, by name.
pub(super) fn check_dtype(name: &str, dtype: Dtype) -> Result<()> {
    decoder(name, dtype).map(|_| ())
}

type Decode = fn(&[u8], &mut Vec<f32>);

fn decoder(name: &str, dtype: Dtype) -> Result<Decode> {
    Ok(match dtype {
        Dtype::F32 => |bytes, out| out.extend(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b))),
        Dtype::F16 => |bytes, out| out.extend(bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32())),
        Dtype::BF16 => |bytes, out| out.extend(bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32())),
        other => return Err(Error::unprocessable(format!("tensor {name} is {other}; supported: F32, F16, BF16"))),
    })
}

/// `index` of a row-major array as one index a dimension.
fn coordinates(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut at: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&size| {
            let here = index % size.max(1);
            index /= size.max(1);
            here
        })
        .collect();
    at.reverse();
    at
}

fn parse_header(json: &[u8]) -> Result<Metadata> {
    // The crate checks that every tensor's length follows from its shape and that the tensors lie without gap or
    // overlap. It wants the data behind the header only for the total length, which is compared by the caller.
    let text = std::str::from_utf8(json)
        .map_err(|e| bad(format!("the header is not UTF-8 at byte {}", e.valid_up_to() + 8)))?;
    serde_json::from_str(text).map_err(|e| bad(format!("the header is not valid: {e}")))
}

/// Names the format of a file that does not begin like safetensors.
fn other_format(start: &[u8; 8]) -> Option<Error> {
    // torch.save writes a zip archive; before, and with other tools, it was a bare pickle of protocol 2 and up.
    if start.starts_with(b"PK\x03\x04") || (start[0] == 0x80 && (2..=5).contains(&start[1])) {
        return Some(pickle_error(WEIGHTS));
    }
    let what = match start {
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file",
        b"version " => "a Git LFS pointer, not the file it points to",
        [b'<', ..] => "HTML",
        _ => return None,
    };
    Some(Error::unprocessable(format!("{WEIGHTS} is {what}; expected safetensors")))
}

/// Fills the buffer with data that the header promised.
fn read_data(file: &mut File, buffer: &mut [u8]) -> Result<()> {
    if read_full(file, buffer)? < buffer.len() {
        return Err(bad("the file ends inside the data"));
    }
    Ok(())
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &mut File, buffer: &mut [u8]) -> Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read(&mut buffer[read..]) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::internal(format!("{WEIGHTS} could not be read: {e}"))),
        }
    }
    Ok(read)
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::unprocessable(shorten(&format!("{WEIGHTS} is not a valid safetensors file: {what}"), 1000))
}
