//! Unpacks an uploaded `.tar`, `.tar.gz` or `.zip`, trusting nothing it declares.
//!
//! Only the files an adapter is made of are written, flat, under their own names: those beside the configuration that
//! lies nearest to the top, since training leaves older checkpoints in folders below. What else is in the archive is
//! skipped. An archive is walked through twice, first to find that folder. Paths that leave the archive, links and devices are refused rather than skipped: such an archive is not
//! what its sender meant to send.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use zip::read::{ArchiveOffset, Config};
use zip::unstable::read::ZipIterable;

use crate::adapter::files::{CONFIG, FILES, GGUF, PICKLE, WEIGHTS, is_shard, kept_name, pickle_error};
use crate::error::shorten;
use crate::{Error, Result};

/// Most entries of an archive, skipped ones included.
const MAX_ENTRIES: usize = 512;
/// Longest path of an entry, in bytes.
const MAX_PATH: usize = 1024;
/// Longest extended header of a tar entry (long names, times).
const MAX_EXTENDED_HEADER: u64 = 1 << 16;
/// What headers and padding of a tar archive may take beside its files.
const TAR_OVERHEAD: u64 = 4 << 20;

/// Unpacks the archive at `archive` into `directory`, which must exist. At most `limit` bytes are written, counted as
/// they come out of the decompressor.
pub(super) fn unpack(archive: &Path, directory: &Path, limit: u64) -> Result<()> {
    let mut out = Unpacker { directory, limit, left: limit, entries: 0, found: vec![], folder: None };
    out.walk(archive)?;
    out.folder = Some(out.choose()?);
    out.walk(archive)
}

enum Format {
    Zip,
    Gzip,
    Tar,
}

impl Format {
    fn of(start: &[u8]) -> Result<Self> {
        let found = match start {
            [] => "empty",
            [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => return Ok(Format::Zip),
            [0x1f, 0x8b, ..] => return Ok(Format::Gzip),
            _ if start.get(257..262) == Some(b"ustar") => return Ok(Format::Tar),
            [b'B', b'Z', b'h', ..] => "compressed with bzip2",
            [0xfd, b'7', b'z', b'X', b'Z', ..] => "compressed with xz",
            [0x28, 0xb5, 0x2f, 0xfd, ..] => "compressed with zstd",
            [b'7', b'z', 0xbc, 0xaf, ..] => "a 7z archive",
            [b'R', b'a', b'r', b'!', ..] => "a RAR archive",
            _ => "of an unknown format",
        };
        Err(Error::unprocessable(format!("the archive is {found}; supported: .tar, .tar.gz and .zip")))
    }
}

struct Unpacker<'a> {
    directory: &'a Path,
    limit: u64,
    left: u64,
    /// Of the walk under way.
    entries: usize,
    /// What may be of use, by folder and name; collected on the first walk.
    found: Vec<(String, String)>,
    /// The folder inside the archive that holds the adapter, empty for the top; known on the second walk.
    folder: Option<String>,
}

impl Unpacker<'_> {
    fn walk(&mut self, archive: &Path) -> Result<()> {
        self.entries = 0;
        let mut file =
            File::open(archive).map_err(|e| Error::internal(format!("the upload could not be opened: {e}")))?;
        let mut start = [0; 512];
        let length = read_start(&mut file, &mut start)?;
        match Format::of(&start[..length])? {
            Format::Zip => self.zip(file),
            Format::Gzip => self.tar(MultiGzDecoder::new(BufReader::new(file))),
            Format::Tar => self.tar(BufReader::new(file)),
        }
    }

    /// Counts an entry and tells what to write it as, if anything.
    fn entry(&mut self, path: &str) -> Result<Option<String>> {
        self.count()?;
        let mut parts = safe_parts(path)?;
        let Some(name) = parts.pop() else { return Ok(None) };
        let pickle = Some(PICKLE).filter(|pickle| *pickle == name);
        let Some(file) = kept_name(name).or(pickle).map(String::from) else { return Ok(None) };
        let folder = parts.join("/");
        if file == GGUF && self.found.iter().any(|(f, name)| self.folder.is_some() && *f == folder && name == CONFIG) {
            // An export of the adapter beside it.
            return Ok(None);
        }
        match &self.folder {
            None => {
                self.found.push((folder, file));
                Ok(None)
            }
            Some(chosen) => Ok((*chosen == folder && file != PICKLE).then_some(file)),
        }
    }

    fn count(&mut self) -> Result<()> {
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(Error::unprocessable(format!("the archive has more than {MAX_ENTRIES} entries")));
        }
        Ok(())
    }

    /// The folder of the adapter: the one nearest to the top that holds a configuration, or any adapter file where there
    /// is no configuration.
    fn choose(&self) -> Result<String> {
        let depth = |folder: &str| folder.split('/').filter(|part| !part.is_empty()).count();
        let holding = |wanted: fn(&str) -> bool| {
            let mut folders: Vec<&str> =
                self.found.iter().filter(|(_, file)| wanted(file)).map(|(folder, _)| folder.as_str()).collect();
            folders.sort_by_key(|folder| (depth(folder), *folder));
            folders.dedup();
            folders
        };
        let mut folders = holding(|file| file == CONFIG);
        if folders.is_empty() {
            folders = holding(|file| file != PICKLE);
        }
        let Some(&chosen) = folders.first() else {
            return Err(Error::unprocessable(format!("the archive holds none of {FILES:?} and no .gguf file")));
        };
        if let Some(other) = folders.get(1).filter(|other| depth(other) == depth(chosen)) {
            return Err(Error::unprocessable(format!(
                "the archive has adapter files in two folders, {chosen:?} and {other:?}; expected one adapter"
            )));
        }
        let mut files = HashSet::new();
        let config = self.found.iter().any(|(folder, file)| folder == chosen && file == CONFIG);
        for (_, file) in self.found.iter().filter(|(folder, file)| folder == chosen && !(config && file == GGUF)) {
            if !files.insert(file.as_str()) {
                let what = if file == GGUF { "a .gguf file" } else { file };
                return Err(Error::unprocessable(format!("the archive has {what} twice in the folder {chosen:?}")));
            }
        }
        let weights = files.iter().any(|file| [WEIGHTS, GGUF].contains(file) || is_shard(file));
        if files.contains(PICKLE) && !weights {
            return Err(pickle_error(&format!("{PICKLE} in the archive")));
        }
        Ok(chosen.to_string())
    }

    fn write(&mut self, path: &str, name: &str, size: u64, content: &mut dyn Read) -> Result<()> {
        let failed = |e: io::Error| Error::from(e).context(format!("{name} could not be written"));
        let mut file = match File::create_new(self.directory.join(name)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::unprocessable(format!("{name} was uploaded beside the archive and is in it too")));
            }
            Err(e) => return Err(failed(e)),
        };
        let mut buffer = vec![0; 1 << 16];
        let mut written = 0;
        loop {
            let read = match content.read(&mut buffer) {
                Ok(0) if written == size => return Ok(()),
                Ok(0) => return Err(malformed(Some(path), &format!("{written} bytes in it, {size} declared"))),
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(read_error(Some(path), &e, self.limit)),
            };
            written += read as u64;
            self.left = self.left.checked_sub(read as u64).ok_or_else(|| too_large(Some(path), self.limit))?;
            file.write_all(&buffer[..read]).map_err(failed)?;
        }
    }

    fn tar(&mut self, content: impl Read) -> Result<()> {
        // The budget also covers what is skipped, so that a bomb in an entry that nobody wants ends too.
        let limit = self.limit;
        let mut content = Budget { inner: content, left: limit.saturating_add(TAR_OVERHEAD) };
        let mut archive = tar::Archive::new(&mut content);
        // Raw entries: the extended headers are read here, where their size is bounded.
        let entries = archive.entries().map_err(|e| read_error(None, &e, limit))?.raw(true);
        let mut long_path: Option<String> = None;
        for entry in entries {
            let mut entry = entry.map_err(|e| read_error(None, &e, limit))?;
            let kind = entry.header().entry_type();
            if kind.is_gnu_longname() || kind.is_pax_local_extensions() || kind.is_pax_global_extensions() {
                let header =
                    extended_header(&mut entry).map_err(|e| e.unwrap_or_else(|e| read_error(None, &e, limit)))?;
                if kind.is_gnu_longname() {
                    long_path = Some(utf8_path(header.strip_suffix(b"\0").unwrap_or(&header))?);
                } else if kind.is_pax_local_extensions()
                    && let Some(path) = pax_path(&header)?
                {
                    long_path = Some(path);
                }
                continue;
            }
            let path = match long_path.take() {
                Some(path) => path,
                None => utf8_path(&entry.path_bytes())?,
            };
            // Old tars mark a folder by its name alone.
            if kind.is_dir() || path.ends_with('/') {
                self.directory_entry(&path)?;
                continue;
            }
            if !kind.is_file() {
                let what = if kind.is_symlink() || kind.is_hard_link() { "a link" } else { "not a plain file" };
                return Err(Error::unprocessable(format!(
                    "the archive's entry {path:?} is {what}; expected plain files"
                )));
            }
            if let Some(name) = self.entry(&path)? {
                let size = entry.size();
                self.write(&path, &name, size, &mut entry)?;
            }
        }
        // To the end, so that a truncated or damaged compressed stream is noticed.
        io::copy(&mut content, &mut io::sink()).map_err(|e| read_error(None, &e, limit))?;
        Ok(())
    }

    fn zip(&mut self, file: File) -> Result<()> {
        let reader = |file: &File| file.try_clone().map(BufReader::new).map_err(Error::from);
        let mut content = reader(&file)?;
        // Entry by entry: an index of all entries would take memory for as many as the archive declares.
        let config = Config { archive_offset: ArchiveOffset::Known(0) };
        let mut archive = ZipIterable::try_new(BufReader::new(file), config).map_err(|e| malformed(None, &e))?;
        if archive.len() > MAX_ENTRIES {
            return Err(Error::unprocessable(format!(
                "the archive has {} entries; at most {MAX_ENTRIES} are accepted",
                archive.len()
            )));
        }
        let entries: Vec<_> = archive
            .files()
            .map_err(|e| malformed(None, &e))?
            .collect::<Result<_, _>>()
            .map_err(|e| malformed(None, &e))?;
        for entry in entries {
            let path = utf8_path(entry.name_raw())?;
            if entry.encrypted() {
                return Err(Error::unprocessable(format!("the archive's entry {path:?} is encrypted")));
            }
            // Unix file types, where the archive has them: 0o04 directory, 0o10 plain file.
            let kind = entry.unix_mode().map_or(0, |mode| mode >> 12 & 0o17);
            if entry.is_dir() || kind == 0o04 {
                self.directory_entry(&path)?;
                continue;
            }
            if entry.is_symlink() || !matches!(kind, 0 | 0o10) {
                let what = if entry.is_symlink() { "a link" } else { "not a plain file" };
                return Err(Error::unprocessable(format!(
                    "the archive's entry {path:?} is {what}; expected plain files"
                )));
            }
            if let Some(name) = self.entry(&path)? {
                let size = entry.size();
                let mut open = entry
                    .with_reader(&mut content, zip::ZipReadOptions::new())
                    .map_err(|e| malformed(Some(&path), &e))?;
                self.write(&path, &name, size, &mut open)?;
            }
        }
        Ok(())
    }

    /// A folder adds nothing, but must not lead outside either.
    fn directory_entry(&mut self, path: &str) -> Result<()> {
        self.count()?;
        safe_parts(path).map(|_| ())
    }
}

/// The parts of a relative path without `..`.
fn safe_parts(path: &str) -> Result<Vec<&str>> {
    if path.len() > MAX_PATH {
        let path = shorten(path, 100);
        return Err(Error::unprocessable(format!(
            "the archive's entry {path:?} has a path of more than {MAX_PATH} bytes"
        )));
    }
    let refuse = |why: &str| Err(Error::unprocessable(format!("the archive's entry {path:?} {why}")));
    if path.starts_with('/') || path.starts_with('\\') || path.as_bytes().get(1) == Some(&b':') {
        return refuse("has an absolute path; expected a relative one");
    }
    if path.contains('\0') {
        return refuse("has a zero byte in its path");
    }
    let mut parts = Vec::new();
    for part in path.split(['/', '\\']) {
        match part {
            "" | "." => {}
            ".." => return refuse("leads outside the archive (\"..\")"),
            part => parts.push(part),
        }
    }
    Ok(parts)
}

fn utf8_path(bytes: &[u8]) -> Result<String> {
    match std::str::from_utf8(bytes) {
        Ok(path) => Ok(path.to_string()),
        Err(_) => Err(Error::unprocessable(format!(
            "the archive's entry {:?} has a path that is not UTF-8",
            shorten(&String::from_utf8_lossy(bytes), 100)
        ))),
    }
}

/// Reads an extended header. `Err(Ok(_))` is a finished error, `Err(Err(_))` one of reading.
fn extended_header(entry: &mut impl Read) -> Result<Vec<u8>, Result<Error, io::Error>> {
    let mut bytes = Vec::new();
    entry.take(MAX_EXTENDED_HEADER + 1).read_to_end(&mut bytes).map_err(Err)?;
    if bytes.len() as u64 > MAX_EXTENDED_HEADER {
        return Err(Ok(Error::unprocessable(format!(
            "the archive has an extended header of more than {MAX_EXTENDED_HEADER} bytes"
        ))));
    }
    Ok(bytes)
}

/// The path in a pax header, if it has one. Keys that change how an entry's content is to be read are refused.
fn pax_path(header: &[u8]) -> Result<Option<String>> {
    let mut path = None;
    for record in tar::PaxExtensions::new(header) {
        let record = record.map_err(|e| malformed(None, &e))?;
        match record.key_bytes() {
            b"path" => path = Some(utf8_path(record.value_bytes())?),
            key if key == b"size" || key.starts_with(b"GNU.sparse") => {
                return Err(Error::unprocessable(format!(
                    "the archive has an entry with the extended header {:?}, which is not supported",
                    shorten(&String::from_utf8_lossy(key), 100)
                )));
            }
            _ => {}
        }
    }
    Ok(path)
}

/// Ends the stream with an error once more bytes came out than allowed.
struct Budget<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Budget<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        match self.left.checked_sub(read as u64) {
            Some(left) => {
                self.left = left;
                Ok(read)
            }
            None => Err(io::Error::from(io::ErrorKind::QuotaExceeded)),
        }
    }
}

fn read_error(path: Option<&str>, error: &io::Error, limit: u64) -> Error {
    if error.kind() == io::ErrorKind::QuotaExceeded { too_large(path, limit) } else { malformed(path, error) }
}

fn too_large(path: Option<&str>, limit: u64) -> Error {
    let at = path.map_or(String::new(), |path| format!(" (reached in the entry {path:?})"));
    Error::too_large(format!("the archive unpacks to more than {limit} bytes{at}"))
}

fn malformed(path: Option<&str>, error: &dyn std::fmt::Display) -> Error {
    match path {
        Some(path) => Error::unprocessable(format!("the archive's entry {path:?} is damaged: {error}")),
        None => Error::unprocessable(format!("the archive is damaged: {error}")),
    }
}

fn read_start(file: &mut File, start: &mut [u8; 512]) -> Result<usize> {
    let failed = |e: io::Error| Error::internal(format!("the upload could not be read: {e}"));
    let mut bytes = Vec::with_capacity(start.len());
    (&*file).take(start.len() as u64).read_to_end(&mut bytes).map_err(failed)?;
    start[..bytes.len()].copy_from_slice(&bytes);
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    Ok(bytes.len())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use tar::{EntryType, Header};
    use zip::write::SimpleFileOptions;

    use super::*;
    use crate::ErrorKind;

    /// One entry of a tar archive, written without the checks that a well-meaning library makes.
    fn entry(path: &str, kind: EntryType, content: &[u8]) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        header.set_cksum();
        let padding = vec![0; content.len().next_multiple_of(512) - content.len()];
        [header.as_bytes(), content, &padding].concat()
    }

    fn file(path: &str, content: &[u8]) -> Vec<u8> {
        entry(path, EntryType::Regular, content)
    }

    fn tar(entries: &[Vec<u8>]) -> Vec<u8> {
        [&entries.concat()[..], &[0; 1024]].concat()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        for (path, content) in entries {
            zip.start_file(*path, SimpleFileOptions::default()).unwrap();
            zip.write_all(content).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn unpacked(archive: &[u8], limit: u64) -> Result<Vec<(String, Vec<u8>)>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("upload");
        let inside = folder.path().join("in");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(&path, archive).unwrap();
        let result = unpack(&path, &inside, limit);
        let outside: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
        assert_eq!(outside.len(), 2, "something was written outside: {outside:?}");
        let mut files: Vec<_> = std::fs::read_dir(&inside)
            .unwrap()
            .map(|f| f.unwrap())
            .map(|f| (f.file_name().into_string().unwrap(), std::fs::read(f.path()).unwrap()))
            .collect();
        files.sort();
        result.map(|()| files)
    }

    #[track_caller]
    fn refused(archive: &[u8], kind: ErrorKind, expected: &str) {
        let error = unpacked(archive, 1 << 20).unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(expected), "{error}");
    }

    #[test]
    fn all_formats_give_the_adapter_files_flat() {
        let expected = vec![(CONFIG.to_string(), b"{}".to_vec()), (WEIGHTS.to_string(), b"w".to_vec())];
        let at_top = tar(&[file("./adapter_config.json", b"{}"), file(WEIGHTS, b"w"), file("README.md", b"x")]);
        let in_folder = tar(&[
            entry("out/", EntryType::Directory, b""),
            file("out/adapter_config.json", b"{}"),
            file("out/adapter_model.safetensors", b"w"),
            file("out/checkpoint-5/adapter_config.json", b"old"),
            file("out/special_tokens_map.json", b"x"),
        ]);
        for archive in [&at_top, &gzip(&at_top), &in_folder, &gzip(&in_folder)] {
            assert_eq!(unpacked(archive, 100).unwrap(), expected);
        }
        let entries: &[(&str, &[u8])] =
            &[("out/adapter_config.json", b"{}"), ("out/adapter_model.safetensors", b"w"), ("out/x.txt", b"x")];
        assert_eq!(unpacked(&zip(entries), 100).unwrap(), expected);
    }

    #[test]
    fn shards_and_gguf_files_are_taken() {
        let names = ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"];
        let index = "adapter_model.safetensors.index.json";
        let files = [file(CONFIG, b"{}"), file(names[1], b"2"), file(index, b"i"), file(names[0], b"1")];
        let found: Vec<String> = unpacked(&tar(&files), 100).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(found, [CONFIG, names[0], names[1], index]);
        let gguf = unpacked(&zip(&[("lora/mine-f16.gguf", b"g"), ("lora/README.md", b"x")]), 100).unwrap();
        assert_eq!(gguf, [(GGUF.to_string(), b"g".to_vec())]);
        let beside = [file("./._a.gguf", b"x"), file("./a.gguf", b"g")];
        assert_eq!(unpacked(&tar(&beside), 100).unwrap(), gguf);
        // Beside a configuration they are exports.
        let files = [file("a.gguf", b"a"), file(CONFIG, b"{}"), file("b.gguf", b"b"), file(WEIGHTS, b"w")];
        assert_eq!(unpacked(&tar(&files), 100).unwrap().len(), 2);
        refused(&tar(&[file("a.gguf", b"a"), file("b.gguf", b"b")]), ErrorKind::Unprocessable, "a .gguf file twice");
    }

    #[test]
    fn the_adapter_nearest_to_the_top_is_taken_whatever_the_order() {
        let expected = vec![(CONFIG.to_string(), b"{}".to_vec()), (WEIGHTS.to_string(), b"w".to_vec())];
        for top in ["", "out/", "home/me/out/"] {
            let path = |name: &str| format!("{top}{name}");
            let mut files = vec![
                file(&path("checkpoint-5/adapter_config.json"), b"old"),
                file(&path("checkpoint-5/adapter_model.safetensors"), b"old"),
                file(&path("checkpoint-5/adapter_model.bin"), b"old"),
                file(&path("checkpoint-9/adapter_config.json"), b"old"),
                file(&path("checkpoint-9/labels.txt"), b"old"),
                file(&path("adapter_model.safetensors"), b"w"),
                file(&path("adapter_config.json"), b"{}"),
                file("adapter_model.safetensors.index", b"x"),
            ];
            // Hundreds of other files do no harm.
            files.extend((0..400).map(|i| file(&path(&format!("checkpoint-9/rng_state_{i}.pth")), b"x")));
            assert_eq!(unpacked(&tar(&files), 100).unwrap(), expected, "{top:?}");
            files.reverse();
            assert_eq!(unpacked(&gzip(&tar(&files)), 100).unwrap(), expected, "{top:?}");
        }
        let entries: &[(&str, &[u8])] = &[
            ("c/adapter_config.json", b"old"),
            (WEIGHTS, b"w"),
            ("c/adapter_model.safetensors", b"old"),
            (CONFIG, b"{}"),
        ];
        assert_eq!(unpacked(&zip(entries), 100).unwrap(), expected);
        // The configuration may come beside the archive.
        assert_eq!(unpacked(&tar(&[file("out/adapter_model.safetensors", b"w")]), 100).unwrap(), expected[1..]);
    }

    #[test]
    fn long_names_are_read_from_extended_headers() {
        let folder = "f".repeat(120);
        let path = format!("{folder}/adapter_config.json");
        let mut gnu = tar::Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_size(2);
        header.set_mode(0o644);
        gnu.append_data(&mut header, &path, &b"{}"[..]).unwrap();
        let gnu = gnu.into_inner().unwrap();
        let record = |key: &str, value: &str| {
            let rest = format!(" {key}={value}\n");
            let length = rest.len() + 3;
            assert!((100..1000).contains(&length));
            format!("{length}{rest}")
        };
        let times = format!("{}{}", "30 mtime=1700000000.123456789\n", record("path", &path));
        let pax = tar(&[entry("x", EntryType::XHeader, times.as_bytes()), file("short", b"{}")]);
        for archive in [gnu, pax] {
            assert_eq!(unpacked(&archive, 100).unwrap(), [(CONFIG.to_string(), b"{}".to_vec())]);
        }
        let sparse = tar(&[entry("x", EntryType::XHeader, b"22 GNU.sparse.major=1\n"), file(CONFIG, b"{}")]);
        refused(&sparse, ErrorKind::Unprocessable, "GNU.sparse.major");
        let huge = tar(&[entry("x", EntryType::XHeader, &vec![b'a'; 70_000]), file(CONFIG, b"{}")]);
        refused(&huge, ErrorKind::Unprocessable, "extended header");
    }

    #[test]
    fn paths_that_lead_outside_are_refused() {
        for path in
            ["../adapter_config.json", "/adapter_config.json", "a/../../adapter_config.json", "..\\x", "C:\\x", "a/.."]
        {
            refused(&tar(&[file(CONFIG, b"{}"), file(path, b"x")]), ErrorKind::Unprocessable, "archive's entry");
            refused(&gzip(&tar(&[file(path, b"x")])), ErrorKind::Unprocessable, "archive's entry");
            refused(&zip(&[(CONFIG, b"{}"), (path, b"x")]), ErrorKind::Unprocessable, "archive's entry");
        }
        refused(&tar(&[entry("../x/", EntryType::Directory, b"")]), ErrorKind::Unprocessable, "\"../x/\"");
    }

    #[test]
    fn links_and_devices_are_refused() {
        for kind in [EntryType::Symlink, EntryType::Link] {
            refused(&tar(&[entry(CONFIG, kind, b"")]), ErrorKind::Unprocessable, "a link");
        }
        for kind in [EntryType::Char, EntryType::Block, EntryType::Fifo, EntryType::GNUSparse] {
            refused(&tar(&[entry(CONFIG, kind, b"")]), ErrorKind::Unprocessable, "not a plain file");
        }
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        zip.add_symlink(CONFIG, "/etc/passwd", SimpleFileOptions::default()).unwrap();
        refused(&zip.finish().unwrap().into_inner(), ErrorKind::Unprocessable, "a link");
    }

    #[test]
    fn duplicates_and_two_adapters_are_refused() {
        refused(&tar(&[file(CONFIG, b"a"), file(CONFIG, b"b")]), ErrorKind::Unprocessable, "twice");
        refused(&tar(&[file(CONFIG, b"a"), file("./adapter_config.json", b"b")]), ErrorKind::Unprocessable, "twice");
        let two = [file("a/adapter_config.json", b"a"), file("b/adapter_config.json", b"b")];
        refused(&tar(&two), ErrorKind::Unprocessable, "two folders");
        refused(
            &tar(&[file("a/adapter_config.json", b"a"), file("a//adapter_config.json", b"b")]),
            ErrorKind::Unprocessable,
            "twice",
        );
        // The zip library does not write a name twice; the same length lets the second be renamed in the bytes.
        let mut twice = zip(&[("adapter_config.json", b"a"), ("adapter_configXjson", b"b")]);
        let at: Vec<usize> = (0..twice.len() - 19).filter(|&i| &twice[i..i + 19] == b"adapter_configXjson").collect();
        at.iter().for_each(|i| twice[i + 14] = b'.');
        assert_eq!(at.len(), 2);
        refused(&twice, ErrorKind::Unprocessable, "twice");
    }

    #[test]
    fn too_many_entries_are_refused() {
        let names: Vec<String> = (0..1000).map(|i| format!("f{i}")).collect();
        let files: Vec<_> = names.iter().map(|name| file(name, b"")).collect();
        refused(&tar(&files), ErrorKind::Unprocessable, "more than 512 entries");
        let folders: Vec<_> = names.iter().map(|name| entry(name, EntryType::Directory, b"")).collect();
        refused(&gzip(&tar(&folders)), ErrorKind::Unprocessable, "more than 512 entries");
        let entries: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
        refused(&zip(&entries), ErrorKind::Unprocessable, "1000 entries");
    }

    #[test]
    fn bombs_end_at_the_limit_whatever_is_declared() {
        let zeros = vec![0; 8 << 20];
        refused(&gzip(&tar(&[file(WEIGHTS, &zeros)])), ErrorKind::TooLarge, "1048576 bytes");
        // In an entry that is skipped it costs only time, up to the budget.
        refused(&gzip(&tar(&[file("skipped", &zeros), file(CONFIG, b"{}")])), ErrorKind::TooLarge, "1048576 bytes");
        refused(&zip(&[(WEIGHTS, &zeros)]), ErrorKind::TooLarge, "1048576 bytes");
        // Two files that are small enough each share the limit.
        let half = vec![0; 600_000];
        refused(&tar(&[file(WEIGHTS, &half), file(CONFIG, &half)]), ErrorKind::TooLarge, CONFIG);
        refused(&zip(&[(WEIGHTS, &half), (CONFIG, &half)]), ErrorKind::TooLarge, CONFIG);
        // Declared as 1 byte in both headers.
        let mut liar = zip(&[(WEIGHTS, &zeros)]);
        let size = (8u32 << 20).to_le_bytes();
        let at: Vec<usize> = (0..liar.len() - 4).filter(|&i| liar[i..i + 4] == size).collect();
        assert_eq!(at.len(), 2);
        at.iter().for_each(|&i| liar[i..i + 4].copy_from_slice(&1u32.to_le_bytes()));
        assert!(unpacked(&liar, 1 << 20).is_err());
        // Zeros after the end of the archive.
        let tail = gzip(&[&tar(&[file(CONFIG, b"{}")])[..], &zeros].concat());
        refused(&tail, ErrorKind::TooLarge, "1048576 bytes");
    }

    #[test]
    fn damaged_archives_are_refused() {
        // Content that does not compress, so that cutting the stream cuts content.
        let mut state = 1u32;
        let noise: Vec<u8> = (0..5000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        let good = tar(&[file(CONFIG, b"{}"), file(WEIGHTS, &noise)]);
        refused(&good[..3000], ErrorKind::Unprocessable, "damaged");
        let zipped = gzip(&good);
        for length in [100, zipped.len() / 2, zipped.len() - 4] {
            refused(&zipped[..length], ErrorKind::Unprocessable, "damaged");
        }
        let mut flipped = zipped.clone();
        let last = flipped.len() - 6;
        flipped[last] ^= 1;
        refused(&flipped, ErrorKind::Unprocessable, "damaged");
        let zip = zip(&[(CONFIG, b"{}"), (WEIGHTS, &noise)]);
        for length in [4, 100, zip.len() - 1] {
            refused(&zip[..length], ErrorKind::Unprocessable, "");
        }
        let mut flipped = zip.clone();
        flipped[2000] ^= 1;
        refused(&flipped, ErrorKind::Unprocessable, "damaged");
    }

    #[test]
    fn other_things_are_named() {
        refused(b"", ErrorKind::Unprocessable, "empty");
        refused(b"hello", ErrorKind::Unprocessable, "unknown format");
        refused(b"BZh91AY", ErrorKind::Unprocessable, "bzip2");
        refused(&gzip(b"hello"), ErrorKind::Unprocessable, "damaged");
        refused(&tar(&[file("x", b"")]), ErrorKind::Unprocessable, "holds none of");
        refused(&zip(&[]), ErrorKind::Unprocessable, "holds none of");
        let pickled = [file(CONFIG, b"{}"), file("adapter_model.bin", b"x")];
        refused(&tar(&pickled), ErrorKind::Unprocessable, "pickle");
    }

    #[test]
    fn encrypted_entries_are_refused() {
        let mut bytes = zip(&[(CONFIG, b"{}")]);
        // The flag in the local header (offset 6) and in the central directory (offset 8).
        let central = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
        bytes[6] |= 1;
        bytes[central + 8] |= 1;
        refused(&bytes, ErrorKind::Unprocessable, "encrypted");
    }
}
