//! An adapter's `.safetensors` files, read front to back: header first, then one tensor after another.
//!
//! Not memory-mapped: a mapped file that somebody truncates kills the process, and these files come from users.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use crate::adapter::files::{INDEX, PICKLE, WEIGHTS, adapter_files, is_shard, open_at, pickle_error, read_optional};
use crate::adapter::generation::GenerationHasher;
use crate::error::shorten;
use crate::{Error, Result};

/// What PEFT puts in front of every module's path.
pub(super) const PREFIX: &str = "base_model.model.";
/// Most shards; each is a file that is held open.
const MAX_SHARDS: usize = 64;
/// Longest header, of all shards together. An adapter of all linear layers of 128 decoder layers needs about 270 KiB. What a hostile one of
/// short numbers becomes in memory is about 60 times its length.
const MAX_HEADER: u64 = 2 << 20;
/// Longest tensor name, in bytes.
const MAX_NAME: usize = 512;
/// Bytes read at once; a multiple of every element's size.
const CHUNK: usize = 1 << 18;

/// What a file says of a tensor.
#[derive(Debug, Clone)]
pub(super) struct TensorInfo {
    /// By PEFT's conventions, whatever the file calls it.
    pub name: String,
    pub shape: Vec<usize>,
    /// For people.
    pub dtype: String,
}

/// `adapter_model.safetensors`, or the shards that the index beside them names.
pub(super) struct TensorFiles(Vec<TensorFile>);

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl TensorFiles {
    pub fn open(directory: &Path) -> Result<Self> {
        let files = adapter_files(directory)?;
        if let Some(path) = files.get(WEIGHTS) {
            return Ok(TensorFiles(vec![TensorFile::open(path, WEIGHTS, &mut MAX_HEADER.clone())?]));
        }
        let shards: Vec<(&String, &PathBuf)> = files.iter().filter(|(name, _)| is_shard(name)).collect();
        let Some(index) = read_optional(directory, INDEX)? else {
            return Err(match shards.first() {
                Some((shard, _)) => Error::unprocessable(format!("{INDEX} is missing, but its shard {shard} is there")),
                None if directory.join(PICKLE).exists() => pickle_error(PICKLE),
                None => Error::unprocessable(format!("{WEIGHTS} is missing")),
            });
        };
        let wrong = |what: String| Error::unprocessable(shorten(&format!("{INDEX}: {what}"), 1000));
        let index: Index = serde_json::from_slice(&index).map_err(|e| wrong(e.to_string()))?;
        let named: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
        for name in &named {
            if !is_shard(name) {
                let expected = "expected adapter_model-00001-of-00002.safetensors and its like";
                return Err(wrong(format!("it names the shard {name:?}; {expected}")));
            }
            if !files.contains_key(*name) {
                return Err(wrong(format!("the shard {name}, which it names, is missing")));
            }
        }
        if let Some((other, _)) = shards.iter().find(|(name, _)| !named.contains(name.as_str())) {
            return Err(wrong(format!("the shard {other} is there, and it does not name it")));
        }
        if shards.len() > MAX_SHARDS {
            return Err(wrong(format!("there are {} shards; at most {MAX_SHARDS} are read", shards.len())));
        }
        let mut left = MAX_HEADER;
        let open = |(name, path): (&String, &PathBuf)| TensorFile::open(path, name, &mut left);
        let opened = TensorFiles(shards.into_iter().map(open).collect::<Result<_>>()?);
        let mut found: BTreeMap<&str, &str> = BTreeMap::new();
        for file in &opened.0 {
            for name in &file.names {
                if let Some(other) = found.insert(name, &file.name) {
                    return Err(wrong(format!("{other} and {} both hold the tensor {name}", file.name)));
                }
            }
        }
        let differs = |(name, shard): &(&String, &String)| found.get(name.as_str()) != Some(&shard.as_str());
        if let Some((name, shard)) = index.weight_map.iter().find(differs) {
            return Err(wrong(format!("{shard} does not hold the tensor {name}, which it should")));
        }
        Ok(opened)
    }

    /// Size of the files in bytes.
    pub fn len(&self) -> u64 {
        self.0.iter().map(TensorFile::len).sum()
    }

    /// In the order of the files.
    pub fn tensors(&self) -> Vec<TensorInfo> {
        self.0.iter().flat_map(TensorFile::tensors).collect()
    }

    /// Hands every tensor's numbers to `each`, in the order of the files, and the bytes they were made of to `hasher`.
    /// Fails at the first number that is not finite.
    pub fn read(self, hasher: &mut GenerationHasher, mut each: impl FnMut(&str, Vec<f32>)) -> Result<()> {
        self.0.into_iter().try_for_each(|file| file.read(hasher, &mut each))
    }

    /// Hands the files' bytes to `hasher`, whatever the numbers are.
    pub fn hash(self, hasher: &mut GenerationHasher) -> Result<()> {
        self.0.into_iter().try_for_each(|file| file.hash(hasher))
    }
}

/// A file whose header has been checked against its length.
struct TensorFile {
    name: String,
    file: File,
    /// Everything before the data: the length field and the JSON.
    head: Vec<u8>,
    metadata: Metadata,
    /// In the order of the data, which is without gaps.
    names: Vec<String>,
}

impl TensorFile {
    /// `left` is how long the header may be; what it takes is taken off.
    fn open(path: &Path, file_name: &str, left: &mut u64) -> Result<Self> {
        let bad = |what: String| malformed(file_name, what);
        let missing = || Error::unprocessable(format!("{file_name} is missing"));
        let (mut file, length) = open_at(path, file_name)?.ok_or_else(missing)?;
        let mut start = [0; 8];
        let read = read_full(&mut file, &mut start, file_name)?;
        if read < 8 {
            return Err(bad(format!(
                "the file has only {length} bytes; expected at least the 8 of the header's length"
            )));
        }
        let header = u64::from_le_bytes(start);
        if header > *left {
            let too_long = || {
                let files = "of all files of the weights together";
                bad(format!("the header claims {header} bytes; at most {MAX_HEADER} are accepted {files}"))
            };
            return Err(other_format(&start, file_name).unwrap_or_else(too_long));
        }
        *left -= header;
        if header > length - 8 {
            return Err(bad(format!("the header claims {header} bytes but only {} follow", length - 8)));
        }
        let mut head = vec![0; 8 + header as usize];
        head[..8].copy_from_slice(&start);
        if read_full(&mut file, &mut head[8..], file_name)? < header as usize {
            return Err(bad("the file ends inside the header".into()));
        }
        let metadata = parse_header(&head[8..]).map_err(bad)?;
        let expected = head.len() as u64 + metadata.data_len() as u64;
        if expected != length {
            return Err(bad(format!("the file has {length} bytes but its header describes {expected}")));
        }
        let names = metadata.offset_keys();
        if let Some(name) = names.iter().find(|name| name.len() > MAX_NAME || name.contains(char::is_control)) {
            let shown = shorten(&format!("{name:?}"), MAX_NAME);
            return Err(bad(format!("the tensor name {shown} is longer than {MAX_NAME} or has control characters")));
        }
        for name in &names {
            metadata.info(name).map_or(Ok(()), |info| decoder(name, info.dtype).map(|_| ()))?;
        }
        Ok(TensorFile { name: file_name.to_string(), file, head, metadata, names })
    }

    fn len(&self) -> u64 {
        (self.head.len() + self.metadata.data_len()) as u64
    }

    /// In the order of the file.
    fn tensors(&self) -> impl Iterator<Item = TensorInfo> {
        self.names.iter().filter_map(|name| {
            let info = self.metadata.info(name)?;
            Some(TensorInfo { name: name.clone(), shape: info.shape.clone(), dtype: info.dtype.to_string() })
        })
    }

    fn read(mut self, hasher: &mut GenerationHasher, each: &mut impl FnMut(&str, Vec<f32>)) -> Result<()> {
        self.hash_head(hasher);
        let mut chunk = vec![0; CHUNK];
        for name in &self.names {
            let Some(info) = self.metadata.info(name) else { continue };
            let mut left = info.data_offsets.1 - info.data_offsets.0;
            let decode = decoder(name, info.dtype)?;
            let mut values = Vec::with_capacity(info.shape.iter().product());
            while left > 0 {
                let part = &mut chunk[..left.min(CHUNK)];
                read_data(&mut self.file, part, &self.name)?;
                hasher.update(part);
                let from = values.len();
                decode(part, &mut values);
                check_finite(name, &values, from, &info.shape)?;
                left -= part.len();
            }
            each(name, values);
        }
        Ok(())
    }

    fn hash(mut self, hasher: &mut GenerationHasher) -> Result<()> {
        self.hash_head(hasher);
        let mut chunk = vec![0; CHUNK];
        let mut left = self.metadata.data_len();
        while left > 0 {
            let part = &mut chunk[..left.min(CHUNK)];
            read_data(&mut self.file, part, &self.name)?;
            hasher.update(part);
            left -= part.len();
        }
        Ok(())
    }

    fn hash_head(&self, hasher: &mut GenerationHasher) {
        hasher.file(&self.name, self.len());
        hasher.update(&self.head);
    }
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

/// Refuses numbers from index `from` on that are not finite.
pub(super) fn check_finite(name: &str, values: &[f32], from: usize, shape: &[usize]) -> Result<()> {
    match values[from..].iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::unprocessable(format!(
            "tensor {name}: the value at {:?} is {}; expected finite numbers",
            coordinates(from + at, shape),
            values[from + at]
        ))),
    }
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

fn parse_header(json: &[u8]) -> Result<Metadata, String> {
    // The crate checks that every tensor's length follows from its shape and that the tensors lie without gap or
    // overlap. It wants the data behind the header only for the total length, which is compared by the caller.
    let text =
        std::str::from_utf8(json).map_err(|e| format!("the header is not UTF-8 at byte {}", e.valid_up_to() + 8))?;
    serde_json::from_str(text).map_err(|e| format!("the header is not valid: {e}"))
}

/// Names the format of a file that does not begin like safetensors.
fn other_format(start: &[u8; 8], file_name: &str) -> Option<Error> {
    // torch.save writes a zip archive; before, and with other tools, it was a bare pickle of protocol 2 and up.
    if start.starts_with(b"PK\x03\x04") || (start[0] == 0x80 && (2..=5).contains(&start[1])) {
        return Some(pickle_error(file_name));
    }
    let what = match start {
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file, whose name must end in .gguf",
        b"version " => "a Git LFS pointer, not the file it points to",
        [b'<', ..] => "HTML",
        _ => return None,
    };
    Some(Error::unprocessable(format!("{file_name} is {what}; expected safetensors")))
}

/// Fills the buffer with data that the header promised.
fn read_data(file: &mut File, buffer: &mut [u8], file_name: &str) -> Result<()> {
    if read_full(file, buffer, file_name)? < buffer.len() {
        return Err(malformed(file_name, "the file ends inside the data"));
    }
    Ok(())
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &mut File, buffer: &mut [u8], file_name: &str) -> Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read(&mut buffer[read..]) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::internal(format!("{file_name} could not be read: {e}"))),
        }
    }
    Ok(read)
}

fn malformed(file_name: &str, what: impl std::fmt::Display) -> Error {
    Error::unprocessable(shorten(&format!("{file_name} is not a valid safetensors file: {what}"), 1000))
}
