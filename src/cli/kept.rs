//! What `--state-dir` has kept, brought back at the start.
//!
//! Adapters are registered and read at their first use, so that ten thousand of them hold up no start, and one whose files are away
//! just now is no reason not to start: its requests get the error, and it works again when the files are back. What can't be brought
//! back is warned of and stays in the state until an admin changes it.

use std::path::{Path, PathBuf};

use polylora_engine::{AdapterError, FileSource, LoadRequest, adapter::registry::AdapterRegistry};

use crate::{
    aliases::{Aliases, Names},
    auth::AdapterSources,
    config::LoraPath,
    state_dir::{Changes, KeptAdapter},
};

/// `--lora-paths` as they were changed at run time: without those that another adapter took the place of, and pinned as they were last.
pub(super) fn changed_paths(mut paths: Vec<LoraPath>, changes: &Changes) -> Vec<LoraPath> {
    paths.retain(|path| match changes.adapters.get(&path.name) {
        Some(kept) => {
            tracing::info!(
                name = path.name,
                from = kept.source,
                "--state-dir has another adapter of this name than --lora-paths"
            );
            false
        }
        None => true,
    });
    for path in &mut paths {
        path.pinned = changes.pins.get(&path.name).copied().unwrap_or(path.pinned);
    }
    paths
}

/// Registers the adapters; gives their names. Looks at folders, and may download: not to be called in async code.
pub(super) fn restore_adapters(registry: &AdapterRegistry, changes: &Changes, sources: &AdapterSources, pushed: Option<&Path>) -> Vec<String> {
    let mut names = Vec::new();
    for (name, kept) in &changes.adapters {
        match register(registry, name, kept, changes, files(kept, sources, pushed)) {
            Ok(()) => names.push(name.clone()),
            Err(error) => tracing::warn!(name, from = kept.source, error, "an adapter of --state-dir is not served"),
        }
    }
    names
}

fn register(registry: &AdapterRegistry, name: &str, kept: &KeptAdapter, changes: &Changes, files: Result<FileSource, String>) -> Result<(), String> {
    let request = LoadRequest {
        name: name.to_owned(),
        files: files?,
        source: kept.source.clone(),
        pinned: changes.pins.get(name) == Some(&true),
        replace: false,
        expected_version: None,
    };
    match registry.register(request.clone()) {
        Err(error @ AdapterError::TooManyPinned { .. }) => {
            tracing::warn!(name, %error, "an adapter of --state-dir is not pinned any more");
            let unpinned = LoadRequest { pinned: false, ..request };
            registry.register(unpinned).map_err(|error| error.to_string())
        }
        registered => registered.map_err(|error| error.to_string()),
    }
}

/// Where its files are; of a folder that is not there just now, where they were.
fn files(kept: &KeptAdapter, sources: &AdapterSources, pushed: Option<&Path>) -> Result<FileSource, String> {
    let directory: Option<PathBuf> = match (&kept.pushed, pushed) {
        (Some(name), Some(root)) => return Ok(FileSource::Directory(root.join(name))),
        _ => kept.directory.clone(),
    };
    match directory {
        Some(directory) if directory.is_dir() => Ok(FileSource::Directory(directory)),
        directory => match (sources.resolve_trusted(&kept.source), directory) {
            (Ok(files), _) => Ok(files),
            (Err(error), Some(directory)) => {
                tracing::warn!(from = kept.source, %error, "the files of an adapter of --state-dir are away");
                Ok(FileSource::Directory(directory))
            }
            (Err(error), None) => Err(error.to_string()),
        },
    }
}

/// Pins the adapters that were pinned at run time and that the command line has brought.
pub(super) fn restore_pins(registry: &AdapterRegistry, changes: &Changes) {
    for (name, _) in changes.pins.iter().filter(|(_, pinned)| **pinned) {
        if registry.info(name).is_some_and(|info| !info.pinned)
            && let Err(error) = registry.pin(name, true)
        {
            tracing::warn!(name, %error, "an adapter is not pinned any more");
        }
    }
}

/// Sets the aliases.
pub(super) fn restore_aliases(aliases: &Aliases, changes: &Changes, names: &dyn Names) {
    for definition in changes.aliases.values() {
        if let Err(error) = aliases.set(definition, names) {
            tracing::warn!(%error, "an alias of --state-dir is not served");
        }
    }
}

/// What aliases are checked against before there is a gateway.
pub(super) struct RegisteredNames<'a> {
    /// Knows the adapters.
    pub registry: &'a AdapterRegistry,
    /// The base model's names.
    pub base_names: &'a [String],
}

impl Names for RegisteredNames<'_> {
    fn base_names(&self) -> &[String] {
        self.base_names
    }

    fn is_adapter(&self, name: &str) -> bool {
        self.registry.info(name).is_some_and(|info| info.parts.is_empty())
    }
}
