//! What admins change at run time: adapters come and go, are pinned, and aliases are pointed elsewhere. The routes are forms of these
//! operations. Each is carried out to its end, even if its client goes away, and answered when it is in `--state-dir`, if there is one.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use polylora_engine::{AdapterError, AdapterInfo, FileSource, LoadRequest, UnloadMode, UnloadReport, adapter::registry::check_adapter_name};
use tokio::sync::OwnedMutexGuard;

use crate::{
    aliases::{Alias, AliasDefinition, AliasError},
    app::Gateway,
    auth::Identity,
    error::ApiError,
    pushed::{Upload, pushed_error},
    state_dir::KeptAdapter,
};

/// What `source` of a pushed adapter begins with.
pub const PUSHED_PREFIX: &str = "pushed:";

/// What a client wants loaded.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// The name to serve it under.
    pub name: String,
    /// Where it is, as the client says it.
    pub path: String,
    /// Never evicted.
    pub pinned: bool,
    /// Swap atomically if the name is taken.
    pub replace: bool,
    /// Only swap if the name has this version (hex).
    pub expected_version: Option<String>,
}

/// Changes of one name come one after the other, so that what is kept is what is served.
#[derive(Debug, Default)]
pub struct NameLocks(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl NameLocks {
    async fn lock(&self, name: &str) -> OwnedMutexGuard<()> {
        self.of(name).lock_owned().await
    }

    /// The right to change a name, if nobody else is changing it.
    pub fn try_lock(&self, name: &str) -> Option<OwnedMutexGuard<()>> {
        self.of(name).try_lock_owned().ok()
    }

    fn of(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.0.lock();
        locks.retain(|_, lock| lock.strong_count() > 0);
        let kept = locks.get(name).and_then(Weak::upgrade);
        kept.unwrap_or_else(|| {
            let lock = Arc::default();
            locks.insert(name.to_owned(), Arc::downgrade(&lock));
            lock
        })
    }
}

/// Names that are being loaded: until one is served, who asks for it is told to ask again.
#[derive(Clone, Debug, Default)]
pub struct LoadingNames(Arc<Mutex<HashMap<String, Loads>>>);

/// The loads of one name.
#[derive(Debug)]
struct Loads {
    count: usize,
    /// Where the first of them has it from.
    source: String,
}

impl LoadingNames {
    /// Whether a load of this name is under way.
    pub fn contains(&self, name: &str) -> bool {
        self.0.lock().contains_key(name)
    }

    /// Where a name that is being loaded comes from.
    pub fn source(&self, name: &str) -> Option<String> {
        self.0.lock().get(name).map(|loads| loads.source.clone())
    }

    /// Every such name, with where it comes from, by name.
    pub fn list(&self) -> Vec<(String, String)> {
        let names = self.0.lock();
        let mut list: Vec<_> = names.iter().map(|(name, loads)| (name.clone(), loads.source.clone())).collect();
        drop(names);
        list.sort_unstable();
        list
    }

    fn enter(&self, name: &str, source: &str) -> LoadingName {
        let mut names = self.0.lock();
        let loads = names.entry(name.to_owned()).or_insert_with(|| Loads {
            count: 0,
            source: source.to_owned(),
        });
        loads.count += 1;
        LoadingName {
            names: self.clone(),
            name: name.to_owned(),
        }
    }
}

/// One load's entry among the [`LoadingNames`].
#[derive(Debug)]
pub struct LoadingName {
    names: LoadingNames,
    name: String,
}

impl Drop for LoadingName {
    fn drop(&mut self) {
        let mut names = self.names.0.lock();
        if let Some(loads) = names.get_mut(&self.name) {
            loads.count -= 1;
            if loads.count == 0 {
                names.remove(&self.name);
            }
        }
    }
}

/// Runs on although the client may go away meanwhile.
async fn to_its_end<T: Send + 'static>(work: impl Future<Output = Result<T, ApiError>> + Send + 'static) -> Result<T, ApiError> {
    let task = tokio::spawn(work);
    // A panic has been logged.
    task.await.unwrap_or_else(|_| Err(ApiError::internal()))
}

impl Gateway {
    /// Finds an adapter's files and loads them.
    ///
    /// # Errors
    /// 400 for a name that can't be or is taken, and for what is wrong with the files; 403 and 404 for the path; 409 for another
    /// version than the expected one; 503 if there is no room now.
    pub async fn load_adapter(self: &Arc<Self>, load: Load) -> Result<AdapterInfo, ApiError> {
        let loading = self.begin_load(&load)?;
        let gateway = Arc::clone(self);
        to_its_end(async move {
            let _loading = loading;
            let _one_at_a_time = gateway.name_locks.lock(&load.name).await;
            let _moving = gateway.aliases.arrive(&load.name)?;
            let began = Instant::now();
            gateway.learn_version(&load).await;
            let (sources, path) = (Arc::clone(&gateway.sources), load.path.clone());
            // Looking at folders blocks, and downloading does for long.
            let files = tokio::task::spawn_blocking(move || sources.resolve_from_client(&path));
            let files = files.await.map_err(|_| ApiError::internal())??;
            let kept = KeptAdapter {
                source: load.path.clone(),
                directory: files.directory().and_then(|directory| std::path::absolute(directory).ok()),
                pushed: None,
            };
            gateway.load_and_keep(load, files, kept, began).await
        })
        .await
    }

    /// Loads an adapter that was received as bytes, from `began` on. Its `path` is ignored.
    ///
    /// # Errors
    /// As [`Self::load_adapter`]; the files are then removed.
    pub async fn push_adapter(self: &Arc<Self>, load: Load, upload: Upload, began: Instant) -> Result<AdapterInfo, ApiError> {
        let loading = self.begin_load(&load)?;
        let gateway = Arc::clone(self);
        to_its_end(async move {
            let _loading = loading;
            let _one_at_a_time = gateway.name_locks.lock(&load.name).await;
            let _moving = gateway.aliases.arrive(&load.name)?;
            let kept = KeptAdapter {
                source: format!("{PUSHED_PREFIX}{}", upload.name()),
                directory: None,
                pushed: Some(upload.name()),
            };
            gateway.learn_version(&load).await;
            let files = FileSource::Directory(upload.directory().to_owned());
            let loaded = gateway.load_and_keep(load, files, kept, began).await;
            // Served, although perhaps not kept: the files must stay.
            if !matches!(&loaded, Err(error) if !error.is_state_not_saved()) {
                upload.keep();
            }
            loaded
        })
        .await
    }

    /// Refuses what can be refused before any file is read or received. As long as what it gives is there, requests for the name are told
    /// that it is being loaded.
    ///
    /// # Errors
    /// As [`Self::load_adapter`].
    pub fn begin_load(&self, load: &Load) -> Result<LoadingName, ApiError> {
        self.check_load(load)?;
        let source = if load.path.is_empty() { PUSHED_PREFIX } else { &load.path };
        Ok(self.loading.enter(&load.name, source))
    }

    fn check_load(&self, load: &Load) -> Result<(), ApiError> {
        self.require_lora()?;
        if self.served.names.contains(&load.name) {
            let (name, reason) = (load.name.clone(), "is the base model's".to_owned());
            return Err(AdapterError::BadName { name, reason }.into());
        }
        check_adapter_name(&load.name, &[])?;
        drop(self.aliases.arrive(&load.name)?);
        let existing = self.adapter_named(&load.name);
        if existing.is_some() && !load.replace {
            return Err(AdapterError::AlreadyLoaded { name: load.name.clone() }.into());
        }
        let Some(expected) = &load.expected_version else { return Ok(()) };
        let got = match existing {
            // Not known before it is read, which happens before the swap.
            Some(AdapterInfo { version: None, .. }) => return Ok(()),
            Some(AdapterInfo { version: Some(got), .. }) => got,
            None => "none".to_owned(),
        };
        if got == *expected {
            return Ok(());
        }
        Err(AdapterError::VersionConflict {
            name: load.name.clone(),
            expected: expected.clone(),
            got,
        }
        .into())
    }

    /// A name whose version is asked for may never have been read.
    async fn learn_version(&self, load: &Load) {
        let is_unread = || self.adapter_named(&load.name).is_some_and(|info| info.version.is_none());
        if load.expected_version.is_some() && is_unread() {
            // What fails leaves the version unknown: the swap is then refused.
            drop(self.engine.acquire_adapter(&load.name).await);
        }
    }

    /// One registered adapter; not a combination of several.
    pub fn adapter_named(&self, name: &str) -> Option<AdapterInfo> {
        self.engine.adapter_info(name).filter(|info| info.parts.is_empty())
    }

    async fn load_and_keep(&self, load: Load, files: FileSource, kept: KeptAdapter, began: Instant) -> Result<AdapterInfo, ApiError> {
        let Load {
            name,
            path: _,
            pinned,
            replace,
            expected_version,
        } = load;
        let request = LoadRequest {
            name: name.clone(),
            files,
            source: kept.source.clone(),
            pinned,
            replace,
            expected_version,
        };
        self.metrics.adapter_fetched(began.elapsed());
        let loaded = self.engine.load_adapter(request).await;
        let info = loaded.map_err(|error| if kept.pushed.is_some() { pushed_error(error) } else { error.into() })?;
        let old = self.runtime.change(|changes| {
            // One that takes another's place is pinned as that one was.
            if info.pinned {
                changes.pins.insert(name.clone(), true);
            } else {
                changes.pins.remove(&name);
            }
            changes.adapters.insert(name, kept)
        });
        self.save(old).await?;
        Ok(info)
    }

    /// Writes what was changed; then the files of what it took the place of are nobody's any more.
    async fn save(&self, old: Option<KeptAdapter>) -> Result<(), ApiError> {
        self.runtime.saved().await.map_err(|error| ApiError::state_not_saved(&error))?;
        if let Some(name) = old.and_then(|old| old.pushed) {
            let pushed = Arc::clone(&self.pushed);
            // What can't be removed is logged there, and tried again by the next start.
            let _ = tokio::task::spawn_blocking(move || pushed.remove(&name)).await;
        }
        Ok(())
    }

    /// Forgets an adapter's name at once; then waits for the requests that still run on it, no longer than `timeout` if there is one.
    /// With [`UnloadMode::Abort`] they are ended.
    ///
    /// # Errors
    /// 404 for an unknown name; 409 while an alias points at it.
    pub async fn unload_adapter(self: &Arc<Self>, name: &str, mode: UnloadMode, timeout: Option<Duration>) -> Result<UnloadReport, ApiError> {
        self.require_lora()?;
        let (gateway, name) = (Arc::clone(self), name.to_owned());
        let unloading = to_its_end(async move {
            let _one_at_a_time = gateway.name_locks.lock(&name).await;
            let moving = gateway.aliases.leave(&name)?;
            let unloading = gateway.engine.unload_adapter(&name, mode)?;
            drop(moving);
            gateway.metrics.adapter_unloaded();
            let old = gateway.runtime.change(|changes| {
                changes.pins.remove(&name);
                changes.adapters.remove(&name)
            });
            gateway.save(old).await?;
            Ok(unloading)
        })
        .await?;
        let drained = unloading.drained();
        Ok(match timeout {
            None => drained.await,
            Some(timeout) => match tokio::time::timeout(timeout, drained).await {
                Ok(report) => report,
                Err(_) => unloading.report(),
            },
        })
    }

    /// Pins or unpins an adapter.
    ///
    /// # Errors
    /// 404 for an unknown name; 400 for one pin too many.
    pub async fn pin_adapter(self: &Arc<Self>, name: &str, pinned: bool) -> Result<(), ApiError> {
        self.require_lora()?;
        let (gateway, name) = (Arc::clone(self), name.to_owned());
        to_its_end(async move {
            let _one_at_a_time = gateway.name_locks.lock(&name).await;
            gateway.engine.pin_adapter(&name, pinned)?;
            gateway.runtime.change(|changes| changes.pins.insert(name, pinned));
            gateway.save(None).await
        })
        .await
    }

    /// Makes an alias, or gives one other targets.
    ///
    /// # Errors
    /// 400 for a name or targets that can't be; 503 for a target that is being loaded.
    pub async fn set_alias(self: &Arc<Self>, definition: AliasDefinition) -> Result<Arc<Alias>, ApiError> {
        self.require_lora()?;
        let gateway = Arc::clone(self);
        to_its_end(async move {
            let _one_at_a_time = gateway.name_locks.lock(&definition.name).await;
            let admin = Identity::anonymous();
            let router = gateway.router(&admin);
            let loading = definition.targets.iter().find(|target| router.is_loading(&target.adapter));
            let alias = gateway.aliases.set(&definition, &router).map_err(|error| match (loading, &error) {
                (Some(target), AliasError::BadTarget { .. }) => ApiError::adapter_loading(&target.adapter, "targets"),
                _ => error.into(),
            })?;
            let name = definition.name.clone();
            gateway.runtime.change(|changes| changes.aliases.insert(name, definition));
            gateway.save(None).await?;
            Ok(alias)
        })
        .await
    }

    /// Forgets an alias.
    ///
    /// # Errors
    /// 404.
    pub async fn remove_alias(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        let (gateway, name) = (Arc::clone(self), name.to_owned());
        to_its_end(async move {
            let _one_at_a_time = gateway.name_locks.lock(&name).await;
            let removed = gateway.aliases.remove(&name);
            // One that could not be set again at the start is still kept.
            let kept = gateway.runtime.change(|changes| changes.aliases.remove(&name));
            if removed.is_err() && kept.is_none() {
                return Err(AliasError::Unknown { name }.into());
            }
            gateway.save(None).await
        })
        .await
    }

    fn require_lora(&self) -> Result<(), ApiError> {
        if self.engine.describe().lora_enabled {
            Ok(())
        } else {
            Err(AdapterError::NotEnabled.into())
        }
    }
}
