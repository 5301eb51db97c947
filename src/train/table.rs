//! Files of examples as records with named fields: CSV, TSV, JSON lines, Parquet, or a folder for each class.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::parquet;
use crate::{Error, Result};

/// Longest text of one field, in bytes; what is longer is no example but a mistake in the quoting.
const MAX_FIELD: usize = 16 << 20;

/// One example, and where it stands.
#[derive(Debug, Clone)]
pub struct Record {
    /// For messages, e.g. `reviews.csv, row 12`.
    pub place: String,
    pub fields: Map<String, Value>,
}

impl Record {
    /// A field as text; numbers and truth values as they are written.
    pub fn text(&self, name: &str) -> Result<String> {
        match self.fields.get(name) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
            Some(Value::Null) | None => Err(self.wrong(format!("has no {name:?}"))),
            Some(_) => Err(self.wrong(format!("has a list or an object as {name:?}; expected a text"))),
        }
    }

    pub fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::bad_request(format!("{} {what}", self.place))
    }
}

/// The records of all files, in their order. All have the columns of the first one's.
pub fn read(files: &[PathBuf]) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for file in files {
        let before = records.len();
        read_one(file, &mut records)?;
        if records.len() == before {
            return Err(Error::bad_request(format!("{} holds no examples", file.display())));
        }
    }
    Ok(records)
}

fn read_one(file: &Path, records: &mut Vec<Record>) -> Result<()> {
    if file.is_dir() {
        return folders(file, records);
    }
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let ending = file.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    match ending.as_str() {
        "csv" => separated(&name, &text(file)?, b',', records),
        "tsv" | "tab" => separated(&name, &text(file)?, b'\t', records),
        "jsonl" | "ndjson" => lines(&name, &text(file)?, records),
        "parquet" => parquet::read(file, &name, records),
        "txt" => {
            let fields = Map::from_iter([("text".to_string(), Value::String(text(file)?))]);
            records.push(Record { place: name, fields });
            Ok(())
        }
        _ => Err(Error::bad_request(format!(
            "{name}: expected .csv, .tsv, .tab, .jsonl, .ndjson, .parquet or .txt, or a folder with a folder of .txt files for each class"
        ))),
    }
}

fn text(file: &Path) -> Result<String> {
    let bytes = fs::read(file).map_err(|e| Error::bad_request(format!("{}: {e}", file.display())))?;
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        let what = "is UTF-16, not UTF-8; convert the file first, e.g. iconv -f utf-16 -t utf-8";
        return Err(Error::bad_request(format!("{} {what}", file.display())));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = 1 + e.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count();
        Error::bad_request(format!(
            "{}, line {line}: byte {at} is not UTF-8; convert the file first, e.g. iconv -f latin1 -t utf-8",
            file.display()
        ))
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

/// The line on which a field begins with a quotation mark that nothing closes: the reader would take all that follows for one
/// field, and say nothing.
fn left_open(text: &str, separator: u8) -> Option<usize> {
    let (mut line, mut opened) = (1, 0);
    // Where a quotation mark begins a field, or, twice within one, is a character of it.
    let (mut begins, mut quoted, mut closed) = (true, false, false);
    for byte in text.bytes() {
        match byte {
            b'"' if quoted => (quoted, closed) = (false, true),
            b'"' if closed => (quoted, closed) = (true, false),
            b'"' if begins => (quoted, begins, opened) = (true, false, line),
            _ => (begins, closed) = (!quoted && (byte == separator || matches!(byte, b'\n' | b'\r')), false),
        }
        line += usize::from(byte == b'\n');
    }
    quoted.then_some(opened)
}

fn separated(name: &str, text: &str, separator: u8, records: &mut Vec<Record>) -> Result<()> {
    if let Some(line) = left_open(text, separator) {
        return Err(Error::bad_request(format!(
            "{name}, line {line}: a field begins with a quotation mark that nothing closes; close it, or where it is part of the \
             text write the field as \"\"\"text\""
        )));
    }
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(text.as_bytes());
    let wrong = |e: csv::Error| Error::bad_request(format!("{name}: {e}"));
    let header: Vec<String> = reader.headers().map_err(wrong)?.iter().map(|h| h.trim().to_string()).collect();
    for (i, row) in reader.records().enumerate() {
        let row = row.map_err(wrong)?;
        let place = format!("{name}, row {}", i + 1);
        if let Some(long) = row.iter().find(|f| f.len() > MAX_FIELD) {
            let what = format!("{place} has a field of {} bytes; is a quotation mark left open?", long.len());
            return Err(Error::bad_request(what));
        }
        let fields = header.iter().cloned().zip(row.iter().map(|f| Value::String(f.to_string()))).collect();
        records.push(Record { place, fields });
    }
    Ok(())
}

fn lines(name: &str, text: &str, records: &mut Vec<Record>) -> Result<()> {
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{name}, row {}", i + 1);
        match serde_json::from_str(line) {
            Ok(Value::Object(fields)) => records.push(Record { place, fields }),
            Ok(_) => return Err(Error::bad_request(format!("{place} is not an object"))),
            Err(e) => return Err(Error::bad_request(format!("{place} is not JSON: {e}"))),
        }
    }
    Ok(())
}

/// `<folder>/<class>/*.txt`, in the order of their names.
fn folders(folder: &Path, records: &mut Vec<Record>) -> Result<()> {
    let sorted = |folder: &Path| -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(folder)
            .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>());
        let mut paths = entries.map_err(|e| Error::bad_request(format!("{}: {e}", folder.display())))?;
        paths.sort();
        Ok(paths)
    };
    for class in sorted(folder)?.into_iter().filter(|p| p.is_dir()) {
        let label = class.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for file in sorted(&class)?.into_iter().filter(|p| p.extension().is_some_and(|e| e == "txt")) {
            let place = format!("{label}/{}", file.file_name().unwrap_or_default().to_string_lossy());
            let fields = [("text", text(&file)?), ("label", label.clone())];
            let fields = fields.map(|(name, value)| (name.to_string(), Value::String(value)));
            records.push(Record { place, fields: Map::from_iter(fields) });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        (folder, path)
    }

    fn texts(name: &str, content: &str) -> Vec<(String, String, String)> {
        let (_folder, path) = file(name, content.as_bytes());
        let records = read(&[path]).unwrap();
        records.iter().map(|r| (r.place.clone(), r.text("text").unwrap(), r.text("label").unwrap())).collect()
    }

    #[test]
    fn the_formats_give_the_same_records() {
        let row = |n: usize, name: &str, text: &str, label: &str| {
            (format!("{name}, row {n}"), text.to_string(), label.to_string())
        };
        let csv = texts("a.csv", "\u{feff}text,label\n\"one, two\n\"\"three\"\"\",1\nfour,0\n");
        assert_eq!(csv, [row(1, "a.csv", "one, two\n\"three\"", "1"), row(2, "a.csv", "four", "0")]);
        let tsv = texts("a.tsv", "label\ttext\n1\tone, two\n");
        assert_eq!(tsv, [row(1, "a.tsv", "one, two", "1")]);
        let jsonl = texts("a.jsonl", "{\"text\": \"one\", \"label\": 1}\n\n{\"text\": \"two\", \"label\": true}\n");
        assert_eq!(jsonl, [row(1, "a.jsonl", "one", "1"), row(3, "a.jsonl", "two", "true")]);
    }

    #[test]
    fn quotation_marks_are_closed_as_the_reader_closes_them() {
        for closed in ["", "a,b", "\"a\nb\",c", "\"a\"\"b\"", "a \"b,c", "\"\",\"\"\r\n\"x\"", "\"a\"b\"c,d"] {
            assert_eq!(left_open(closed, b','), None, "{closed}");
        }
        for (open, line) in [("\"", 1), ("a,\"b\n\"\"c", 1), ("a\n\"b\"\nc,\"", 3), ("\"\"\"", 1)] {
            assert_eq!(left_open(open, b','), Some(line), "{open}");
        }
    }

    #[test]
    fn a_folder_for_each_class() {
        let folder = tempfile::tempdir().unwrap();
        for (class, name) in [("sport", "2"), ("sport", "1"), ("art", "1")] {
            fs::create_dir_all(folder.path().join(class)).unwrap();
            fs::write(folder.path().join(class).join(format!("{name}.txt")), format!("{class} {name}")).unwrap();
        }
        let records = read(&[folder.path().to_path_buf()]).unwrap();
        let seen: Vec<_> = records.iter().map(|r| (r.text("text").unwrap(), r.text("label").unwrap())).collect();
        assert_eq!(
            seen,
            [("art 1", "art"), ("sport 1", "sport"), ("sport 2", "sport")].map(|(a, b)| (a.into(), b.into()))
        );
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        for (name, content, parts) in [
            ("a.csv", &b"text,label\ncaf\xe9,1\n"[..], &["line 2", "not UTF-8", "iconv"][..]),
            ("a.csv", b"text,label\none\n", &["a.csv", "2 fields"]),
            ("a.csv", b"text,label\n", &["no examples"]),
            ("a.csv", b"\xff\xfet\0e\0x\0t\0", &["UTF-16", "iconv"]),
            ("a.csv", b"label,text\n0,one\n1,\"two\n0,three\n", &["a.csv, line 3", "nothing closes"]),
            ("a.tsv", b"label\ttext\n0\t\"one\"\" two\n", &["a.tsv, line 2", "nothing closes"]),
            ("a.jsonl", b"{\"text\": 1}\n[1]\n", &["row 2", "not an object"]),
            ("a.jsonl", b"{\"text\": \n", &["row 1", "not JSON"]),
            ("a.xls", b"", &["expected .csv"]),
        ] {
            let (_folder, path) = file(name, content);
            let error = read(&[path]).unwrap_err();
            assert!(parts.iter().all(|p| error.message.contains(p)), "{error}");
        }
        assert!(read(&[PathBuf::from("/nowhere.csv")]).unwrap_err().message.contains("/nowhere.csv"));
    }
}
