//! The sequences that run, by the id that clients gave them: what `/abort_request` looks into.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Waker,
};

use futures::task::AtomicWaker;
use parking_lot::Mutex;

#[derive(Default)]
struct AbortFlag {
    aborted: AtomicBool,
    waker: AtomicWaker,
}

/// A sequence, as those see it who want to end it.
struct Entry {
    rid: Arc<str>,
    /// The key that asked for it.
    owner: Arc<str>,
    flag: Arc<AbortFlag>,
}

/// By a number of its own, since several sequences may have one id.
type Running = HashMap<u64, Entry>;

#[derive(Default)]
struct Table {
    running: Mutex<Running>,
    next: AtomicU64,
}

/// Every running sequence.
#[derive(Clone, Default)]
pub struct RunningRequests(Arc<Table>);

impl RunningRequests {
    /// Enters a sequence of a key; it leaves when what this returns is dropped.
    pub fn enter(&self, rid: Arc<str>, owner: Arc<str>) -> RunningRequest {
        let key = self.0.next.fetch_add(1, Ordering::Relaxed);
        let flag = Arc::new(AbortFlag::default());
        let entry = Entry {
            rid,
            owner,
            flag: Arc::clone(&flag),
        };
        self.0.running.lock().insert(key, entry);
        RunningRequest {
            table: Arc::clone(&self.0),
            key,
            flag,
        }
    }

    /// Ends the sequences of `rid`, and those of its parts `rid_0`, `rid_1`, …; says how many. Ids that only begin alike are left
    /// alone, and so is what another key asked for, unless nobody is named as its `owner`.
    pub fn abort(&self, rid: &str, owner: Option<&str>) -> usize {
        let is_part = |id: &str| {
            let part = id.strip_prefix(rid).and_then(|rest| rest.strip_prefix('_'));
            part.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
        };
        let running = self.0.running.lock();
        let ended = running.values().filter(|entry| {
            let is_named = *entry.rid == *rid || is_part(&entry.rid);
            is_named && owner.is_none_or(|owner| *entry.owner == *owner)
        });
        ended
            .map(|Entry { flag, .. }| {
                flag.aborted.store(true, Ordering::Release);
                flag.waker.wake();
            })
            .count()
    }

    /// How many run.
    pub fn len(&self) -> usize {
        self.0.running.lock().len()
    }

    /// Whether none runs.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A sequence's place in the table; given back on drop.
pub struct RunningRequest {
    table: Arc<Table>,
    key: u64,
    flag: Arc<AbortFlag>,
}

impl RunningRequest {
    /// Whether it was told to end.
    pub fn is_aborted(&self) -> bool {
        self.flag.aborted.load(Ordering::Acquire)
    }

    /// The same; if it was not, `waker` is woken when it is.
    pub fn wake_when_aborted(&self, waker: &Waker) -> bool {
        self.flag.waker.register(waker);
        self.is_aborted()
    }
}

impl Drop for RunningRequest {
    fn drop(&mut self) {
        self.table.running.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_ends_itself_and_its_parts_only() {
        let running = RunningRequests::default();
        let entered: Vec<RunningRequest> = ["a", "a_0", "a_1", "a1", "ab", "a_x", "b_0"]
            .map(|id| running.enter(id.into(), "ann".into()))
            .into();
        assert_eq!(running.abort("a", Some("eve")), 0);
        assert_eq!(running.abort("a", Some("ann")), 3);
        let aborted: Vec<bool> = entered.iter().map(|request| request.wake_when_aborted(Waker::noop())).collect();
        assert_eq!(aborted, [true, true, true, false, false, false, false]);
        drop(entered);
        assert!(running.is_empty());
        assert_eq!(running.abort("a", None), 0);
    }
}
