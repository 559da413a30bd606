//! What the engine counts, in forms that are cheap to keep in a step and cheap to read beside it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};

/// Observations sorted into buckets.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Histogram {
    /// Upper bounds of the buckets, ascending.
    pub bounds: &'static [f64],
    /// `counts[i]`: observations of at most `bounds[i]` and above `bounds[i - 1]`; one more entry at the end for those above all bounds.
    /// Empty while nothing is measured.
    pub counts: Vec<u64>,
    /// Sum of all observations.
    pub sum: f64,
}

impl Histogram {
    /// No observations yet.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum: 0.0,
        }
    }

    /// Counts one.
    pub fn observe(&mut self, value: f64) {
        self.counts[self.bounds.partition_point(|bound| *bound < value)] += 1;
        self.sum += value;
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Bounds for the stages of an adapter's load, seconds.
pub const LOAD_SECONDS_BOUNDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// How often one adapter came and went since this was asked last.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct AdapterMoves {
    /// Its name.
    pub name: Arc<str>,
    /// Times that it was read, checked and packed into host memory.
    pub loads: u64,
    /// Times that this failed.
    pub load_failures: u64,
    /// Times that it left host memory for others.
    pub host_evictions: u64,
    /// Times that it was copied to the device.
    pub device_uploads: u64,
    /// Times that it left the device for others.
    pub device_evictions: u64,
}

/// One adapter's counters and gauges, since it was first asked for.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct AdapterStats {
    /// Its name.
    pub name: Arc<str>,
    /// Sequences in the batch.
    pub running: u64,
    /// Requests waiting, preempted ones included.
    pub waiting: u64,
    /// Requests submitted.
    pub requests_total: u64,
    /// Requests admitted; `waiting_seconds_total` is of these.
    pub admitted_total: u64,
    /// From `submit` to first admission, summed.
    pub waiting_seconds_total: f64,
    /// Requests that found it on the device.
    pub device_hits_total: u64,
    /// Requests that did not.
    pub device_misses_total: u64,
    /// Prompt tokens of its requests.
    pub prompt_tokens_total: u64,
    /// Output tokens.
    pub output_tokens_total: u64,
}

/// An adapter's counters as the engine thread keeps them; read without stopping it.
#[derive(Debug, Default)]
pub(crate) struct AdapterCounters {
    pub running: AtomicU64,
    pub waiting: AtomicU64,
    pub requests: AtomicU64,
    pub admitted: AtomicU64,
    pub waiting_nanos: AtomicU64,
    pub hits: AtomicU64,
    pub misses: AtomicU64,
    pub prompt_tokens: AtomicU64,
    pub output_tokens: AtomicU64,
}

impl AdapterCounters {
    fn read(&self, name: &Arc<str>) -> AdapterStats {
        AdapterStats {
            name: name.clone(),
            running: self.running.load(Relaxed),
            waiting: self.waiting.load(Relaxed),
            requests_total: self.requests.load(Relaxed),
            admitted_total: self.admitted.load(Relaxed),
            waiting_seconds_total: Duration::from_nanos(self.waiting_nanos.load(Relaxed)).as_secs_f64(),
            device_hits_total: self.hits.load(Relaxed),
            device_misses_total: self.misses.load(Relaxed),
            prompt_tokens_total: self.prompt_tokens.load(Relaxed),
            output_tokens_total: self.output_tokens.load(Relaxed),
        }
    }
}

/// Names whose counters are kept; beyond that those of idle adapters begin anew.
const MAX_COUNTED_ADAPTERS: usize = 65_536;

/// The counters of all adapters. The engine thread takes the locks once per request, never in a step's middle.
#[derive(Debug, Default)]
pub(crate) struct AdapterTable {
    all: RwLock<BTreeMap<Arc<str>, Arc<AdapterCounters>>>,
    /// Of those, the ones that somebody counts in, and some that nobody does any more: with thousands of adapters, a scrape looks at a few.
    in_use: Mutex<BTreeMap<Arc<str>, Arc<AdapterCounters>>>,
}

impl AdapterTable {
    /// To be held for as long as the request is there.
    pub fn counters(&self, name: &Arc<str>) -> Arc<AdapterCounters> {
        let mut in_use = self.in_use.lock();
        if let Some(counters) = in_use.get(name) {
            return counters.clone();
        }
        let known = self.all.read().get(name).cloned();
        let counters = known.unwrap_or_else(|| {
            let mut all = self.all.write();
            if all.len() >= MAX_COUNTED_ADAPTERS {
                in_use.retain(|_, counters| is_held(counters));
                all.retain(|name, _| in_use.contains_key(name));
            }
            all.entry(name.clone()).or_default().clone()
        });
        in_use.insert(name.clone(), counters.clone());
        counters
    }

    pub fn read(&self) -> Vec<AdapterStats> {
        self.all.read().iter().map(|(name, counters)| counters.read(name)).collect()
    }

    /// Names with running sequences, and names with waiting requests only.
    pub fn busy(&self) -> (Vec<Arc<str>>, Vec<Arc<str>>) {
        let (mut running, mut waiting) = (Vec::new(), Vec::new());
        let mut in_use = self.in_use.lock();
        in_use.retain(|_, counters| is_held(counters));
        for (name, counters) in &*in_use {
            if counters.running.load(Relaxed) > 0 {
                running.push(name.clone());
            } else if counters.waiting.load(Relaxed) > 0 {
                waiting.push(name.clone());
            }
        }
        (running, waiting)
    }
}

/// Whether anybody but the table has them. Asked with `in_use` locked, through which others come to them.
fn is_held(counters: &Arc<AdapterCounters>) -> bool {
    Arc::strong_count(counters) > 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observation_counts_in_the_first_bucket_whose_bound_it_does_not_pass() {
        let mut histogram = Histogram::new(&[1.0, 2.0]);
        for value in [0.5, 1.0, 1.5, 2.5, 3.5] {
            histogram.observe(value);
        }
        assert_eq!(histogram.counts, [2, 1, 2]);
        assert_eq!((histogram.count(), histogram.sum), (5, 9.0));
    }

    #[test]
    fn adapters_are_listed_by_what_they_do() {
        let table = AdapterTable::default();
        let names = |names: Vec<Arc<str>>| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let busy = || {
            let (running, waiting) = table.busy();
            (names(running), names(waiting))
        };
        let requests: Vec<_> = [("b", 1, 1), ("a", 1, 0), ("idle", 0, 0), ("c", 0, 2)]
            .into_iter()
            .map(|(name, running, waiting)| {
                let counters = table.counters(&name.into());
                counters.running.store(running, Relaxed);
                counters.waiting.store(waiting, Relaxed);
                counters
            })
            .collect();
        let all = (vec!["a".to_owned(), "b".to_owned()], vec!["c".to_owned()]);
        assert_eq!(busy(), all);
        assert_eq!(busy(), all, "to look changes nothing");
        // A second request on one of them counts in the same place, and the place outlives both.
        let second = table.counters(&"c".into());
        assert!(Arc::ptr_eq(&second, &requests[3]));
        requests[..3].iter().for_each(|counters| counters.running.store(0, Relaxed));
        requests[1].requests.store(7, Relaxed);
        drop(requests);
        assert_eq!(busy(), (vec![], vec!["c".to_owned()]));
        second.waiting.store(0, Relaxed);
        drop(second);
        assert_eq!(busy(), (vec![], vec![]));
        assert!(table.in_use.lock().is_empty());
        assert_eq!(table.read().len(), 4);
        assert_eq!(table.counters(&"a".into()).requests.load(Relaxed), 7);
    }
}
