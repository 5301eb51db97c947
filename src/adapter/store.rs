//! Uploaded adapters on disk, safe against a crash at any instant.
//!
//! ```text
//! lock                     held while a process uses the store
//! objects/<generation>/    an adapter's files, never changed once there
//! names/<name>             {"generation": …, "created": …}: what a name stands for
//! incoming/                uploads and everything half-done; emptied when the store is opened
//! fetched/                 copies of sources' adapters, which the registry keeps by itself
//! ```
//!
//! A change becomes visible by renaming one file into `names/`; what it points to was made durable before. What no
//! name points to is garbage: removed when the last lease on it ends, or when the store is opened next.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::adapter::Generation;
use crate::adapter::files::adapter_files;
use crate::adapter::name::check_whole_name;
use crate::{Error, Result};

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub generation: Generation,
    /// Unix seconds.
    pub created: u64,
}

#[derive(Serialize, Deserialize)]
struct RecordFile {
    generation: String,
    created: u64,
}

pub(super) struct Store {
    root: PathBuf,
    state: Mutex<State>,
    /// Held while an object comes into place or goes, so that two uploads of one content do not collide. Taken before
    /// `state`, which is held for no longer than a look.
    placing: Mutex<()>,
    /// Keeps the lock; released by the system when the process ends, however it ends.
    _lock: File,
}

#[derive(Default)]
struct State {
    names: HashMap<String, Record>,
    /// How many leases there are on a generation.
    leases: HashMap<Generation, usize>,
    /// Generations that a name may stand for again after a power cut, since the disk has not confirmed the change. Kept
    /// until the store is opened next.
    unsettled: HashSet<Generation>,
}

/// Keeps a generation's files from being removed.
pub(super) struct Lease {
    store: Arc<Store>,
    generation: Generation,
}

impl Store {
    /// Opens or creates the store, removes what an interrupted process left, and tells what could not be read.
    pub fn open(root: &Path) -> Result<(Arc<Self>, HashMap<String, Error>)> {
        for directory in ["objects", "names", "incoming"] {
            fs::create_dir_all(root.join(directory)).map_err(|e| failed("create", &root.join(directory), e))?;
        }
        sync_directory(root)?;
        let lock = lock(&root.join("lock"))?;
        clear(&root.join("incoming"))?;
        let (names, damaged) = read_names(&root.join("names"))?;
        let state = Mutex::new(State { names, ..State::default() });
        let store = Arc::new(Store { root: root.to_path_buf(), state, placing: Mutex::new(()), _lock: lock });
        // A name that cannot be read may stand for any object.
        if damaged.is_empty() {
            store.collect_all()?;
        }
        Ok((store, damaged))
    }

    /// A new private folder, removed when dropped.
    pub fn incoming(&self) -> Result<TempDir> {
        let incoming = self.root.join("incoming");
        tempfile::Builder::new().prefix("upload-").tempdir_in(&incoming).map_err(|e| failed("create", &incoming, e))
    }

    /// Where the files of a generation lie.
    pub fn object(&self, generation: &Generation) -> PathBuf {
        self.root.join("objects").join(generation.as_str())
    }

    pub fn records(&self) -> HashMap<String, Record> {
        self.state().names.clone()
    }

    pub fn lease(self: &Arc<Self>, generation: &Generation) -> Lease {
        *self.state().leases.entry(generation.clone()).or_default() += 1;
        Lease { store: self.clone(), generation: generation.clone() }
    }

    /// Makes the adapter files of `upload` the object of `lease`'s generation, durably. The files are moved.
    pub fn add(&self, lease: &Lease, upload: &Path) -> Result<()> {
        let object = self.object(&lease.generation);
        let stage = self.incoming()?;
        for (name, from) in adapter_files(upload)? {
            let file = File::open(&from).map_err(|e| failed("open", &from, e))?;
            file.sync_all().map_err(|e| failed("write", &from, e))?;
            let to = stage.path().join(name);
            fs::rename(&from, &to).map_err(|e| failed("move", &from, e))?;
        }
        sync_directory(stage.path())?;
        let _placing = self.placing.lock().unwrap_or_else(|e| e.into_inner());
        // The lease keeps an object that is there from being removed after this look.
        if object.exists() {
            // Equal content, so each file may take the place of its twin; an object that was damaged is healed.
            let (new, old) = (adapter_files(stage.path())?, adapter_files(&object)?);
            for name in new.keys().chain(old.keys().filter(|name| !new.contains_key(*name))) {
                let (from, to) = (stage.path().join(name), object.join(name));
                let placed = if from.exists() { fs::rename(from, to) } else { fs::remove_file(to) };
                match placed {
                    Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed("write", &object, e)),
                    _ => {}
                }
            }
            sync_directory(&object)?;
        } else {
            fs::rename(stage.keep(), &object).map_err(|e| failed("create", &object, e))?;
        }
        sync_directory(&self.root.join("objects"))
    }

    /// Lets `name` stand for the generation of `lease`. Changes must not run at once; the caller sees to that.
    pub fn set_name(self: &Arc<Self>, name: &str, lease: &Lease, created: u64) -> Result<()> {
        let record = RecordFile { generation: lease.generation.to_string(), created };
        let content = serde_json::to_vec(&record).map_err(Error::internal)?;
        let path = self.root.join("names").join(name);
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(self.root.join("incoming"))?;
            file.write_all(&content)?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|e| e.error)
        };
        write().map_err(|e| failed("write", &path, e))?;
        let record = Record { generation: lease.generation.clone(), created };
        self.changed(name, Some(record), sync_directory(&self.root.join("names")));
        Ok(())
    }

    /// Lets `name` stand for nothing. Changes must not run at once; the caller sees to that.
    pub fn remove_name(&self, name: &str) -> Result<()> {
        let path = self.root.join("names").join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed("remove", &path, e)),
            _ => {}
        }
        self.changed(name, None, sync_directory(&self.root.join("names")));
        Ok(())
    }

    /// Notes a change that is made on disk. If the disk has not confirmed it, it may be undone by a power cut, which is
    /// worth a line in the log but cannot be told as a failure of the change; what the name stood for is kept for then.
    fn changed(&self, name: &str, record: Option<Record>, confirmed: Result<()>) {
        let old = {
            let mut state = self.state();
            let old = match record {
                Some(record) => state.names.insert(name.to_string(), record),
                None => state.names.remove(name),
            };
            if let Err(e) = &confirmed {
                tracing::error!("{name:?} may be undone by a power cut: {e}");
                state.unsettled.extend(old.iter().map(|old| old.generation.clone()));
            }
            old
        };
        if let Some(old) = old {
            self.collect(&old.generation);
        }
    }

    /// Removes a generation's files unless a name or a lease needs them.
    fn collect(&self, generation: &Generation) {
        if self.state().needs(generation) {
            return;
        }
        let object = self.object(generation);
        let trash = {
            let _placing = self.placing.lock().unwrap_or_else(|e| e.into_inner());
            if self.state().needs(generation) || !object.exists() {
                return;
            }
            // Out of sight in one step: whoever leases it from now on makes it anew.
            let moved = self.incoming().and_then(|trash| {
                fs::rename(&object, trash.path().join("object")).map_err(|e| failed("remove", &object, e))?;
                Ok(trash)
            });
            match moved {
                Ok(trash) => trash,
                Err(e) => return tracing::warn!("{e}"),
            }
        };
        drop(trash);
    }

    fn collect_all(&self) -> Result<()> {
        let objects = self.root.join("objects");
        for entry in fs::read_dir(&objects).map_err(|e| failed("list", &objects, e))? {
            let entry = entry.map_err(|e| failed("list", &objects, e))?;
            if let Some(name) = entry.file_name().to_str() {
                self.collect(&Generation::new(name));
            }
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl State {
    fn needs(&self, generation: &Generation) -> bool {
        self.leases.contains_key(generation)
            || self.unsettled.contains(generation)
            || self.names.values().any(|record| record.generation == *generation)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        {
            let mut state = self.store.state();
            if let Some(count) = state.leases.get_mut(&self.generation) {
                *count -= 1;
                if *count == 0 {
                    state.leases.remove(&self.generation);
                }
            }
        }
        self.store.collect(&self.generation);
    }
}

fn lock(path: &Path) -> Result<File> {
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(|e| failed("open", path, e))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let owner = fs::read_to_string(path).unwrap_or_default();
            let owner = owner.trim().parse::<u32>().map_or(String::new(), |pid| format!(" (process {pid})"));
            return Err(Error::unavailable(format!(
                "the adapter store {} is in use by another process{owner}; stop it or choose another store",
                path.parent().unwrap_or(path).display()
            )));
        }
        Err(TryLockError::Error(e)) => return Err(failed("lock", path, e)),
    }
    // Only to tell others who holds it.
    let note = file.set_len(0).and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()));
    note.map_err(|e| failed("write", path, e))?;
    Ok(file)
}

fn read_names(directory: &Path) -> Result<(HashMap<String, Record>, HashMap<String, Error>)> {
    let (mut names, mut damaged) = (HashMap::new(), HashMap::new());
    for entry in fs::read_dir(directory).map_err(|e| failed("list", directory, e))? {
        let entry = entry.map_err(|e| failed("list", directory, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        match check_whole_name(&name).and_then(|()| read_record(&entry.path())) {
            Ok(record) => {
                names.insert(name, record);
            }
            Err(e) => {
                damaged.insert(name, e);
            }
        }
    }
    Ok((names, damaged))
}

fn read_record(path: &Path) -> Result<Record> {
    let bytes = fs::read(path).map_err(|e| failed("read", path, e))?;
    let damaged = |why: String| Error::internal(format!("{} is damaged: {why}", path.display()));
    let record: RecordFile = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
    let hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    if record.generation.len() != 64 || !record.generation.bytes().all(hex) {
        return Err(damaged(format!("the generation is {:?}; expected 64 hex digits", record.generation)));
    }
    Ok(Record { generation: Generation::new(record.generation), created: record.created })
}

/// Removes everything in a folder.
fn clear(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(|e| failed("list", directory, e))? {
        let entry = entry.map_err(|e| failed("list", directory, e))?;
        let path = entry.path();
        let is_directory = entry.file_type().map_err(|e| failed("read", &path, e))?.is_dir();
        let removed = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(|e| failed("remove", &path, e))?;
    }
    Ok(())
}

/// Makes renames into and out of a folder durable.
fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(|e| failed("write", path, e))
}

fn failed(action: &str, path: &Path, error: std::io::Error) -> Error {
    // A kind of its own where the disk is full.
    Error::from(error).context(format!("the adapter store could not {action} {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::io::BufRead;

    use super::*;
    use crate::ErrorKind;
    use crate::adapter::files::FILES;
    use crate::adapter::generation_of;

    /// Publishes files of this content under the name and returns their generation.
    fn publish(store: &Arc<Store>, name: &str, content: &str) -> Generation {
        let upload = store.incoming().unwrap();
        fs::write(upload.path().join(FILES[0]), content).unwrap();
        fs::write(upload.path().join(FILES[1]), content.repeat(1000)).unwrap();
        let generation = generation_of(upload.path()).unwrap();
        let lease = store.lease(&generation);
        store.add(&lease, upload.path()).unwrap();
        store.set_name(name, &lease, 1).unwrap();
        generation
    }

    fn open(root: &Path) -> Arc<Store> {
        let (store, damaged) = Store::open(root).unwrap();
        assert!(damaged.is_empty(), "{damaged:?}");
        store
    }

    fn names(store: &Store) -> Vec<(String, Generation)> {
        let mut names: Vec<_> = store.records().into_iter().map(|(name, record)| (name, record.generation)).collect();
        names.sort();
        names
    }

    fn count(directory: PathBuf) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn names_survive_reopening_and_old_objects_go() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        publish(&store, "a", "one");
        let two = publish(&store, "a", "two");
        let three = publish(&store, "b", "three");
        publish(&store, "c", "three");
        store.remove_name("b").unwrap();
        assert_eq!(count(root.path().join("objects")), 2);
        assert_eq!(count(root.path().join("incoming")), 0);
        drop(store);
        let store = open(root.path());
        assert_eq!(names(&store), [("a".to_string(), two.clone()), ("c".to_string(), three)]);
        assert_eq!(generation_of(&store.object(&two)).unwrap(), two);
        assert_eq!(store.records()["a"].created, 1);
    }

    #[test]
    fn a_lease_keeps_the_files() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let one = publish(&store, "a", "one");
        let (first, second) = (store.lease(&one), store.lease(&one));
        publish(&store, "a", "two");
        store.remove_name("a").unwrap();
        drop(first);
        assert_eq!(generation_of(&store.object(&one)).unwrap(), one);
        drop(second);
        assert_eq!(count(root.path().join("objects")), 0);
    }

    #[test]
    fn what_the_disk_has_not_confirmed_is_not_relied_on() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let one = publish(&store, "a", "one");
        let two = publish(&store, "b", "two");
        let unconfirmed = || Err(Error::internal("the disk is gone"));
        store.changed("a", Some(Record { generation: two.clone(), created: 1 }), unconfirmed());
        drop(store.lease(&one));
        assert_eq!(generation_of(&store.object(&one)).unwrap(), one);
        store.changed("a", None, unconfirmed());
        store.remove_name("b").unwrap();
        assert_eq!(generation_of(&store.object(&two)).unwrap(), two);
        drop(store);
        // After the power cut the name stands for what it did, here still the first.
        assert_eq!(names(&open(root.path())), [("a".to_string(), one)]);
        assert_eq!(count(root.path().join("objects")), 1);
    }

    #[test]
    fn only_one_process_opens_a_store() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let error = Store::open(root.path()).map(|_| ()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable);
        assert!(error.message.contains(&std::process::id().to_string()), "{error}");
        drop(store);
        open(root.path());
    }

    /// The states in which a crash can leave a replacement of `one` by `two`, one after each step.
    #[test]
    fn every_interruption_leaves_the_old_or_the_new() {
        let prepare = || {
            let root = tempfile::tempdir().unwrap();
            let store = open(root.path());
            let one = publish(&store, "a", "one");
            drop(store);
            (root, one)
        };
        let donor = tempfile::tempdir().unwrap();
        let donated = open(donor.path());
        let two = publish(&donated, "a", "two");
        let object = donated.object(&two);
        let copy = |to: PathBuf, files: &[&str]| {
            fs::create_dir_all(&to).unwrap();
            for name in files {
                fs::copy(object.join(name), to.join(name)).unwrap();
            }
        };
        let (new_name, object_name) = (donor.path().join("names/a"), two.as_str());
        type Step<'a> = Box<dyn Fn(&Path) + 'a>;
        let steps: Vec<(bool, Step)> = vec![
            (false, Box::new(|root| fs::create_dir(root.join("incoming/upload-1")).unwrap())),
            (false, Box::new(|root| copy(root.join("incoming/upload-1"), &FILES[..1]))),
            (false, Box::new(|root| copy(root.join("incoming/upload-1"), &FILES[..2]))),
            (false, Box::new(|root| copy(root.join("objects").join(object_name), &FILES[..2]))),
            (
                false,
                Box::new(|root| {
                    copy(root.join("objects").join(object_name), &FILES[..2]);
                    fs::write(root.join("incoming/.tmp1"), "{\"gener").unwrap();
                }),
            ),
            (
                true,
                Box::new(|root| {
                    copy(root.join("objects").join(object_name), &FILES[..2]);
                    fs::copy(&new_name, root.join("names/a")).unwrap();
                }),
            ),
        ];
        for (index, (is_new, step)) in steps.iter().enumerate() {
            let (root, one) = prepare();
            step(root.path());
            // After the swap the old object may still be there, or be half removed.
            let half = root.path().join("incoming/upload-2/object");
            fs::create_dir_all(&half).unwrap();
            fs::write(half.join(FILES[0]), "one").unwrap();
            let store = open(root.path());
            let expected = if *is_new { two.clone() } else { one };
            assert_eq!(names(&store), [("a".to_string(), expected.clone())], "step {index}");
            assert_eq!(generation_of(&store.object(&expected)).unwrap(), expected, "step {index}");
            assert_eq!(count(root.path().join("objects")), 1, "step {index}");
            assert_eq!(count(root.path().join("incoming")), 0, "step {index}");
        }
    }

    #[test]
    fn an_unreadable_name_is_told_and_nothing_is_collected() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        publish(&store, "a", "one");
        drop(store);
        for content in ["", "{}", "{\"generation\": \"../../x\", \"created\": 1}"] {
            fs::write(root.path().join("names/a"), content).unwrap();
            let (store, damaged) = Store::open(root.path()).unwrap();
            assert!(damaged["a"].message.contains("damaged"), "{damaged:?}");
            assert!(store.records().is_empty());
            assert_eq!(count(root.path().join("objects")), 1);
        }
    }

    #[test]
    fn a_damaged_object_is_healed_by_uploading_it_again() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let one = publish(&store, "a", "one");
        fs::write(store.object(&one).join(FILES[1]), "damage").unwrap();
        fs::write(store.object(&one).join(FILES[3]), "more").unwrap();
        assert_ne!(generation_of(&store.object(&one)).unwrap(), one);
        assert_eq!(publish(&store, "a", "one"), one);
        assert_eq!(generation_of(&store.object(&one)).unwrap(), one);
    }

    #[test]
    fn equal_uploads_at_once_do_not_collide() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let store = &store;
                scope.spawn(move || {
                    for round in 0..5 {
                        let upload = store.incoming().unwrap();
                        fs::write(upload.path().join(FILES[0]), format!("{round}")).unwrap();
                        let generation = generation_of(upload.path()).unwrap();
                        let lease = store.lease(&generation);
                        store.add(&lease, upload.path()).unwrap();
                        assert_eq!(generation_of(&store.object(&generation)).unwrap(), generation, "{thread}");
                    }
                });
            }
        });
        assert_eq!(count(root.path().join("objects")), 0);
    }

    const CHILD_ROOT: &str = "LORAMUX_TEST_STORE";
    /// What the child says after each round of its work.
    const STEP: &str = "done with a round";

    /// Not a test of its own: what [`a_killed_process_leaves_the_old_or_the_new`] runs and kills.
    #[test]
    #[ignore = "runs without end; started by another test"]
    fn child_that_publishes_for_ever() {
        let Some(root) = std::env::var_os(CHILD_ROOT) else { return };
        let store = open(Path::new(&root));
        for i in 0.. {
            publish(&store, "a", ["one", "two"][i % 2]);
            publish(&store, "b", ["one", "three"][i % 2]);
            if i % 3 == 2 {
                store.remove_name("b").unwrap();
            }
            println!("{STEP}");
        }
    }

    #[test]
    fn a_killed_process_leaves_the_old_or_the_new() {
        let root = tempfile::tempdir().unwrap();
        let known: Vec<Generation> = {
            let elsewhere = tempfile::tempdir().unwrap();
            let store = open(elsewhere.path());
            ["one", "two", "three"].map(|content| publish(&store, "x", content)).to_vec()
        };
        publish(&open(root.path()), "a", "one");
        for round in 0..8u64 {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "adapter::store::tests::child_that_publishes_for_ever", "--ignored", "--nocapture"])
                .env(CHILD_ROOT, root.path())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            // It has done everything at least once, removals too; then it lives for a different time each round.
            let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
            for _ in 0..3 {
                lines.by_ref().map(Result::unwrap).find(|line| line == STEP).expect("the child goes on");
            }
            std::thread::sleep(std::time::Duration::from_micros(1_000 + round * 2_777));
            child.kill().unwrap();
            child.wait().unwrap();
            let store = open(root.path());
            let names = names(&store);
            assert_eq!(names[0].0, "a");
            for (name, generation) in &names {
                assert!(known.contains(generation), "{name} is {generation}");
                assert_eq!(generation_of(&store.object(generation)).unwrap(), *generation, "{name}");
            }
            assert_eq!(count(root.path().join("incoming")), 0);
            let named: std::collections::HashSet<_> = names.iter().map(|(_, generation)| generation).collect();
            assert_eq!(count(root.path().join("objects")), named.len());
        }
    }
}
