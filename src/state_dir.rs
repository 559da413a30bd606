//! What admins changed at run time, and `--state-dir`, which keeps it over restarts.
//!
//! The folder holds `state` (adapters, pins and aliases: a line with the format's name and a SHA-256 of the rest, then JSON),
//! `adapters/` (the files of pushed adapters, a folder each) and `lock` (held by the server that uses the folder).
//!
//! `state` is only ever replaced whole: written beside it, synced, renamed over it, the folder synced. Whoever ends the process and
//! when, the file is the one from before a change or the one from after it, and a change that was answered with 200 is in it. A
//! `state` that does not match its checksum is moved aside, with the pushed adapters, to `damaged-…/`; nothing of it is used.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::aliases::AliasDefinition;

const STATE_FILE: &str = "state";
const NEW_STATE_FILE: &str = "state.new";
const LOCK_FILE: &str = "lock";
const ADAPTERS: &str = "adapters";
/// The format's name, then a space, the checksum in hex, and a line feed.
const FORMAT: &str = "polylora-state-1";
/// A state of 100,000 adapters has some 20 MB.
const MAX_STATE_BYTES: u64 = 256 << 20;

/// What was changed at run time, beside what the command line says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Changes {
    /// Adapters that were loaded, by name.
    pub adapters: BTreeMap<String, KeptAdapter>,
    /// Adapters that were pinned or unpinned, wherever they come from.
    pub pins: BTreeMap<String, bool>,
    /// Aliases, by name.
    pub aliases: BTreeMap<String, AliasDefinition>,
}

/// Where an adapter came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptAdapter {
    /// As the client said it, and as it is shown.
    pub source: String,
    /// Its files, if they are in a folder.
    pub directory: Option<PathBuf>,
    /// For a pushed adapter: the name of its folder in `adapters/`, in place of `directory`.
    pub pushed: Option<String>,
}

/// A state folder that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("--state-dir {}: {reason}", .directory.display())]
pub struct StateDirError {
    directory: PathBuf,
    reason: String,
}

/// The changes at run time; kept in a folder if there is one.
#[derive(Debug, Default)]
pub struct RuntimeState {
    changes: Mutex<Numbered>,
    folder: Option<Folder>,
}

/// The changes, and how often they were changed.
#[derive(Debug, Default)]
struct Numbered {
    number: u64,
    changes: Changes,
}

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// The number of the changes that were written last. Held while writing.
    written: Mutex<u64>,
    /// Locked until this is dropped, or the process has ended in whatever way.
    _lock: File,
}

impl RuntimeState {
    /// Opens a folder, which is made if need be, with what it has kept. `Some` damage: a state that could not be used, and where it
    /// is now; what is kept is then empty. Blocks.
    ///
    /// # Errors
    /// A folder that can't be read or written, or that another server uses.
    pub fn open(directory: &Path) -> Result<(Self, Option<String>), StateDirError> {
        let fail = |reason: String| StateDirError {
            directory: directory.to_owned(),
            reason,
        };
        let lock = take_lock(directory).map_err(fail)?;
        let read = read_state(&directory.join(STATE_FILE)).map_err(|error| fail(error.to_string()))?;
        let (changes, damage) = match read {
            Ok(changes) => (changes, None),
            Err(reason) => {
                let aside = set_aside(directory).map_err(|error| fail(format!("a damaged state can't be moved aside: {error}")))?;
                let damage = format!("{}: {reason}; it was moved to {}", directory.join(STATE_FILE).display(), aside.display());
                (Changes::default(), Some(damage))
            }
        };
        fs::create_dir_all(directory.join(ADAPTERS)).map_err(|error| fail(error.to_string()))?;
        remove_unknown(&directory.join(ADAPTERS), &changes).map_err(|error| fail(error.to_string()))?;
        let state = Self {
            changes: Mutex::new(Numbered { number: 0, changes }),
            folder: Some(Folder {
                path: directory.to_owned(),
                written: Mutex::new(0),
                _lock: lock,
            }),
        };
        Ok((state, damage))
    }

    /// The folder of pushed adapters, if there is a state folder.
    pub fn pushed_adapters(&self) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.path.join(ADAPTERS))
    }

    /// A copy of the changes as they stand.
    pub fn changes(&self) -> Changes {
        self.changes.lock().changes.clone()
    }

    /// Changes the changes; [`Self::save`] writes them.
    pub fn change<T>(&self, change: impl FnOnce(&mut Changes) -> T) -> T {
        let mut state = self.changes.lock();
        state.number += 1;
        change(&mut state.changes)
    }

    /// Returns when everything that was changed before the call is on disk: changes that are made while others are written share
    /// the next write. Blocks.
    ///
    /// # Errors
    /// What the system says; the next call tries again.
    pub fn save(&self) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let wanted = self.changes.lock().number;
        let mut written = folder.written.lock();
        if *written >= wanted {
            return Ok(());
        }
        let (number, bytes) = {
            let state = self.changes.lock();
            (state.number, state_bytes(&state.changes))
        };
        write_whole(&folder.path, &bytes)?;
        *written = number;
        Ok(())
    }

    /// [`Self::save`] on a thread that may block.
    ///
    /// # Errors
    /// As there.
    pub async fn saved(self: &Arc<Self>) -> io::Result<()> {
        if self.folder.is_none() {
            return Ok(());
        }
        let state = Arc::clone(self);
        tokio::task::spawn_blocking(move || state.save()).await.map_err(io::Error::other)?
    }
}

fn take_lock(directory: &Path) -> Result<File, String> {
    fs::create_dir_all(directory).map_err(|error| error.to_string())?;
    let lock = File::options().create(true).truncate(false).write(true).open(directory.join(LOCK_FILE));
    let lock = lock.map_err(|error| error.to_string())?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => Err("another server uses it".to_owned()),
        Err(fs::TryLockError::Error(error)) => Err(error.to_string()),
    }
}

/// The file's bytes for these changes.
pub(crate) fn state_bytes(changes: &Changes) -> Vec<u8> {
    with_head(&serde_json::to_vec_pretty(changes).expect("names are strings, and weights are finite"))
}

/// The first line for these bytes, and they.
pub(crate) fn with_head(json: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{FORMAT} {}\n", checksum(json)).into_bytes();
    bytes.extend_from_slice(json);
    bytes
}

fn checksum(json: &[u8]) -> String {
    Sha256::digest(json).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `Ok(Err)`: the file was read and is damaged. No file is no change.
fn read_state(path: &Path) -> io::Result<Result<Changes, String>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ok(Changes::default())),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(MAX_STATE_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(parse_state(&bytes))
}

pub(crate) fn parse_state(bytes: &[u8]) -> Result<Changes, String> {
    if bytes.len() as u64 > MAX_STATE_BYTES {
        return Err(format!("has more than {MAX_STATE_BYTES} bytes"));
    }
    let end = bytes.iter().take(256).position(|&byte| byte == b'\n').ok_or("has no first line")?;
    let (head, json) = (&bytes[..end], &bytes[end + 1..]);
    let head = std::str::from_utf8(head).map_err(|_| "the first line is no text")?;
    let Some((format, expected)) = head.split_once(' ').filter(|(format, _)| *format == FORMAT) else {
        return Err(format!("begins with {head:?}, expected {FORMAT}"));
    };
    let got = checksum(json);
    if got != expected {
        return Err(format!("has the checksum {got}, expected {expected} ({format}, {} bytes)", json.len()));
    }
    serde_json::from_slice(json).map_err(|error| format!("is not what this version writes: {error}"))
}

/// Replaces the state file: all of it or nothing, whenever the process or the machine ends.
fn write_whole(directory: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = directory.join(NEW_STATE_FILE);
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&new, directory.join(STATE_FILE))?;
    sync_folder(directory)
}

/// Makes the names in a folder as durable as the files.
pub fn sync_folder(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Moves the state file and the pushed adapters to a folder of their own.
fn set_aside(directory: &Path) -> io::Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let names = (0..).map(|attempt| directory.join(format!("damaged-{}", seconds + attempt)));
    for aside in names {
        match fs::create_dir(&aside) {
            Ok(()) => {
                // The state last: as long as it is there the next start goes on with this.
                match fs::rename(directory.join(ADAPTERS), aside.join(ADAPTERS)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
                fs::rename(directory.join(STATE_FILE), aside.join(STATE_FILE))?;
                sync_folder(directory)?;
                return Ok(aside);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("the names don't end")
}

/// Removes the files of pushes that were cut off by the process's end, or whose adapter was replaced or unloaded just before it.
fn remove_unknown(adapters: &Path, changes: &Changes) -> io::Result<()> {
    for entry in fs::read_dir(adapters)? {
        let entry = entry?;
        let is_known = changes
            .adapters
            .values()
            .any(|adapter| adapter.pushed.as_deref().map(AsRef::as_ref) == Some(&*entry.file_name()));
        if !is_known {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aliases::TargetDefinition;

    fn changes() -> Changes {
        let adapter = KeptAdapter {
            source: "/adapters/sql".into(),
            directory: Some("/adapters/sql".into()),
            pushed: None,
        };
        let pushed = KeptAdapter {
            source: "pushed:one".into(),
            directory: None,
            pushed: Some("one".into()),
        };
        let alias = AliasDefinition {
            name: "support".into(),
            targets: vec![TargetDefinition {
                adapter: "sql".into(),
                weight: 0.1 + 0.2,
            }],
        };
        Changes {
            adapters: [("sql".to_owned(), adapter), ("new".to_owned(), pushed)].into(),
            pins: [("sql".to_owned(), true), ("json".to_owned(), false)].into(),
            aliases: [("support".to_owned(), alias)].into(),
        }
    }

    fn saved(directory: &Path) {
        let (state, damage) = RuntimeState::open(directory).unwrap();
        assert_eq!((damage, state.changes()), (None, Changes::default()));
        state.change(|kept| *kept = changes());
        fs::create_dir(directory.join(ADAPTERS).join("one")).unwrap();
        state.save().unwrap();
    }

    #[test]
    fn what_was_saved_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("deep/er");
        saved(&directory);
        // What a killed push or write has left behind goes; what is in use stays.
        fs::create_dir(directory.join(ADAPTERS).join("two.partial")).unwrap();
        fs::write(directory.join(NEW_STATE_FILE), "half").unwrap();
        let (state, damage) = RuntimeState::open(&directory).unwrap();
        assert_eq!((damage, state.changes()), (None, changes()));
        assert!(directory.join(ADAPTERS).join("one").is_dir());
        assert!(!directory.join(ADAPTERS).join("two.partial").exists());
        state.change(|changes| changes.pins.clear());
        state.save().unwrap();
        drop(state);
        let (state, _) = RuntimeState::open(&directory).unwrap();
        assert!(state.changes().pins.is_empty());
        assert!(!state.changes().aliases.is_empty());
    }

    #[test]
    fn a_state_that_is_cut_off_or_changed_anywhere_is_set_aside_whole() {
        let bytes = state_bytes(&changes());
        let cut = (0..bytes.len()).map(|len| bytes[..len].to_vec());
        let flipped = (0..bytes.len()).map(|index| {
            let mut bytes = bytes.clone();
            bytes[index] ^= 1;
            bytes
        });
        let longer = [bytes.clone(), b"\n".to_vec()].concat();
        for (index, damaged) in cut.chain(flipped).chain([longer]).enumerate() {
            assert!(parse_state(&damaged).is_err(), "{index}: {}", String::from_utf8_lossy(&damaged));
        }
        assert_eq!(parse_state(&bytes), Ok(changes()));

        let folder = tempfile::tempdir().unwrap();
        saved(folder.path());
        let path = folder.path().join(STATE_FILE);
        for round in 0..3 {
            let mut damaged = fs::read(&path).unwrap();
            damaged.truncate(damaged.len() - 1);
            fs::write(&path, &damaged).unwrap();
            let (state, damage) = RuntimeState::open(folder.path()).unwrap();
            let damage = damage.expect("it is reported");
            assert_eq!(state.changes(), Changes::default());
            let aside = PathBuf::from(damage.rsplit(' ').next().unwrap());
            assert_eq!(fs::read(aside.join(STATE_FILE)).unwrap(), damaged);
            assert!(
                round > 0 || aside.join(ADAPTERS).join("one").is_dir(),
                "the pushed files are kept with it"
            );
            state.change(|changes| changes.pins.insert("x".into(), true));
            state.save().unwrap();
        }
    }

    #[test]
    fn a_folder_serves_one_server_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let (state, _) = RuntimeState::open(folder.path()).unwrap();
        let error = RuntimeState::open(folder.path()).unwrap_err().to_string();
        assert!(error.ends_with("another server uses it") && error.starts_with("--state-dir "), "{error}");
        drop(state);
        RuntimeState::open(folder.path()).unwrap();
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_state_and_is_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        saved(folder.path());
        let (state, _) = RuntimeState::open(folder.path()).unwrap();
        state.change(|changes| changes.pins.clear());
        // A folder in the place of the new file.
        fs::create_dir(folder.path().join(NEW_STATE_FILE)).unwrap();
        state.save().unwrap_err();
        assert_eq!(read_state(&folder.path().join(STATE_FILE)).unwrap(), Ok(changes()));
        fs::remove_dir(folder.path().join(NEW_STATE_FILE)).unwrap();
        state.save().unwrap();
        assert!(read_state(&folder.path().join(STATE_FILE)).unwrap().unwrap().pins.is_empty());
    }

    #[test]
    fn many_threads_save_each_its_own_change() {
        let folder = tempfile::tempdir().unwrap();
        let (state, _) = RuntimeState::open(folder.path()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let state = &state;
                scope.spawn(move || {
                    for index in 0..10 {
                        let name = format!("{thread}-{index}");
                        state.change(|changes| changes.pins.insert(name.clone(), true));
                        state.save().unwrap();
                        let written = read_state(&folder_of(state).join(STATE_FILE)).unwrap().unwrap();
                        assert!(written.pins.contains_key(&name));
                    }
                });
            }
        });
        assert_eq!(state.changes().pins.len(), 80);
    }

    fn folder_of(state: &RuntimeState) -> &Path {
        &state.folder.as_ref().unwrap().path
    }
}
