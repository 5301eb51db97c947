//! What a benchmark has measured so far, on the disk: a run that was stopped goes on where it was.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result};

/// A folder of measurements that belong together, a file each.
pub struct Record {
    folder: PathBuf,
}

impl Record {
    /// Begins in `folder`, or goes on there.
    ///
    /// Errors: measurements with other settings are there.
    pub fn open(folder: &Path, settings: &Value) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let record = Record { folder: folder.into() };
        match record.find::<Value>("settings")? {
            None => record.put("settings", settings)?,
            Some(found) if found == *settings => {}
            Some(found) => {
                return Err(Error::bad_request(format!(
                    "{} holds measurements with other settings ({}); go on with these, or choose another --out",
                    folder.display(),
                    differences(&found, settings)
                )));
            }
        }
        Ok(record)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.json"))
    }

    /// A measurement, if it has been made.
    pub fn find<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        read(&self.path(name))
    }

    /// Keeps a measurement: whole, or not at all.
    pub fn put(&self, name: &str, value: &impl Serialize) -> Result<()> {
        write(&self.path(name), &serde_json::to_string(value).map_err(Error::internal)?)
    }
}

/// What a file of JSON holds; `None` where there is no file.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::bad_request(format!("{}: {e}", path.display()))),
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(found) => Ok(Some(found)),
            Err(e) => Err(Error::bad_request(format!("{}: {e}; delete it to measure again", path.display()))),
        },
    }
}

/// Writes a file whole or not at all.
pub fn write(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let named = |e: std::io::Error| Error::internal(format!("{}: {e}", path.display()));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(named)?;
    file.write_all(text.as_bytes()).map_err(named)?;
    // A temporary file is its owner's alone; a report is as others here are.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(named)?;
    }
    file.persist(path).map_err(|e| named(e.error))?;
    Ok(())
}

/// `key: there, here` of what differs.
fn differences(there: &Value, here: &Value) -> String {
    let keys = there.as_object().into_iter().chain(here.as_object()).flat_map(|map| map.keys());
    let mut keys: Vec<&String> = keys.filter(|key| there.get(*key) != here.get(*key)).collect();
    keys.sort();
    keys.dedup();
    let value = |of: &Value, key: &str| of.get(key).map_or("none".to_string(), Value::to_string);
    let each = keys.iter().map(|key| format!("{key}: {} there, {} asked for", value(there, key), value(here, key)));
    each.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn goes_on_with_the_same_settings_only() {
        let folder = tempfile::tempdir().unwrap();
        let settings = json!({ "tasks": [1, 2], "seed": 0 });
        let record = Record::open(folder.path(), &settings).unwrap();
        assert_eq!(record.find::<Value>("a").unwrap(), None);
        record.put("a", &json!({ "x": 1.5 })).unwrap();
        let again = Record::open(folder.path(), &settings).unwrap();
        assert_eq!(again.find::<Value>("a").unwrap(), Some(json!({ "x": 1.5 })));
        let error = Record::open(folder.path(), &json!({ "tasks": [1], "seed": 0 })).err().unwrap().message;
        assert!(error.contains("tasks: [1,2] there, [1] asked for") && !error.contains("seed"), "{error}");
        fs::write(folder.path().join("a.json"), "{\"x\": ").unwrap();
        assert!(again.find::<Value>("a").unwrap_err().message.contains("a.json"));
    }
}
