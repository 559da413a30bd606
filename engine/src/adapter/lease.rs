//! Leases: who uses an adapter's version, how one waits for the last of them, and how they are told to end.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{HostAdapter, VersionId};

/// One request's hold on an adapter version, from admission to its end. Dropping the last clone of it releases it, exactly once.
/// While it lives the version's weights stay in host memory, whatever happens to the name.
#[derive(Clone)]
pub struct AdapterLease {
    name: Arc<str>,
    label: Arc<str>,
    weights: Arc<HostAdapter>,
    held: Held,
    waited_for_load: bool,
}

/// What a lease keeps, and gives back when its last clone is dropped.
#[derive(Clone)]
enum Held {
    Nothing,
    Detached(#[expect(dead_code, reason = "kept for its Drop")] Arc<dyn Send + Sync>),
    Counted(Arc<LeaseGuard>),
    /// A combination, and its parts.
    Combined(Arc<(LeaseGuard, Vec<AdapterLease>)>),
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
        Self {
            label: name.clone(),
            name,
            weights,
            held: hold.map_or(Held::Nothing, Held::Detached),
            waited_for_load: false,
        }
    }

    pub(crate) fn counted(name: Arc<str>, weights: Arc<HostAdapter>, guard: LeaseGuard) -> Self {
        Self {
            label: name.clone(),
            name,
            weights,
            held: Held::Counted(Arc::new(guard)),
            waited_for_load: false,
        }
    }

    pub(super) fn combined(name: Arc<str>, label: Arc<str>, weights: Arc<HostAdapter>, guard: LeaseGuard, parts: Vec<Self>) -> Self {
        Self {
            name,
            label,
            weights,
            waited_for_load: parts.iter().any(Self::waited_for_load),
            held: Held::Combined(Arc::new((guard, parts))),
        }
    }

    /// The same of a request that waited until the adapter was in host memory.
    pub(crate) fn after_load(self) -> Self {
        Self {
            waited_for_load: true,
            ..self
        }
    }

    /// Whether its request had to wait until the adapter, or one in the combination, was in host memory.
    pub fn waited_for_load(&self) -> bool {
        self.waited_for_load
    }

    /// The name that was asked for.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// What this request is counted under: the name, or one label for all combinations, of which clients can make any number.
    pub fn label(&self) -> &Arc<str> {
        &self.label
    }

    /// Content identity: what prefix caching and residency are keyed by.
    pub fn version(&self) -> VersionId {
        self.weights.version
    }

    /// Tokens that a request may have and that its logits are over, on a base model that has `base_vocab_size`.
    pub fn vocab_size(&self, base_vocab_size: usize) -> usize {
        self.weights.vocab_size(base_vocab_size)
    }

    /// The packed weights.
    pub fn weights(&self) -> &Arc<HostAdapter> {
        &self.weights
    }

    /// Whether the adapter, or one in the combination, was unloaded with [`UnloadMode::Abort`]: its requests are to end.
    pub fn is_revoked(&self) -> bool {
        match &self.held {
            Held::Nothing | Held::Detached(_) => false,
            Held::Counted(guard) => guard.hold.is_revoked(),
            Held::Combined(combined) => combined.1.iter().any(Self::is_revoked),
        }
    }
}

/// Whose leases are counted.
pub(crate) trait LeaseOwner: Send + Sync {
    /// A lease has ended.
    fn lease_ended(&self);
    /// The last lease on a version of a name has ended.
    fn adapter_is_free(&self);
}

/// Counts the leases on one name's one version and wakes who waits for the last to end.
#[derive(Default)]
pub(crate) struct Hold {
    leases: AtomicUsize,
    revoked: AtomicBool,
    waiters: Mutex<Vec<oneshot::Sender<()>>>,
}

impl Hold {
    /// Leases that have not ended.
    pub fn count(&self) -> usize {
        self.leases.load(Ordering::SeqCst)
    }

    pub fn revoke(&self) {
        self.revoked.store(true, Ordering::SeqCst);
    }

    fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::SeqCst)
    }

    /// Resolves when no lease is left.
    async fn released(&self) {
        loop {
            let receiver = {
                let mut waiters = self.waiters.lock();
                // Checked under the lock that the last lease takes to wake: no wake-up is lost.
                if self.count() == 0 {
                    return;
                }
                let (sender, receiver) = oneshot::channel();
                waiters.retain(|waiter| !waiter.is_closed());
                waiters.push(sender);
                receiver
            };
            // An error means that the sender was dropped after its message, or with the hold: look again.
            let _ = receiver.await;
        }
    }
}

/// One lease's part in a [`Hold`].
pub(crate) struct LeaseGuard {
    hold: Arc<Hold>,
    owner: Option<Weak<dyn LeaseOwner>>,
}

impl LeaseGuard {
    pub fn new(hold: &Arc<Hold>, owner: Option<Weak<dyn LeaseOwner>>) -> Self {
        hold.leases.fetch_add(1, Ordering::SeqCst);
        Self { hold: hold.clone(), owner }
    }
}

impl Drop for LeaseGuard {
    /// The owner may take its lock: never drop a lease with that lock held.
    fn drop(&mut self) {
        let owner = self.owner.as_ref().and_then(Weak::upgrade);
        // First: whoever sees the adapter free finds this one counted.
        if let Some(owner) = &owner {
            owner.lease_ended();
        }
        if self.hold.leases.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        for waiter in self.hold.waiters.lock().drain(..) {
            // Whoever waited may have gone.
            let _ = waiter.send(());
        }
        if let Some(owner) = owner {
            owner.adapter_is_free();
        }
    }
}

/// What becomes of the requests that still run on an adapter when it is unloaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnloadMode {
    /// They go on to their ends.
    #[default]
    Drain,
    /// They end with `FinishReason::AdapterUnloaded` at the next step.
    Abort,
}

/// What unloading found.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct UnloadReport {
    /// The name.
    pub name: String,
    /// Requests that were in flight when the name was forgotten.
    pub waited_for: usize,
    /// Of those, the ones that have not ended yet.
    pub still_running: usize,
    /// Whether they were told to end.
    pub aborted: bool,
    /// From the unload to now.
    pub waited: Duration,
}

/// An adapter on its way out: its name is forgotten, requests may still run on it. Dropping it changes nothing for them.
pub struct Unloading {
    name: String,
    mode: UnloadMode,
    holds: Vec<Arc<Hold>>,
    waited_for: usize,
    start: Instant,
}

impl Unloading {
    pub(crate) fn new(name: &str, mode: UnloadMode, holds: Vec<Arc<Hold>>) -> Self {
        if mode == UnloadMode::Abort {
            holds.iter().for_each(|hold| hold.revoke());
        }
        Self {
            name: name.to_owned(),
            mode,
            waited_for: holds.iter().map(|hold| hold.count()).sum(),
            holds,
            start: Instant::now(),
        }
    }

    /// How it stands now.
    pub fn report(&self) -> UnloadReport {
        UnloadReport {
            name: self.name.clone(),
            waited_for: self.waited_for,
            still_running: self.holds.iter().map(|hold| hold.count()).sum(),
            aborted: self.mode == UnloadMode::Abort,
            waited: self.start.elapsed(),
        }
    }

    /// Resolves when the last request has ended. May be given up (a timeout) and asked for again.
    pub async fn drained(&self) -> UnloadReport {
        for hold in &self.holds {
            hold.released().await;
        }
        self.report()
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, executor::block_on};

    use super::*;
    use crate::testing::host_adapter;

    fn lease(hold: &Arc<Hold>) -> AdapterLease {
        AdapterLease::counted("a".into(), host_adapter(1, 8), LeaseGuard::new(hold, None))
    }

    #[test]
    fn a_drain_can_be_given_up_and_asked_for_again() {
        let hold = Arc::new(Hold::default());
        let (first, second) = (lease(&hold), lease(&hold));
        let clone = first.clone();
        let unloading = Unloading::new("a", UnloadMode::Drain, vec![hold.clone(), Arc::default()]);
        for _ in 0..3 {
            assert!(unloading.drained().now_or_never().is_none());
        }
        assert!(hold.waiters.lock().len() <= 2, "who gave up is forgotten");
        drop(first);
        assert_eq!(unloading.report().still_running, 2, "a clone is the same lease");
        drop(clone);
        assert_eq!((unloading.report().waited_for, unloading.report().still_running), (2, 1));
        assert!(!second.is_revoked());
        drop(second);
        let report = block_on(unloading.drained());
        assert_eq!((report.waited_for, report.still_running, report.aborted), (2, 0, false));
    }

    #[test]
    fn revoking_an_adapter_revokes_the_combinations_that_it_is_in() {
        let (a, b, sum) = (Arc::new(Hold::default()), Arc::new(Hold::default()), Arc::new(Hold::default()));
        let weights = host_adapter(3, 8);
        let combined = AdapterLease::combined(
            "a+b".into(),
            "sum".into(),
            weights,
            LeaseGuard::new(&sum, None),
            vec![lease(&a), lease(&b)],
        );
        let (alone, other) = (lease(&a), lease(&b));
        let unloading = Unloading::new("a", UnloadMode::Abort, vec![a]);
        assert!(combined.is_revoked() && alone.is_revoked() && !other.is_revoked());
        drop((combined, alone));
        assert!(block_on(unloading.drained()).aborted);
        assert_eq!((b.count(), sum.count()), (1, 0));
    }
}
