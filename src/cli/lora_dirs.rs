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
/// requests in flight end on it. It stays if it is pinned, if an alias points at it, or if it has been loaded from elsewhere meanwhile.
pub(super) struct LoraDirs {
    registry: Arc<AdapterRegistry>,
    aliases: Arc<Aliases>,
    locks: Arc<NameLocks>,
    directories: Vec<PathBuf>,
    seen: BTreeSet<PathBuf>,
    /// Those that were not there at the last look, but before.
    away: BTreeSet<PathBuf>,
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
        }
    }

    /// Registers what is new and forgets what has gone. Reads folders: not to be called in async code.
    pub fn scan(&mut self) -> Scanned {
        let mut found = BTreeSet::new();
        for directory in &self.directories {
            match adapter_folders(directory) {
                Ok(folders) => found.extend(folders),
                // It may be back at the next look, with all that was in it.
                Err(_) => {
                    let known = self.seen.iter().chain(&self.away);
                    found.extend(known.filter(|folder| folder.parent() == Some(directory)).cloned());
                }
            }
        }
        let added = found.difference(&self.seen).filter(|folder| !self.away.contains(*folder));
        let added = added.filter_map(|folder| self.register(folder)).collect();
        let gone: Vec<PathBuf> = self.away.difference(&found).cloned().collect();
        let removed = gone.iter().filter_map(|folder| self.forget(folder)).collect();
        self.away = self.seen.difference(&found).cloned().collect();
        self.seen = found;
        Scanned { added, removed }
    }

    /// Forgets the name of a folder that has gone, if that is where it is from.
    fn forget(&self, folder: &Path) -> Option<String> {
        let name = folder.file_name()?.to_str()?.to_owned();
        // Whoever is changing it just now knows better what it is to be.
        let _changing = self.locks.try_lock(&name)?;
        let info = self.registry.info(&name)?;
        if info.source != folder.display().to_string() {
            return None;
        }
        let kept = |why: &str| {
            tracing::warn!(name, folder = %folder.display(), why, "the folder of an adapter has gone, its name stays");
            None
        };
        if info.pinned {
            return kept("it is pinned");
        }
        let Ok(_leaving) = self.aliases.leave(&name) else {
            return kept("an alias points at it");
        };
        self.registry.unload(&name, UnloadMode::Drain).ok()?;
        Some(name)
    }

    fn register(&self, folder: &Path) -> Option<String> {
        let name = folder.file_name()?.to_str()?.to_owned();
        // An alias of that name keeps it: its callers would otherwise get another adapter unasked.
        let arriving = self.aliases.arrive(&name);
        let files = FileSource::Directory(folder.to_owned());
        let registered = arriving.and_then(|_arriving| self.registry.register(request(&name, files, folder.display().to_string())));
        match registered {
            Ok(()) => Some(name),
            // A name given by --lora-paths, or in two folders: the first counts.
            Err(AdapterError::AlreadyLoaded { .. }) => None,
            Err(error) => {
                tracing::info!(folder = %folder.display(), %error, "a folder of --lora-dir is left out");
                None
            }
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

/// Subfolders that hold an adapter.
fn adapter_folders(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let children = std::fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
    let paths = children.into_iter().map(|child| child.path());
    Ok(paths.filter(|path| path.join("adapter_config.json").is_file()).collect())
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
