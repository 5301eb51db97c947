//! Parquet files as records: the JSON that the same rows have as JSON lines.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::Field;
use serde_json::{Value, json};

use super::table::Record;
use crate::{Error, Result};

/// Appends the rows of a Parquet file.
pub fn read(file: &Path, name: &str, records: &mut Vec<Record>) -> Result<()> {
    let opened = File::open(file).map_err(|e| Error::bad_request(format!("{}: {e}", file.display())))?;
    let before = records.len();
    // Where a file holds numbers that it should not, the library panics here and there.
    catch_unwind(AssertUnwindSafe(|| rows(opened, name, records))).unwrap_or_else(|_| {
        let row = records.len() - before + 1;
        Err(Error::bad_request(format!(
            "{name}, row {row} cannot be read: the file is damaged, or has a type not known here"
        )))
    })
}

fn rows(file: File, name: &str, records: &mut Vec<Record>) -> Result<()> {
    let wrong = |place: &str, e: ParquetError| match e.to_string() {
        e if e.contains("Disabled feature") => {
            Error::bad_request(format!("{place}: {e}; expected snappy, gzip, lz4, zstd or no compression"))
        }
        e => Error::bad_request(format!("{place} cannot be read; is the file whole? {e}")),
    };
    let reader = SerializedFileReader::new(file).map_err(|e| wrong(name, e))?;
    if reader.metadata().file_metadata().schema().get_fields().is_empty() {
        return Err(Error::bad_request(format!("{name} has no columns")));
    }
    for (i, row) in reader.into_iter().enumerate() {
        let place = format!("{name}, row {}", i + 1);
        let row = row.map_err(|e| wrong(&place, e))?;
        let fields = row.into_columns().into_iter().map(|(name, field)| (name, value(&field))).collect();
        records.push(Record { place, fields });
    }
    Ok(())
}

fn value(field: &Field) -> Value {
    match field {
        // Some writers do not mark texts as such. What is none, an image say, is an object, as which it is refused where
        // a text should be.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => json!({ "bytes": bytes.len() }),
        },
        field => without_nulls(field.to_json_value()),
    }
}

/// A struct here has every field in every row; JSON leaves out what is not there, and chat templates ask for that.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            fields.into_iter().filter(|(_, v)| !v.is_null()).map(|(name, v)| (name, without_nulls(v))).collect()
        }
        Value::Array(items) => items.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use ::parquet::basic::Compression;
    use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
    use ::parquet::schema::parser::parse_message_type;

    use super::super::table;
    use super::*;

    type Group<'a> = SerializedRowGroupWriter<'a, File>;

    /// Writes a file of one row group in a folder of its own.
    fn write(schema: &str, compression: Compression, columns: impl FnOnce(&mut Group)) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(File::create(&path).unwrap(), schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        columns(&mut group);
        group.close().unwrap();
        writer.close().unwrap();
        (folder, path)
    }

    /// Writes the next column: its values, and each row's definition and repetition level.
    fn texts(group: &mut Group, values: &[&[u8]], levels: Option<(&[i16], Option<&[i16]>)>) {
        let values: Vec<ByteArray> = values.iter().map(|&v| ByteArray::from(v.to_vec())).collect();
        let mut column = group.next_column().unwrap().unwrap();
        let (definitions, repetitions) = (levels.map(|l| l.0), levels.and_then(|l| l.1));
        column.typed::<ByteArrayType>().write_batch(&values, definitions, repetitions).unwrap();
        column.close().unwrap();
    }

    fn classified(compression: Compression) -> (tempfile::TempDir, PathBuf) {
        let schema = "message m { OPTIONAL BYTE_ARRAY text (UTF8); REQUIRED INT64 label; REQUIRED BYTE_ARRAY raw; }";
        write(schema, compression, |group| {
            texts(group, &["été".as_bytes(), b"two"], Some((&[1, 0, 1], None)));
            let mut labels = group.next_column().unwrap().unwrap();
            labels.typed::<Int64Type>().write_batch(&[1, 0, 1], None, None).unwrap();
            labels.close().unwrap();
            texts(group, &[b"plain", b"\xff\xfe", b""], None);
        })
    }

    fn all(path: &Path) -> Result<Vec<(String, Value)>> {
        let records = table::read(&[path.to_path_buf()])?;
        Ok(records.into_iter().map(|r| (r.place, Value::Object(r.fields))).collect())
    }

    #[test]
    fn columns_become_fields_however_they_are_packed() {
        let gzip = Compression::GZIP(Default::default());
        let zstd = Compression::ZSTD(Default::default());
        for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, gzip, zstd, Compression::LZ4_RAW] {
            let (_folder, path) = classified(compression);
            let want = [
                ("a.parquet, row 1".into(), json!({ "text": "été", "label": 1, "raw": "plain" })),
                ("a.parquet, row 2".into(), json!({ "text": null, "label": 0, "raw": { "bytes": 2 } })),
                ("a.parquet, row 3".into(), json!({ "text": "two", "label": 1, "raw": "" })),
            ];
            assert_eq!(all(&path).unwrap(), want, "{compression}");
        }
    }

    #[test]
    fn a_chat_is_what_json_lines_say() {
        // As pyarrow writes a list of structs. The second row's chat has one message, the third none.
        let schema = "message m { OPTIONAL GROUP messages (LIST) { REPEATED GROUP list { OPTIONAL GROUP element {
            OPTIONAL BYTE_ARRAY role (UTF8); OPTIONAL BYTE_ARRAY content (UTF8); OPTIONAL BYTE_ARRAY name (UTF8); } } } }";
        let (_folder, path) = write(schema, Compression::SNAPPY, |group| {
            let repetitions: &[i16] = &[0, 1, 0, 0];
            texts(group, &[b"user", b"assistant", b"user"], Some((&[4, 4, 4, 1], Some(repetitions))));
            texts(group, &[b"Hi", b"Hello", b"Bye"], Some((&[4, 4, 4, 1], Some(repetitions))));
            texts(group, &[b"Ann"], Some((&[4, 3, 3, 1], Some(repetitions))));
        });
        let rows: Vec<Value> = all(&path).unwrap().into_iter().map(|(_, fields)| fields["messages"].clone()).collect();
        let want = [
            json!([{ "role": "user", "content": "Hi", "name": "Ann" }, { "role": "assistant", "content": "Hello" }]),
            json!([{ "role": "user", "content": "Bye" }]),
            json!([]),
        ];
        assert_eq!(rows, want);
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        let (_folder, path) = classified(Compression::SNAPPY);
        let whole = std::fs::read(&path).unwrap();
        let error = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            all(&path).unwrap_err().message
        };
        for bytes in [&b""[..], b"text,label\n", &whole[..whole.len() - 1], &whole[1..]] {
            let error = error(bytes);
            assert!(error.contains("a.parquet") && error.contains("whole"), "{error}");
        }
        // The first page's header.
        let mut torn = whole.clone();
        torn[4..40].fill(0xff);
        let torn = error(&torn);
        assert!(torn.contains("a.parquet, row 1"), "{torn}");
        assert!(all(Path::new("/nowhere.parquet")).unwrap_err().message.contains("/nowhere.parquet"));
        // The library cannot show such a value, and says so by a panic.
        let schema = "message m { REQUIRED FIXED_LEN_BYTE_ARRAY (12) age (INTERVAL); }";
        let (_folder, path) = write(schema, Compression::UNCOMPRESSED, |group| {
            let mut ages = group.next_column().unwrap().unwrap();
            let values = [ByteArray::from(vec![0; 12]).into()];
            ages.typed::<::parquet::data_type::FixedLenByteArrayType>().write_batch(&values, None, None).unwrap();
            ages.close().unwrap();
        });
        let error = all(&path).unwrap_err().message;
        assert!(error.contains("a.parquet, row 1") && error.contains("type"), "{error}");
    }

    #[test]
    fn no_wrong_byte_is_more_than_an_error() {
        let (_folder, path) = classified(Compression::SNAPPY);
        let whole = std::fs::read(&path).unwrap();
        let mut refused = 0;
        for at in 0..whole.len() {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = byte;
                std::fs::write(&path, bytes).unwrap();
                refused += usize::from(all(&path).is_err());
            }
        }
        assert!(refused > whole.len() / 2, "only {refused} of {} were refused", 4 * whole.len());
    }
}
