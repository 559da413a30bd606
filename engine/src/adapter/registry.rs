//! Names, versions, leases and the host tier.

use std::{sync::Arc, time::Duration};

use super::{HostAdapter, VersionId};
use crate::files::FileSource;

/// What `load` is asked to do.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    /// The name to register.
    pub name: String,
    /// A folder with `adapter_config.json` and `adapter_model.safetensors`.
    pub files: FileSource,
    /// What to show as its path (the directory, the Hub id, `demo:NAME`).
    pub source: String,
    /// Loaded to the device at once, never evicted.
    pub pinned: bool,
    /// Swap atomically if the name is taken.
    pub replace: bool,
}

/// Where an adapter's weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterState {
    /// Known by name; its files are read at first use.
    Registered,
    /// Packed in host memory.
    Host,
    /// Usable by a batch.
    Device,
}

/// What is known of a registered adapter.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct AdapterInfo {
    /// Its name.
    pub name: Arc<str>,
    /// Where it came from.
    pub source: String,
    /// Where its weights are.
    pub state: AdapterState,
    /// Content hash, hex; `None` before the first read.
    pub version: Option<String>,
    /// Largest rank.
    pub max_lora_rank: u32,
    /// Modules it changes (`q_proj`, …), sorted.
    pub target_modules: Vec<String>,
    /// Bytes of its weights.
    pub bytes: usize,
    /// Whether it is pinned.
    pub pinned: bool,
    /// Requests that hold it.
    pub leases: usize,
    /// Requests that asked for it since it was registered.
    pub requests_total: u64,
    /// Coverage, keys without effect, and the like: what `inspect` shows.
    pub report: Option<Arc<super::load::CoverageReport>>,
}

/// What unloading found.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct UnloadReport {
    /// The name.
    pub name: String,
    /// Requests that were in flight when the name was forgotten.
    pub waited_for: usize,
    /// How long until the last ended.
    pub waited: Duration,
}

/// One request's hold on an adapter version, from admission to its end. Dropping the last clone of it releases it, exactly once.
/// While it lives the version's weights stay in host memory, whatever happens to the name.
#[derive(Clone)]
pub struct AdapterLease {
    name: Arc<str>,
    weights: Arc<HostAdapter>,
    // Dropped with the lease: counts it down and wakes who waits for zero.
    _hold: Option<Arc<dyn Send + Sync>>,
}

impl std::fmt::Debug for AdapterLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdapterLease")
            .field("name", &self.name)
            .field("version", &self.weights.version)
            .finish()
    }
}

impl AdapterLease {
    /// A lease on weights that no registry counts: for tests and benches. `hold` is dropped with the last clone.
    pub fn detached(name: Arc<str>, weights: Arc<HostAdapter>, hold: Option<Arc<dyn Send + Sync>>) -> Self {
        Self { name, weights, _hold: hold }
    }

    /// The name that was asked for.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Content identity: what prefix caching and residency are keyed by.
    pub fn version(&self) -> VersionId {
        self.weights.version
    }

    /// The packed weights.
    pub fn weights(&self) -> &Arc<HostAdapter> {
        &self.weights
    }
}
