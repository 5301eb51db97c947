//! Examples to learn from, and those held out for all methods, sizes and seeds.

use std::fs;
use std::path::{Path, PathBuf};

use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Source;
use crate::train::random;
use crate::train::table::{self, Record};
use crate::{Error, Result};

/// Of a task without a test file at most this share is held out.
const SHARE: usize = 5;

#[derive(Debug)]
pub struct Task {
    pub name: String,
    /// What the trainer reads.
    pub train: PathBuf,
    pub held_out: PathBuf,
    pub data: Data,
}

/// What a task is made of, to know it by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data {
    pub examples: usize,
    pub held_out: usize,
    pub train_sha256: String,
    pub held_out_sha256: String,
}

impl Task {
    /// Chooses `held_out` examples, the same ones every time, and writes to `folder` what the trainer is to read.
    pub fn prepare(source: &Source, held_out: usize, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let context = |e: Error| e.context(format!("task {}", source.name));
        let mut train = table::read(std::slice::from_ref(&source.train)).map_err(context)?;
        let mut tested = match &source.test {
            Some(test) => table::read(std::slice::from_ref(test)).map_err(context)?,
            None => {
                train.shuffle(&mut random(0, "held out", 0));
                train.split_off(train.len() - held_out.min(train.len() / SHARE))
            }
        };
        if tested.len() > held_out {
            tested.shuffle(&mut random(0, "held out", 1));
            tested.truncate(held_out);
        }
        if train.is_empty() || tested.is_empty() {
            return Err(context(Error::bad_request("there are too few examples to hold some out")));
        }
        let train_file = match &source.test {
            Some(_) => source.train.clone(),
            None => write(&folder.join(format!("{}.train.jsonl", source.name)), &train)?,
        };
        let held_out_file = write(&folder.join(format!("{}.held-out.jsonl", source.name)), &tested)?;
        let data = Data {
            examples: train.len(),
            held_out: tested.len(),
            train_sha256: hash(&train),
            held_out_sha256: hash(&tested),
        };
        Ok(Task { name: source.name.clone(), train: train_file, held_out: held_out_file, data })
    }
}

fn lines(records: &[Record]) -> impl Iterator<Item = String> {
    records.iter().map(|record| format!("{}\n", serde_json::Value::Object(record.fields.clone())))
}

fn write(path: &Path, records: &[Record]) -> Result<PathBuf> {
    let text: String = lines(records).collect();
    fs::write(path, text).map_err(|e| Error::bad_request(format!("{}: {e}", path.display())))?;
    Ok(path.to_path_buf())
}

fn hash(records: &[Record]) -> String {
    sha256(lines(records).collect::<String>().as_bytes())
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(folder: &Path, rows: usize, test: Option<usize>) -> Source {
        let file = |name: &str, rows: usize| {
            let text: String = (0..rows).map(|i| format!("{name} {i},{}\n", i % 2)).collect();
            fs::write(folder.join(name), format!("text,label\n{text}")).unwrap();
            folder.join(name)
        };
        Source { name: "t".into(), train: file("train.csv", rows), test: test.map(|rows| file("test.csv", rows)) }
    }

    fn texts(path: &Path) -> Vec<String> {
        let records = table::read(&[path.to_path_buf()]).unwrap();
        records.iter().map(|r| r.text("text").unwrap()).collect()
    }

    #[test]
    fn what_is_held_out_is_not_learned_from() {
        let folder = tempfile::tempdir().unwrap();
        let task = Task::prepare(&source(folder.path(), 40, None), 500, folder.path()).unwrap();
        let mut all = [texts(&task.train), texts(&task.held_out)].concat();
        assert_eq!((task.data.examples, task.data.held_out, all.len()), (32, 8, 40));
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 40);
        let again = Task::prepare(&source(folder.path(), 40, None), 500, folder.path()).unwrap();
        assert_eq!(again.data, task.data);
    }

    #[test]
    fn a_test_file_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path(), 10, Some(30));
        let task = Task::prepare(&source, 7, folder.path()).unwrap();
        assert_eq!((&task.train, task.data.examples, task.data.held_out), (&source.train, 10, 7));
        let held_out = texts(&task.held_out);
        assert!(held_out.len() == 7 && held_out.iter().all(|text| text.starts_with("test.csv")));
        let whole = Task::prepare(&source, 30, folder.path()).unwrap();
        assert_ne!(whole.data.held_out_sha256, task.data.held_out_sha256);
        assert_eq!(whole.data.train_sha256, task.data.train_sha256);
    }

    #[test]
    fn too_few_examples_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = Task::prepare(&source(folder.path(), 3, None), 5, folder.path()).unwrap_err();
        assert!(error.message.contains("task t") && error.message.contains("too few"), "{error}");
    }
}
