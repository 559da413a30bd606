//! `--lora-dir`: folders whose subfolders are adapters, registered by name and read at first use. What comes and what goes is noticed while
//! serving.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use polylora_engine::{AdapterError, FileSource, LoadRequest, UnloadMode, adapter::registry::AdapterRegistry};

use crate::{aliases::Aliases, lifecycle::NameLocks};

/// How often the folders are looked at.
const PERIOD: Duration = Duration::from_secs(5);

/// The folders, and the subfolders that have been seen in them.
///
/// A subfolder is registered once, when it is seen first: a name that was unloaded stays unloaded, until its folder has gone and comes
/// again. The name of a folder that has gone is forgotten at the second look, since one that is being replaced is away for a moment;
/// requests in flight end on it. It stays as long as it is pinned or an alias points at it, and if it has been loaded from elsewhere
/// meanwhile.
///
/// A name that two of the folders have is that of the one given first, or of the one that was there when the other came; the other takes
/// its place when it has gone.
pub(super) struct LoraDirs {
    registry: Arc<AdapterRegistry>,
    aliases: Arc<Aliases>,
    locks: Arc<NameLocks>,
    directories: Vec<PathBuf>,
    seen: BTreeSet<PathBuf>,
    /// Those that were not there at the last look, but before.
    away: BTreeSet<PathBuf>,
    /// Those that have gone, but whose names could not go with them yet.
    kept: BTreeSet<PathBuf>,
}

/// What a look at the folders has changed: names.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Scanned {
    /// Registered.
    pub added: Vec<String>,
    /// Forgotten.
    pub removed: Vec<String>,
}

impl LoraDirs {
    pub fn new(registry: Arc<AdapterRegistry>, aliases: Arc<Aliases>, locks: Arc<NameLocks>, directories: Vec<PathBuf>) -> Self {
        Self {
            registry,
            aliases,
            locks,
            directories,
            seen: BTreeSet::new(),
            away: BTreeSet::new(),
            kept: BTreeSet::new(),
        }
    }

    /// Registers what is new and forgets what has gone. Reads folders: not to be called in async code.
    pub fn scan(&mut self) -> Scanned {
        let known: BTreeSet<PathBuf> = self.seen.iter().chain(&self.away).chain(&self.kept).cloned().collect();
        let (mut found, mut scanned) = (BTreeSet::new(), Scanned::default());
        for directory in &self.directories {
            // One that can't be read may be back at the next look, with all that was in it.
            let of_before = || known.iter().filter(|folder| folder.parent() == Some(directory)).cloned().collect();
            let folders = adapter_folders(directory).unwrap_or_else(|_| of_before());
            // In this order: the folder that was given first has the name.
            let new = folders.iter().filter(|folder| !known.contains(*folder));
            scanned.added.extend(new.filter_map(|folder| self.register(folder)));
            found.extend(folders);
        }
        let gone: Vec<PathBuf> = self.away.union(&self.kept).filter(|folder| !found.contains(*folder)).cloned().collect();
        let kept_before = std::mem::take(&mut self.kept);
        for folder in gone {
            match self.forget(&folder) {
                Gone::NotServed => {}
                Gone::Kept(why) => {
                    if !kept_before.contains(&folder) {
                        tracing::warn!(folder = %folder.display(), why, "the folder of an adapter has gone, its name stays until it may go");
                    }
                    self.kept.insert(folder);
                }
                Gone::Forgotten(name) => {
                    let others = self.directories.iter().map(|directory| directory.join(&name));
                    scanned
                        .added
                        .extend(others.filter(|other| found.contains(other)).find_map(|other| self.register(&other)));
                    scanned.removed.push(name);
                }
            }
        }
        self.away = self.seen.difference(&found).cloned().collect();
        self.seen = found;
        scanned
    }

    /// Forgets the name of a folder that has gone, if that is where it is from.
    fn forget(&self, folder: &Path) -> Gone {
        let Some(name) = folder.file_name().and_then(|name| name.to_str()) else {
            return Gone::NotServed;
        };
        let Some(_changing) = self.locks.try_lock(name) else {
            // Whoever it is knows better what the name is to be.
            return Gone::Kept("somebody is changing it");
        };
        match self.registry.info(name) {
            Some(info) if info.source == folder.display().to_string() => {
                if info.pinned {
                    return Gone::Kept("it is pinned");
                }
            }
            _ => return Gone::NotServed,
        }
        let Ok(_leaving) = self.aliases.leave(name) else {
            return Gone::Kept("an alias points at it");
        };
        match self.registry.unload(name, UnloadMode::Drain) {
            Ok(_) => Gone::Forgotten(name.to_owned()),
            Err(_) => Gone::NotServed,
        }
    }

    fn register(&self, folder: &Path) -> Option<String> {
        let name = folder.file_name()?.to_str()?.to_owned();
        // An alias of that name keeps it: its callers would otherwise get another adapter unasked.
        let arriving = self.aliases.arrive(&name);
        let files = FileSource::Directory(folder.to_owned());
        let registered = arriving.and_then(|_arriving| self.registry.register(request(&name, files, folder.display().to_string())));
        match registered {
            Ok(()) => return Some(name),
            Err(AdapterError::AlreadyLoaded { .. }) => self.say_who_has(&name, folder),
            Err(error) => tracing::info!(folder = %folder.display(), %error, "a folder of --lora-dir is left out"),
        }
        None
    }

    fn say_who_has(&self, name: &str, folder: &Path) {
        let Some(info) = self.registry.info(name) else { return };
        let served = Path::new(&info.source);
        if served == folder {
            return;
        }
        if self.directories.iter().any(|directory| served.parent() == Some(directory)) {
            tracing::warn!(name, served = %served.display(), left_out = %folder.display(), "two folders of --lora-dir have the same name");
        } else {
            tracing::info!(name, served = info.source, left_out = %folder.display(), "a folder of --lora-dir has a name that is served from elsewhere");
        }
    }

    /// Looks at the folders from time to time, for ever.
    pub async fn watch(mut self) {
        if self.directories.is_empty() {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(PERIOD).await;
            let scanned = tokio::task::spawn_blocking(move || {
                let changes = self.scan();
                (self, changes)
            });
            let Ok((dirs, changes)) = scanned.await else {
                // Only a panic or the runtime's end comes here; serving goes on with what is known.
                return std::future::pending().await;
            };
            self = dirs;
            if changes != Scanned::default() {
                tracing::info!(added = ?changes.added, removed = ?changes.removed, "--lora-dir has changed");
            }
        }
    }
}

/// What became of the name of a folder that has gone.
enum Gone {
    Forgotten(String),
    /// It is unknown, or from elsewhere.
    NotServed,
    /// It stays for now. Why.
    Kept(&'static str),
}

fn request(name: &str, files: FileSource, source: String) -> LoadRequest {
    LoadRequest {
        name: name.to_owned(),
        files,
        source,
        pinned: false,
        replace: false,
        expected_version: None,
    }
}

/// Subfolders that hold an adapter, in the order of their names. One whose name begins with a dot is being written: its name comes last, by a rename.
fn adapter_folders(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut folders = std::fs::read_dir(directory)?
        .map(|child| Ok(child?.path()))
        .collect::<io::Result<Vec<_>>>()?;
    let is_hidden = |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    folders.retain(|path| !is_hidden(path) && path.join("adapter_config.json").is_file());
    folders.sort();
    Ok(folders)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use polylora_engine::{
        adapter::{LoraLimits, PackedDtype, registry::RegistryConfig},
        decoder::DecoderConfig,
    };

    use super::*;
    use crate::aliases::{AliasDefinition, Names, TargetDefinition};

    fn add(folder: &Path, name: &str) {
        fs::create_dir_all(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("adapter_config.json"), "{}").unwrap();
    }

    fn dirs(directories: &[&Path]) -> LoraDirs {
        let config = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/base/config.json")).unwrap();
        let decoder = Arc::new(DecoderConfig::from_json(&config, None).unwrap());
        let config = RegistryConfig {
            base_names: vec!["base".to_owned()],
            ..RegistryConfig::new(LoraLimits::new(PackedDtype::F32))
        };
        let registry = Arc::new(AdapterRegistry::new(config, decoder));
        LoraDirs::new(
            registry,
            Arc::default(),
            Arc::default(),
            directories.iter().map(|directory| directory.to_path_buf()).collect(),
        )
    }

    fn alias(dirs: &LoraDirs, name: &str, adapter: &str) {
        struct Registered<'a>(&'a AdapterRegistry);
        impl Names for Registered<'_> {
            fn base_names(&self) -> &[String] {
                &[]
            }
            fn is_adapter(&self, name: &str) -> bool {
                self.0.info(name).is_some()
            }
        }
        let target = TargetDefinition {
            adapter: adapter.into(),
            weight: 1.0,
        };
        let definition = AliasDefinition {
            name: name.into(),
            targets: vec![target],
        };
        dirs.aliases.set(&definition, &Registered(&dirs.registry)).unwrap();
    }

    fn added(names: &[&str]) -> Scanned {
        Scanned {
            added: names.iter().map(|&name| name.to_owned()).collect(),
            removed: Vec::new(),
        }
    }

    fn removed(name: &str) -> Scanned {
        Scanned {
            added: Vec::new(),
            removed: vec![name.to_owned()],
        }
    }

    #[test]
    fn new_folders_are_registered_once_and_unloaded_ones_stay_away() {
        let folder = tempfile::tempdir().unwrap();
        add(folder.path(), "a");
        fs::create_dir(folder.path().join("no-adapter")).unwrap();
        add(folder.path(), ".half-written");
        let mut dirs = dirs(&[folder.path()]);
        assert_eq!(dirs.scan(), added(&["a"]));
        assert_eq!(dirs.scan(), Scanned::default());
        add(folder.path(), "b");
        assert_eq!(dirs.scan(), added(&["b"]));
        assert!(dirs.registry.info("a").is_some());

        dirs.registry.unload("a", UnloadMode::Drain).unwrap();
        assert_eq!(dirs.scan(), Scanned::default());
        assert!(dirs.registry.info("a").is_none());
        fs::remove_dir_all(folder.path().join("a")).unwrap();
        assert_eq!([dirs.scan(), dirs.scan()], [Scanned::default(), Scanned::default()]);
        add(folder.path(), "a");
        assert_eq!(dirs.scan(), added(&["a"]));
    }

    #[test]
    fn what_has_gone_is_forgotten_at_the_second_look_if_nothing_holds_it() {
        let folder = tempfile::tempdir().unwrap();
        let remove = |name: &str| fs::remove_dir_all(folder.path().join(name)).unwrap();
        for name in ["brief", "gone", "pinned", "aliased", "elsewhere"] {
            add(folder.path(), name);
        }
        let mut dirs = dirs(&[folder.path()]);
        assert_eq!(dirs.scan().added.len(), 5);
        // Loaded from another folder meanwhile.
        dirs.registry.unload("elsewhere", UnloadMode::Drain).unwrap();
        let other = FileSource::Directory("/other".into());
        dirs.registry.register(request("elsewhere", other, "/other".to_owned())).unwrap();
        alias(&dirs, "canary", "aliased");
        dirs.registry.pin("pinned", true).unwrap();
        for name in ["brief", "gone", "pinned", "aliased", "elsewhere"] {
            remove(name);
        }
        assert_eq!(dirs.scan(), Scanned::default());
        assert!(dirs.registry.info("gone").is_some());
        add(folder.path(), "brief");
        assert_eq!(dirs.scan(), removed("gone"));
        assert!(dirs.registry.info("gone").is_none());
        for name in ["brief", "pinned", "aliased", "elsewhere"] {
            assert!(dirs.registry.info(name).is_some(), "{name}");
        }
        assert_eq!(dirs.scan(), Scanned::default());
        add(folder.path(), "gone");
        assert_eq!(dirs.scan(), added(&["gone"]));
    }

    #[test]
    fn a_name_that_was_kept_goes_when_nothing_holds_it_any_more() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["pinned", "aliased", "changing", "back"] {
            add(folder.path(), name);
        }
        let mut dirs = dirs(&[folder.path()]);
        dirs.scan();
        alias(&dirs, "canary", "aliased");
        for name in ["pinned", "back"] {
            dirs.registry.pin(name, true).unwrap();
        }
        let locks = Arc::clone(&dirs.locks);
        let changing = locks.try_lock("changing");
        for name in ["pinned", "aliased", "changing", "back"] {
            fs::remove_dir_all(folder.path().join(name)).unwrap();
        }
        for _ in 0..3 {
            assert_eq!(dirs.scan(), Scanned::default());
        }
        drop(changing);
        assert_eq!(dirs.scan(), removed("changing"));
        dirs.registry.pin("pinned", false).unwrap();
        assert_eq!(dirs.scan(), removed("pinned"));
        dirs.aliases.remove("canary").unwrap();
        assert_eq!(dirs.scan(), removed("aliased"));
        // One whose folder is there again is as if it had not gone.
        add(folder.path(), "back");
        dirs.registry.pin("back", false).unwrap();
        for _ in 0..3 {
            assert_eq!(dirs.scan(), Scanned::default());
        }
        assert!(dirs.registry.info("back").is_some());
    }

    #[test]
    fn of_two_folders_with_one_name_the_first_given_counts_and_the_other_when_that_has_gone() {
        let parent = tempfile::tempdir().unwrap();
        // Given against the order of their paths.
        let (first, second) = (parent.path().join("z"), parent.path().join("a"));
        for folder in [&first, &second] {
            add(folder, "both");
        }
        let mut dirs = dirs(&[&first, &second]);
        assert_eq!(dirs.scan(), added(&["both"]));
        let source = |dirs: &LoraDirs| dirs.registry.info("both").map(|info| PathBuf::from(info.source));
        assert_eq!(source(&dirs), Some(first.join("both")));
        fs::remove_dir_all(first.join("both")).unwrap();
        assert_eq!(dirs.scan(), Scanned::default());
        let moved = Scanned {
            added: vec!["both".to_owned()],
            removed: vec!["both".to_owned()],
        };
        assert_eq!(dirs.scan(), moved);
        assert_eq!(source(&dirs), Some(second.join("both")));
        // Who serves a name goes on, whoever else comes.
        add(&first, "both");
        assert_eq!(dirs.scan(), Scanned::default());
        assert_eq!(source(&dirs), Some(second.join("both")));
        // What was unloaded stays so, in both folders.
        dirs.registry.unload("both", UnloadMode::Drain).unwrap();
        assert_eq!(dirs.scan(), Scanned::default());
        assert_eq!(source(&dirs), None);
    }

    #[test]
    fn a_folder_that_can_t_be_read_for_a_while_has_lost_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let (folder, away) = (parent.path().join("adapters"), parent.path().join("away"));
        add(&folder, "a");
        add(&folder, "unloaded");
        let mut dirs = dirs(&[&folder]);
        assert_eq!(dirs.scan().added.len(), 2);
        dirs.registry.unload("unloaded", UnloadMode::Drain).unwrap();
        fs::rename(&folder, &away).unwrap();
        for _ in 0..3 {
            assert_eq!(dirs.scan(), Scanned::default());
        }
        fs::rename(&away, &folder).unwrap();
        assert_eq!(dirs.scan(), Scanned::default());
        assert!(dirs.registry.info("a").is_some() && dirs.registry.info("unloaded").is_none());
    }

    #[test]
    fn an_alias_keeps_its_name() {
        let folder = tempfile::tempdir().unwrap();
        add(folder.path(), "a");
        let mut dirs = dirs(&[folder.path()]);
        dirs.scan();
        alias(&dirs, "b", "a");
        add(folder.path(), "b");
        assert_eq!(dirs.scan(), Scanned::default());
        assert!(dirs.registry.info("b").is_none());
    }

    #[test]
    fn names_that_may_not_be_and_names_that_are_taken_are_left_out() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["base", "a:b", "a,b", "fine"] {
            add(one.path(), name);
        }
        add(two.path(), "fine");
        add(two.path(), "other");
        let mut dirs = dirs(&[one.path(), two.path(), Path::new("/does/not/exist")]);
        let mut scanned = dirs.scan();
        scanned.added.sort();
        assert_eq!(scanned, added(&["fine", "other"]));
    }
}
