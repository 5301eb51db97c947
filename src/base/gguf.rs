//! The GGUF container: metadata and where each tensor lies. Every count and offset is checked against the file's size.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::quantized::GgmlDType;

use crate::{Error, Result};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Meta {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    List(Vec<Meta>),
}

impl Meta {
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Meta::Unsigned(n) => Some(*n),
            Meta::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Meta::Float(x) => Some(*x),
            Meta::Unsigned(n) => Some(*n as f64),
            Meta::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }
    pub fn as_bool(&self) -> Option<bool> {
        if let Meta::Bool(b) = self { Some(*b) } else { None }
    }
    pub fn as_str(&self) -> Option<&str> {
        if let Meta::Text(s) = self { Some(s) } else { None }
    }
    pub fn as_list(&self) -> Option<&[Meta]> {
        if let Meta::List(l) = self { Some(l) } else { None }
    }
}

/// For messages. A list is shown by its length.
impl std::fmt::Display for Meta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Meta::Unsigned(n) => write!(f, "{n}"),
            Meta::Signed(n) => write!(f, "{n}"),
            Meta::Float(x) => write!(f, "{x}"),
            Meta::Bool(b) => write!(f, "{b}"),
            Meta::Text(s) => write!(f, "{s:?}"),
            Meta::List(l) => write!(f, "a list of {}", l.len()),
        }
    }
}

/// Kinds of tokens, as `tokenizer.ggml.token_type` counts them.
pub const NORMAL: u64 = 1;
pub const UNKNOWN: u64 = 2;
pub const CONTROL: u64 = 3;
pub const USER_DEFINED: u64 = 4;

#[derive(Debug, Clone)]
pub struct TensorPlace {
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    pub dtype: GgmlDType,
    /// Bytes of the file.
    pub bytes: Range<usize>,
}

#[derive(Debug, Default)]
pub struct Gguf {
    pub meta: HashMap<String, Meta>,
    pub tensors: HashMap<String, TensorPlace>,
}

fn wrong(what: impl std::fmt::Display) -> Error {
    Error::unprocessable(format!("GGUF: {what}"))
}

/// Most metadata values, elements of lists counted, and tensors of a model's file. A value in memory is larger than in the file, so the
/// file's size alone does not bound them; the largest vocabularies need a few million.
const MAX_VALUES: u64 = 1 << 24;

struct Reader<'a> {
    data: &'a [u8],
    at: usize,
    /// Values that may still be read, and how many could be at first.
    values: u64,
    most: u64,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let left = self.data.len() - self.at;
        if n > left as u64 {
            return Err(wrong(format!("{n} bytes were expected at offset {}, the file has {left} more", self.at)));
        }
        self.at += n as usize;
        Ok(&self.data[self.at - n as usize..self.at])
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.take(N as u64)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }
    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    fn count(&mut self, values: u64) -> Result<()> {
        let left = self.values.checked_sub(values);
        self.values = left
            .ok_or_else(|| wrong(format!("with {values} more, its values and tensors are more than {}", self.most)))?;
        Ok(())
    }
    fn text(&mut self) -> Result<String> {
        let n = self.u64()?;
        Ok(String::from_utf8_lossy(self.take(n)?).into_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Meta> {
        Ok(match kind {
            0 => Meta::Unsigned(self.array::<1>()?[0] as u64),
            1 => Meta::Signed(i8::from_le_bytes(self.array()?) as i64),
            2 => Meta::Unsigned(u16::from_le_bytes(self.array()?) as u64),
            3 => Meta::Signed(i16::from_le_bytes(self.array()?) as i64),
            4 => Meta::Unsigned(self.u32()? as u64),
            5 => Meta::Signed(i32::from_le_bytes(self.array()?) as i64),
            6 => Meta::Float(f32::from_le_bytes(self.array()?) as f64),
            7 => Meta::Bool(self.array::<1>()?[0] != 0),
            8 => Meta::Text(self.text()?),
            9 if depth < 4 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                // Every element takes at least a byte, so a count that lies is found before memory is asked for.
                if count > (self.data.len() - self.at) as u64 {
                    return Err(wrong(format!("a list of {count} values does not fit the rest of the file")));
                }
                self.count(count)?;
                Meta::List((0..count).map(|_| self.value(kind, depth + 1)).collect::<Result<_>>()?)
            }
            10 => Meta::Unsigned(self.u64()?),
            11 => Meta::Signed(i64::from_le_bytes(self.array()?)),
            12 => Meta::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(wrong(format!("metadata value of unknown type {other}, or lists too deep"))),
        })
    }
}

fn dtype(code: u32) -> Option<GgmlDType> {
    Some(match code {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

impl Gguf {
    /// Reads the header of a model's file, all of which is `data`.
    pub fn read(data: &[u8]) -> Result<Self> {
        Self::read_up_to(data, MAX_VALUES)
    }

    /// The same of a file with at most so many values and tensors.
    pub fn read_up_to(data: &[u8], most: u64) -> Result<Self> {
        let mut r = Reader { data, at: 0, values: most, most };
        if r.take(4).ok() != Some(b"GGUF") {
            return Err(wrong("the file does not start with \"GGUF\""));
        }
        let version = r.u32()?;
        if !(2..=3).contains(&version) {
            return Err(wrong(format!("version {version}; supported: 2 and 3, little-endian")));
        }
        let (tensors, entries) = (r.u64()?, r.u64()?);
        r.count(tensors)?;
        r.count(entries)?;
        let mut gguf = Gguf::default();
        for _ in 0..entries {
            let key = r.text()?;
            let kind = r.u32()?;
            let value = r.value(kind, 0).map_err(|e| e.context(&key))?;
            if gguf.meta.contains_key(&key) {
                return Err(wrong(format!("the metadata holds {key} twice")));
            }
            gguf.meta.insert(key, value);
        }
        let mut places = Vec::new();
        for _ in 0..tensors {
            let name = r.text()?;
            let dims = r.u32()?;
            if dims > 4 {
                return Err(wrong(format!("{name} has {dims} dimensions, at most 4 are possible")));
            }
            let mut shape: Vec<u64> = (0..dims).map(|_| r.u64()).collect::<Result<_>>()?;
            shape.reverse();
            let (code, offset) = (r.u32()?, r.u64()?);
            let dtype = dtype(code).ok_or_else(|| wrong(format!("{name} has the unsupported ggml type {code}")))?;
            if shape.contains(&0) {
                return Err(wrong(format!("{name} of shape {shape:?} is empty")));
            }
            places.push((name, shape, dtype, offset));
        }
        let alignment = gguf.meta.get("general.alignment").and_then(Meta::as_u64).unwrap_or(32).clamp(1, 1 << 20);
        let start = (r.at as u64).next_multiple_of(alignment);
        let mut taken = Vec::with_capacity(places.len());
        for (name, shape, dtype, offset) in places {
            let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
            let block = dtype.block_size() as u64;
            let whole = shape.last().is_none_or(|row| row % block == 0);
            let size = elements.filter(|_| whole).and_then(|n| (n / block).checked_mul(dtype.type_size() as u64));
            let from = start.checked_add(offset);
            let to = size.and_then(|size| from?.checked_add(size)).filter(|&to| to <= data.len() as u64);
            let (Some(from), Some(to)) = (from, to) else {
                return Err(wrong(format!(
                    "{name} of shape {shape:?} ({dtype:?}) at offset {offset} does not lie inside the file of {} bytes",
                    data.len()
                )));
            };
            let shape = shape.into_iter().map(|d| d as usize).collect();
            taken.push((from, to, name.clone()));
            let place = TensorPlace { shape, dtype, bytes: from as usize..to as usize };
            if gguf.tensors.insert(name.clone(), place).is_some() {
                return Err(wrong(format!("it holds the tensor {name} twice")));
            }
        }
        taken.sort();
        if let Some(pair) = taken.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            let [a, b] = [&pair[0], &pair[1]];
            return Err(wrong(format!(
                "the tensors {} (bytes {} to {}) and {} (bytes {} to {}) overlap",
                a.2, a.0, a.1, b.2, b.0, b.1
            )));
        }
        Ok(gguf)
    }

    pub fn get(&self, key: &str) -> Result<&Meta> {
        self.meta.get(key).ok_or_else(|| wrong(format!("the metadata lacks {key}")))
    }

    pub fn text(&self, key: &str) -> Result<&str> {
        self.get(key)?.as_str().ok_or_else(|| wrong(format!("{key} is not a text")))
    }

    pub fn number(&self, key: &str) -> Result<usize> {
        let value = self.get(key)?.as_u64().and_then(|v| usize::try_from(v).ok());
        value.ok_or_else(|| wrong(format!("{key} is not a whole number")))
    }

    /// As [`Self::number`], `None` where the metadata lacks `key`. A value that is there and no number is an error.
    pub fn optional_number(&self, key: &str) -> Result<Option<usize>> {
        self.meta.contains_key(key).then(|| self.number(key)).transpose()
    }

    /// A number with a fraction.
    pub fn real(&self, key: &str) -> Result<f64> {
        self.get(key)?.as_f64().ok_or_else(|| wrong(format!("{key} is not a number")))
    }

    /// As [`Self::real`], `None` where the metadata lacks `key`.
    pub fn optional_real(&self, key: &str) -> Result<Option<f64>> {
        self.meta.contains_key(key).then(|| self.real(key)).transpose()
    }

    /// The id of a token, e.g. under `tokenizer.ggml.bos_token_id`.
    pub fn token(&self, key: &str) -> Result<Option<u32>> {
        let id = self.optional_number(key)?;
        id.map(|id| u32::try_from(id).map_err(|_| wrong(format!("{key} is {id}, which is no token")))).transpose()
    }

    /// What a token of the vocabulary is for; a file that does not say has normal ones.
    pub fn token_kind(&self, id: usize) -> u64 {
        let kinds = self.meta.get("tokenizer.ggml.token_type").and_then(Meta::as_list);
        kinds.and_then(|kinds| kinds.get(id)?.as_u64()).unwrap_or(NORMAL)
    }

    /// A flag, `None` where the metadata lacks `key`.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(flag) = self.meta.get(key) else { return Ok(None) };
        flag.as_bool().map(Some).ok_or_else(|| wrong(format!("{key} is {flag}, expected true or false")))
    }

    /// The numbers of an f32 tensor, `None` where the file lacks it. `data` is the whole file.
    pub fn numbers(&self, data: &[u8], name: &str) -> Result<Option<Vec<f32>>> {
        let Some(place) = self.tensors.get(name) else { return Ok(None) };
        if place.dtype != GgmlDType::F32 {
            return Err(wrong(format!("{name} is stored as {:?}; expected F32", place.dtype)));
        }
        let numbers = data[place.bytes.clone()].as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
        Ok(Some(numbers.collect()))
    }

    /// The list of texts under `key`.
    pub fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let list = self.get(key)?.as_list().and_then(|l| l.iter().map(Meta::as_str).collect());
        list.ok_or_else(|| wrong(format!("{key} is not a list of texts")))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Writes a GGUF of text, number and list metadata and f32 tensors.
    pub fn write(meta: &[(&str, Meta)], tensors: &[(&str, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
        fn text(out: &mut Vec<u8>, s: &str) {
            out.extend((s.len() as u64).to_le_bytes());
            out.extend(s.as_bytes());
        }
        fn kind(m: &Meta) -> u32 {
            match m {
                Meta::Unsigned(_) => 10,
                Meta::Signed(_) => 11,
                Meta::Float(_) => 12,
                Meta::Bool(_) => 7,
                Meta::Text(_) => 8,
                Meta::List(_) => 9,
            }
        }
        fn value(out: &mut Vec<u8>, m: &Meta) {
            match m {
                Meta::Unsigned(n) => out.extend(n.to_le_bytes()),
                Meta::Signed(n) => out.extend(n.to_le_bytes()),
                Meta::Float(x) => out.extend(x.to_le_bytes()),
                Meta::Bool(b) => out.push(*b as u8),
                Meta::Text(s) => text(out, s),
                Meta::List(l) => {
                    out.extend(l.first().map_or(4, kind).to_le_bytes());
                    out.extend((l.len() as u64).to_le_bytes());
                    l.iter().for_each(|m| value(out, m));
                }
            }
        }
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend((meta.len() as u64).to_le_bytes());
        for (key, m) in meta {
            text(&mut out, key);
            out.extend(kind(m).to_le_bytes());
            value(&mut out, m);
        }
        let mut offset = 0u64;
        for (name, shape, data) in tensors {
            text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|&d| out.extend((d as u64).to_le_bytes()));
            out.extend(0u32.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (4 * data.len() as u64).next_multiple_of(32);
        }
        for (_, _, data) in tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            data.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
        out
    }

    #[test]
    fn reads_what_was_written() {
        let list = Meta::List(vec![Meta::Text("a".into()), Meta::Text("b".into())]);
        let file = write(&[("x", Meta::Unsigned(7)), ("l", list)], &[("t", vec![2, 3], vec![1.0; 6])]);
        let gguf = Gguf::read(&file).unwrap();
        assert_eq!(gguf.number("x").unwrap(), 7);
        assert_eq!(gguf.texts("l").unwrap(), ["a", "b"]);
        assert_eq!(gguf.tensors["t"].shape, [2, 3]);
        assert_eq!(file[gguf.tensors["t"].bytes.clone()].len(), 24);
        assert!(gguf.text("y").unwrap_err().message.contains('y'));
    }

    #[test]
    fn tensors_that_overlap_repeat_or_are_empty_are_refused() {
        let one = || vec![1.0; 8];
        let file = write(&[], &[("a", vec![8], one()), ("b", vec![8], one())]);
        // The offset of b is the last field before the data: 0 puts it on a.
        let at = file.len() - 64 - (file.len() - 64) % 32;
        let offset = (0..at).rev().find(|&i| file[i..i + 8] == 32u64.to_le_bytes()).unwrap();
        let mut lying = file.clone();
        lying[offset..offset + 8].fill(0);
        let error = Gguf::read(&lying).unwrap_err().message;
        assert!(error.contains("overlap") && error.contains("a (") && error.contains("b ("), "{error}");

        let twice = write(&[], &[("a", vec![8], one()), ("a", vec![8], one())]);
        assert!(Gguf::read(&twice).unwrap_err().message.contains("a twice"));
        let keys = write(&[("k", Meta::Bool(true)), ("k", Meta::Bool(false))], &[]);
        assert!(Gguf::read(&keys).unwrap_err().message.contains("k twice"));
        let empty = write(&[], &[("a", vec![8, 0], vec![])]);
        assert!(Gguf::read(&empty).unwrap_err().message.contains("a of shape [8, 0] is empty"));
    }

    #[test]
    fn metadata_cannot_take_much_more_memory_than_the_file() {
        let mut file = write(&[("k", Meta::List(vec![Meta::Bool(true)]))], &[]);
        let count = MAX_VALUES + 1;
        // The file ends with the list's count and its one element.
        let at = file.len() - 9;
        file[at..at + 8].copy_from_slice(&count.to_le_bytes());
        file.resize(file.len() + count as usize, 1);
        let error = Gguf::read(&file).unwrap_err().message;
        assert!(error.contains("more than 16777216"), "{error}");
        assert!(Gguf::read_up_to(&write(&[], &[("t", vec![2], vec![1.0; 2])]), 0).is_err());
    }

    #[test]
    fn lies_are_found() {
        let file = write(&[("k", Meta::Text("v".into()))], &[("t", vec![2, 3], vec![1.0; 6])]);
        for end in 0..file.len() {
            assert!(Gguf::read(&file[..end]).is_err(), "cut at {end}");
        }
        // Every byte of the header in turn made absurd: an error or not, never a panic or a huge allocation.
        for i in 0..file.len() - 24 {
            for byte in [0x7f, 0xff] {
                let mut file = file.clone();
                file[i] = byte;
                let _ = Gguf::read(&file);
            }
        }
    }
}
