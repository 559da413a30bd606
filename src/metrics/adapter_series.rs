//! What is counted by adapter: the counters themselves, and which adapters have some of their own.
//!
//! **The rule.** At most `max_adapter_labels` adapters have a label. While there are fewer, each adapter gets one when it is first asked for.
//! When there are as many, the ones with the most *traffic* keep theirs: requests and tokens (prompt and output), of which half is forgotten
//! every [`HALF_LIFE`]. Traffic is looked at when the adapters' part of `/metrics` is written; an adapter without a label then takes the label
//! of the one with the least traffic, if it has more than [`LEAD`] times as much and the other has had it for [`MIN_TENURE`]. So series
//! don't flap, and traffic of thousands of names that are asked for once drives none out. An adapter that was only loaded gives its label up
//! to any that is asked for.
//!
//! **Sums.** A label's series begin at zero and only grow. What was counted before is in `(other)`, which only grows, too. Series of a label that
//! was lost vanish, and their counts are in `(former)` from then on, which leaps when that happens: left out of a rate. The sum over all
//! labels is the total at any time.
//!
//! **Cost.** A request looks its adapter up once, under a lock, and holds the counters: its tokens are counted by atomic additions. Names without a
//! label are weighed once a request, in a table of [`CONTENDERS_PER_LABEL`] names a label, however many there are.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use polylora_engine::{AdapterMoves, adapter::registry::COMBINATION_LABEL};

use super::{definitions::*, heavy_hitters::HeavyHitters, write_head, write_line};

/// Label value of the base model where adapters have their name.
pub const BASE_LABEL: &str = polylora_engine::stages::BASE_LABEL;
/// Label value shared by adapters without a label of their own.
pub const OTHER_LABEL: &str = "(other)";
/// Label value of what was counted under labels that were lost.
pub const FORMER_LABEL: &str = "(former)";
/// Label value of a request that runs on several adapters.
pub const SEVERAL_LABEL: &str = "(several)";

/// Half of the traffic counts after so long.
pub const HALF_LIFE: Duration = Duration::from_secs(3600);
/// A label is kept for at least so long by who is asked for.
pub const MIN_TENURE: Duration = Duration::from_secs(60);
/// Times as much traffic as somebody with a label.
pub const LEAD: f64 = 2.0;
/// Names without a label whose traffic is weighed, for each label.
pub const CONTENDERS_PER_LABEL: usize = 16;

/// A tier that adapters are looked for in, fastest first.
pub(super) const TIERS: [&str; 3] = ["device", "host", "disk"];

/// How a sequence ended, as far as metrics tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// End of sequence, stop token, stop string, complete constraint.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// Aborted, or the client went away.
    Abort,
    /// Failed.
    Error,
}

impl Outcome {
    pub(super) const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// A counter's place among an adapter's: the first of its metric's, by the second label.
type Place = usize;
const OUTCOMES: Place = 0;
const PROMPT: Place = 4;
const CACHED: Place = 5;
const OUTPUT: Place = 6;
const HITS: Place = 7;
const MISSES: Place = 10;
const LOADED: Place = 13;
const UPLOADED: Place = 15;
const EVICTED: Place = 16;
const NUM_COUNTERS: usize = 18;

/// The counters' metrics, where each begins, and the values of the second label.
const COUNTERS: [(Definition, Place, &[&str]); 9] = [
    (REQUESTS, OUTCOMES, &["stop", "length", "abort", "error"]),
    (PROMPT_TOKENS, PROMPT, &[]),
    (CACHED_TOKENS, CACHED, &[]),
    (OUTPUT_TOKENS, OUTPUT, &[]),
    (CACHE_HITS, HITS, &TIERS),
    (CACHE_MISSES, MISSES, &TIERS),
    (LOADS, LOADED, &["ok", "error"]),
    (ADAPTER_UPLOADS, UPLOADED, &[]),
    (EVICTIONS, EVICTED, &["device", "host"]),
];

/// The counters under one label.
pub(super) struct AdapterSeries {
    label: Arc<str>,
    counters: [AtomicU64; NUM_COUNTERS],
    waited_nanos: AtomicU64,
    /// By [`ADAPTER_TTFT_BUCKETS`], and one for those above.
    first_tokens: [AtomicU64; ADAPTER_TTFT_BUCKETS.len() + 1],
    first_token_nanos: AtomicU64,
    by_name: Mutex<CountsByName>,
}

/// Counts whose labels are not known beforehand, but few.
#[derive(Clone, Debug, Default, PartialEq)]
struct CountsByName {
    /// HTTP requests, by route and status.
    http: BTreeMap<Box<str>, BTreeMap<u16, u64>>,
    /// Requests that named an alias, by alias.
    aliases: BTreeMap<Arc<str>, u64>,
}

impl AdapterSeries {
    pub fn new(label: &str) -> Self {
        Self {
            label: label.into(),
            counters: Default::default(),
            waited_nanos: AtomicU64::new(0),
            first_tokens: Default::default(),
            first_token_nanos: AtomicU64::new(0),
            by_name: Mutex::default(),
        }
    }

    fn add(&self, place: Place, count: u64) {
        self.counters[place].fetch_add(count, Relaxed);
    }

    /// A prompt was computed.
    pub fn started(&self, prompt_tokens: u64, cached_tokens: u64) {
        self.add(PROMPT, prompt_tokens);
        self.add(CACHED, cached_tokens);
    }

    /// A token came.
    pub fn token(&self) {
        self.add(OUTPUT, 1);
    }

    /// The first one, so long after the request.
    pub fn first_token(&self, after: Duration) {
        let seconds = after.as_secs_f64();
        let bucket = ADAPTER_TTFT_BUCKETS.partition_point(|bound| *bound < seconds);
        self.first_tokens[bucket].fetch_add(1, Relaxed);
        self.first_token_nanos.fetch_add(after.as_nanos() as u64, Relaxed);
    }

    /// A request that was admitted had waited.
    pub fn waited(&self, time: Duration) {
        self.waited_nanos.fetch_add(time.as_nanos() as u64, Relaxed);
    }

    /// A sequence ended.
    pub fn ended(&self, outcome: Outcome) {
        self.add(OUTCOMES + outcome as usize, 1);
    }

    /// A request came, when the adapter was in this one of the [`TIERS`].
    pub fn found_in(&self, tier: usize) {
        (0..tier).for_each(|tier| self.add(MISSES + tier, 1));
        self.add(HITS + tier, 1);
    }

    /// It came or went.
    pub fn moved(&self, moves: &AdapterMoves) {
        self.add(LOADED, moves.loads);
        self.add(LOADED + 1, moves.load_failures);
        self.add(UPLOADED, moves.device_uploads);
        self.add(EVICTED, moves.device_evictions);
        self.add(EVICTED + 1, moves.host_evictions);
    }

    /// An HTTP request was answered.
    pub fn answered(&self, route: &str, status: u16) {
        let http = &mut self.by_name.lock().http;
        match http.get_mut(route) {
            Some(statuses) => *statuses.entry(status).or_default() += 1,
            None => drop(http.insert(route.into(), [(status, 1)].into())),
        }
    }

    /// So many requests named an alias and got this.
    pub fn chosen_by(&self, alias: &Arc<str>, requests: u64) {
        if requests > 0 {
            *self.by_name.lock().aliases.entry(Arc::clone(alias)).or_default() += requests;
        }
    }

    fn traffic(&self) -> u64 {
        let places = (OUTCOMES..=PROMPT).chain([OUTPUT]);
        places.map(|place| self.counters[place].load(Relaxed)).sum()
    }

    pub fn read(&self) -> Counts {
        let mut counts = Counts::none(&self.label);
        counts.add(self);
        counts
    }
}

/// The counts under one label, at one time.
#[derive(Clone)]
pub(super) struct Counts {
    label: Arc<str>,
    counters: [u64; NUM_COUNTERS],
    waited_nanos: u64,
    first_tokens: [u64; ADAPTER_TTFT_BUCKETS.len() + 1],
    first_token_nanos: u64,
    by_name: CountsByName,
}

impl Counts {
    fn none(label: &Arc<str>) -> Self {
        Self {
            label: Arc::clone(label),
            counters: Default::default(),
            waited_nanos: 0,
            first_tokens: Default::default(),
            first_token_nanos: 0,
            by_name: CountsByName::default(),
        }
    }

    fn add(&mut self, series: &AdapterSeries) {
        let sums = self.counters.iter_mut().chain(&mut self.first_tokens);
        for (sum, counter) in sums.zip(series.counters.iter().chain(&series.first_tokens)) {
            *sum += counter.load(Relaxed);
        }
        self.waited_nanos += series.waited_nanos.load(Relaxed);
        self.first_token_nanos += series.first_token_nanos.load(Relaxed);
        let by_name = series.by_name.lock();
        for (route, statuses) in &by_name.http {
            let sums = self.by_name.http.entry(route.clone()).or_default();
            for (status, count) in statuses {
                *sums.entry(*status).or_default() += count;
            }
        }
        for (alias, count) in &by_name.aliases {
            *self.by_name.aliases.entry(Arc::clone(alias)).or_default() += count;
        }
    }

    fn is_empty(&self) -> bool {
        let all = self.counters.iter().chain(&self.first_tokens).chain([&self.waited_nanos]);
        all.into_iter().all(|count| *count == 0) && self.by_name == CountsByName::default()
    }

    /// The base model is looked for nowhere, and neither comes nor goes.
    fn has(&self, place: Place) -> bool {
        place < HITS || *self.label != *BASE_LABEL
    }
}

/// Who has a label, and who may want one.
struct Labels {
    holders: HashMap<Arc<str>, Holder>,
    /// How many of them have only been loaded.
    unasked: usize,
    contenders: HeavyHitters,
    weighed_at: Instant,
    /// Series of lost labels that requests still count in.
    leaving: Vec<Arc<AdapterSeries>>,
    former: Counts,
}

struct Holder {
    series: Arc<AdapterSeries>,
    since: Instant,
    is_asked: bool,
    traffic: f64,
    /// What of the series' traffic is in `traffic`.
    weighed: u64,
}

/// The counters of all adapters, the base model and whatever else stands in the label `adapter`.
pub(super) struct AdapterCounters {
    max_labels: usize,
    labels: Mutex<Labels>,
    base: Arc<AdapterSeries>,
    others: Arc<AdapterSeries>,
    combinations: Arc<AdapterSeries>,
    several: Arc<AdapterSeries>,
    /// Requests that ran on nothing.
    nothing: Arc<AdapterSeries>,
}

/// Where something is counted.
pub(super) struct Counted {
    pub series: Arc<AdapterSeries>,
    /// It has no label.
    pub is_other: bool,
}

impl AdapterCounters {
    pub fn new(max_labels: usize) -> Self {
        let series = |label| Arc::new(AdapterSeries::new(label));
        Self {
            max_labels,
            labels: Mutex::new(Labels {
                holders: HashMap::new(),
                unasked: 0,
                contenders: HeavyHitters::new(max_labels.saturating_mul(CONTENDERS_PER_LABEL)),
                weighed_at: Instant::now(),
                leaving: Vec::new(),
                former: Counts::none(&FORMER_LABEL.into()),
            }),
            base: series(BASE_LABEL),
            others: series(OTHER_LABEL),
            combinations: series(COMBINATION_LABEL),
            several: series(SEVERAL_LABEL),
            nothing: series(""),
        }
    }

    /// Names that stand for more than one adapter, or none, have series that are always there.
    fn fixed(&self, name: Option<&str>) -> Option<&Arc<AdapterSeries>> {
        match name {
            None => Some(&self.nothing),
            Some(BASE_LABEL) => Some(&self.base),
            Some(COMBINATION_LABEL) => Some(&self.combinations),
            Some(SEVERAL_LABEL) => Some(&self.several),
            Some(_) => None,
        }
    }

    /// Where what is asked of an adapter is counted; of nothing, if no name is given.
    pub fn asked(&self, name: Option<&str>, now: Instant) -> Counted {
        self.find(name, now, true)
    }

    /// Where what it does unasked is counted.
    pub fn unasked(&self, name: &str, now: Instant) -> Arc<AdapterSeries> {
        self.find(Some(name), now, false).series
    }

    fn find(&self, name: Option<&str>, now: Instant, is_asked: bool) -> Counted {
        let own = |series: &Arc<AdapterSeries>| Counted {
            series: Arc::clone(series),
            is_other: false,
        };
        let (None, Some(name)) = (self.fixed(name), name) else {
            return own(self.fixed(name).unwrap_or(&self.nothing));
        };
        let mut labels = self.labels.lock();
        let labels = &mut *labels;
        if let Some(holder) = labels.holders.get_mut(name) {
            if is_asked && !holder.is_asked {
                (holder.is_asked, holder.since) = (true, now);
                labels.unasked -= 1;
            }
            return own(&holder.series);
        }
        if labels.holders.len() >= self.max_labels {
            if !is_asked || labels.unasked == 0 {
                return Counted {
                    series: Arc::clone(&self.others),
                    is_other: true,
                };
            }
            let unasked = labels.holders.iter().find(|(_, holder)| !holder.is_asked);
            let name = Arc::clone(unasked.expect("there are some").0);
            labels.take(&name);
        }
        own(labels.give(name.into(), now, is_asked, 0.0))
    }

    /// Something without a label had so much traffic.
    pub fn weigh(&self, name: &Arc<str>, traffic: u64) {
        let mut labels = self.labels.lock();
        match labels.holders.get_mut(name) {
            // Meanwhile it has one.
            Some(holder) => holder.traffic += traffic as f64,
            None => labels.contenders.add(name, traffic as f64),
        }
    }

    /// Gives labels to who has the traffic for them.
    pub fn settle(&self, now: Instant) {
        let mut labels = self.labels.lock();
        let age = now.saturating_duration_since(labels.weighed_at);
        labels.weighed_at = now.max(labels.weighed_at);
        let left = 0.5f64.powf(age.as_secs_f64() / HALF_LIFE.as_secs_f64());
        labels.contenders.scale(left);
        for holder in labels.holders.values_mut() {
            let weighed = holder.series.traffic();
            holder.traffic = (holder.traffic + (weighed - holder.weighed) as f64) * left;
            holder.weighed = weighed;
        }
        while let Some((loser, winner)) = labels.next_change(now) {
            let traffic = labels.take(&loser);
            labels.contenders.add(&loser, traffic);
            let traffic = labels.contenders.remove(&winner);
            labels.give(winner, now, true, traffic);
        }
        labels.let_go();
    }

    /// Those of `names` that have a label of their own, fixed ones included.
    pub fn labelled<'n>(&self, names: impl Iterator<Item = &'n str>) -> BTreeSet<&'n str> {
        let labels = self.labels.lock();
        names
            .filter(|name| self.fixed(Some(name)).is_some() || labels.holders.contains_key(*name))
            .collect()
    }

    /// Forgets what was counted for aliases that are no more.
    pub fn retain_aliases(&self, exists: impl Fn(&str) -> bool) {
        let mut labels = self.labels.lock();
        let labels = &mut *labels;
        labels.former.by_name.aliases.retain(|alias, _| exists(alias));
        let held = labels.holders.values().map(|holder| &holder.series);
        for series in held.chain(&labels.leaving).chain([&self.others, &self.combinations]) {
            series.by_name.lock().aliases.retain(|alias, _| exists(alias));
        }
    }

    /// Everything, by label: those that are always there first, then by name.
    pub fn read(&self) -> Vec<Counts> {
        let labels = self.labels.lock();
        let mut former = labels.former.clone();
        labels.leaving.iter().for_each(|series| former.add(series));
        let mut held: Vec<Counts> = labels.holders.values().map(|holder| holder.series.read()).collect();
        held.sort_unstable_by(|a, b| a.label.cmp(&b.label));
        let there_if_used = [former, self.combinations.read(), self.several.read(), self.nothing.read()];
        [self.base.read(), self.others.read()]
            .into_iter()
            .chain(there_if_used.into_iter().filter(|counts| !counts.is_empty()))
            .chain(held)
            .collect()
    }
}

impl Labels {
    fn give(&mut self, name: Arc<str>, now: Instant, is_asked: bool, traffic: f64) -> &Arc<AdapterSeries> {
        let holder = Holder {
            series: Arc::new(AdapterSeries::new(&name)),
            since: now,
            is_asked,
            traffic,
            weighed: 0,
        };
        self.unasked += usize::from(!is_asked);
        &self.holders.entry(name).insert_entry(holder).into_mut().series
    }

    /// Takes a label away; the traffic of who had it.
    fn take(&mut self, name: &str) -> f64 {
        let Some(holder) = self.holders.remove(name) else { return 0.0 };
        self.unasked -= usize::from(!holder.is_asked);
        self.leaving.push(holder.series);
        holder.traffic
    }

    /// Who should lose a label, and to whom.
    fn next_change(&self, now: Instant) -> Option<(Arc<str>, Arc<str>)> {
        let (winner, traffic) = self.contenders.heaviest()?;
        let is_settled = |holder: &Holder| !holder.is_asked || now.saturating_duration_since(holder.since) >= MIN_TENURE;
        let settled = self.holders.iter().filter(|(_, holder)| is_settled(holder));
        let (loser, holder) = settled.min_by(|(_, a), (_, b)| a.traffic.total_cmp(&b.traffic))?;
        // One request at least: what is left of an old one is no traffic.
        (traffic >= 1.0 && traffic > LEAD * holder.traffic).then(|| (Arc::clone(loser), Arc::clone(winner)))
    }

    /// Adds up what nobody counts in any more.
    fn let_go(&mut self) {
        for series in std::mem::take(&mut self.leaving) {
            match Arc::try_unwrap(series) {
                Ok(series) => self.former.add(&series),
                Err(series) => self.leaving.push(series),
            }
        }
    }
}

/// Everything but the aliases, as text; `model` is the label of requests that ran on something.
pub(super) fn write_counts(text: &mut String, all: &[Counts], model: &str) {
    write_http(text, all, model);
    // What ran on nothing or on several has an answer, and no sequence.
    let by_adapter: Vec<&Counts> = all.iter().filter(|counts| !["", SEVERAL_LABEL].contains(&&*counts.label)).collect();
    for (definition, first, values) in &COUNTERS {
        write_head(text, definition, "counter");
        for counts in by_adapter.iter().filter(|counts| counts.has(*first)) {
            if values.is_empty() {
                write_line(text, definition, "", &[&counts.label], None, counts.counters[*first]);
            }
            for (value, count) in values.iter().zip(&counts.counters[*first..]) {
                write_line(text, definition, "", &[&counts.label, value], None, count);
            }
        }
    }
    write_head(text, &ADAPTER_WAITED, "counter");
    for counts in &by_adapter {
        let seconds = Duration::from_nanos(counts.waited_nanos).as_secs_f64();
        write_line(text, &ADAPTER_WAITED, "", &[&counts.label], None, seconds);
    }
    write_head(text, &ADAPTER_TTFT, "histogram");
    for counts in &by_adapter {
        write_first_tokens(text, counts);
    }
}

fn write_http(text: &mut String, all: &[Counts], model: &str) {
    if all.iter().all(|counts| counts.by_name.http.is_empty()) {
        return;
    }
    write_head(text, &HTTP_REQUESTS, "counter");
    for counts in all {
        let model = if counts.label.is_empty() { "" } else { model };
        for (route, statuses) in &counts.by_name.http {
            for (status, count) in statuses {
                let labels = [route, model, &counts.label, &status.to_string()];
                write_line(text, &HTTP_REQUESTS, "", &labels, None, count);
            }
        }
    }
}

fn write_first_tokens(text: &mut String, counts: &Counts) {
    let mut sum = 0;
    let bounds = ADAPTER_TTFT_BUCKETS.iter().copied().chain([f64::INFINITY]);
    for (bound, count) in bounds.zip(&counts.first_tokens) {
        sum += count;
        write_line(text, &ADAPTER_TTFT, "_bucket", &[&counts.label], Some(bound), sum);
    }
    let seconds = Duration::from_nanos(counts.first_token_nanos).as_secs_f64();
    write_line(text, &ADAPTER_TTFT, "_sum", &[&counts.label], None, seconds);
    write_line(text, &ADAPTER_TTFT, "_count", &[&counts.label], None, sum);
}

/// Requests by alias and by the label of the adapter that it chose, those without one of both counted at 0 where they are named in `known`.
pub(super) fn alias_counts(all: &[Counts], known: impl Iterator<Item = (Arc<str>, Arc<str>)>) -> BTreeMap<(Arc<str>, Arc<str>), u64> {
    let mut by_alias: BTreeMap<(Arc<str>, Arc<str>), u64> = known.map(|labels| (labels, 0)).collect();
    for counts in all {
        for (alias, count) in &counts.by_name.aliases {
            *by_alias.entry((Arc::clone(alias), Arc::clone(&counts.label))).or_default() += count;
        }
    }
    by_alias
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A whole request, of so many tokens.
    fn ask(counters: &AdapterCounters, name: &str, tokens: u64, now: Instant) {
        end(counters, begin(counters, name, now), tokens);
    }

    struct Running {
        name: Arc<str>,
        counted: Counted,
    }

    fn begin(counters: &AdapterCounters, name: &str, now: Instant) -> Running {
        Running {
            name: name.into(),
            counted: counters.asked(Some(name), now),
        }
    }

    fn end(counters: &AdapterCounters, running: Running, tokens: u64) {
        count(&running.counted.series, tokens);
        if running.counted.is_other {
            counters.weigh(&running.name, 1 + tokens);
        }
    }

    fn count(series: &AdapterSeries, tokens: u64) {
        series.started(tokens, 1);
        series.waited(Duration::from_nanos(tokens));
        series.first_token(Duration::from_millis(tokens));
        series.answered("/generate", 200);
        series.ended(Outcome::Stop);
    }

    fn labels(counters: &AdapterCounters) -> BTreeSet<String> {
        let all = counters.read().into_iter().map(|counts| counts.label.to_string());
        all.filter(|label| !label.starts_with('(')).collect()
    }

    #[derive(Clone, Debug)]
    enum Op {
        Begin(u8),
        End(usize, u8),
        Moved(u8),
        Chosen(u8),
        Wait(u16),
        Settle,
    }

    /// Few names that are asked for often, many that are not; who is who changes.
    fn op() -> impl Strategy<Value = Op> {
        let name = || prop_oneof![0..6u8, 6..12u8, any::<u8>()];
        prop_oneof![
            8 => name().prop_map(Op::Begin),
            8 => (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(index, tokens)| Op::End(index.index(1 << 16), tokens)),
            1 => name().prop_map(Op::Moved),
            1 => name().prop_map(Op::Chosen),
            2 => (0..4000u16).prop_map(Op::Wait),
            3 => Just(Op::Settle),
        ]
    }

    /// All that only grows, of one label.
    fn flat(counts: &Counts) -> Vec<u64> {
        let http = counts.by_name.http.values().flat_map(|statuses| statuses.values()).sum();
        let chosen = counts.by_name.aliases.values().sum();
        let rest = [counts.waited_nanos, counts.first_token_nanos, http, chosen];
        counts.counters.into_iter().chain(counts.first_tokens).chain(rest).collect()
    }

    proptest! {
        #[test]
        fn series_only_grow_and_sum_to_everything_whoever_has_a_label(ops in prop::collection::vec(op(), 1..300), max_labels in 0..5usize) {
            let counters = AdapterCounters::new(max_labels);
            // What there is to be counted, as one label would have it.
            let all = AdapterSeries::new("all");
            let alias: Arc<str> = "alias".into();
            let mut now = Instant::now();
            let mut running: Vec<Running> = Vec::new();
            let mut before: BTreeMap<Arc<str>, Vec<u64>> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Begin(name) => running.push(begin(&counters, &name.to_string(), now)),
                    Op::End(index, tokens) if !running.is_empty() => {
                        let request = running.swap_remove(index % running.len());
                        end(&counters, request, tokens.into());
                        count(&all, tokens.into());
                    }
                    Op::End(..) => {}
                    Op::Moved(name) => {
                        let moves = AdapterMoves { loads: 1, host_evictions: 2, ..AdapterMoves::default() };
                        counters.unasked(&name.to_string(), now).moved(&moves);
                        all.moved(&moves);
                    }
                    Op::Chosen(name) => {
                        counters.unasked(&name.to_string(), now).chosen_by(&alias, 3);
                        all.chosen_by(&alias, 3);
                    }
                    Op::Wait(time) => now += seconds(time.into()),
                    Op::Settle => counters.settle(now),
                }
                let read = counters.read();
                prop_assert!(labels(&counters).len() <= max_labels);
                let mut sum = vec![0; flat(&all.read()).len()];
                let mut after = BTreeMap::new();
                for counts in &read {
                    let flat = flat(counts);
                    sum.iter_mut().zip(&flat).for_each(|(sum, count)| *sum += count);
                    if let Some(before) = before.get(&counts.label) {
                        prop_assert!(before.iter().zip(&flat).all(|(before, now)| before <= now), "{}", counts.label);
                    } else if !counts.label.starts_with('(') {
                        prop_assert!(flat.iter().sum::<u64>() <= 4, "{} begins at nothing, or with what was just counted", counts.label);
                    }
                    prop_assert!(after.insert(Arc::clone(&counts.label), flat).is_none(), "{} is there twice", counts.label);
                }
                for gone in before.keys().filter(|label| !after.contains_key(*label)) {
                    prop_assert!(!gone.starts_with('('), "{} vanished", gone);
                }
                prop_assert_eq!(sum, flat(&all.read()));
                before = after;
            }
            let held = running.len();
            counters.settle(now);
            prop_assert!(counters.labels.lock().leaving.len() <= held, "no more is kept than requests hold");
        }

        #[test]
        fn nobody_without_a_label_has_much_more_traffic_than_one_with(
            rounds in prop::collection::vec(prop::collection::vec((0..40u8, 1..500u64), 0..30), 1..30),
            pause in 1..600u64,
        ) {
            const LABELS: usize = 4;
            let counters = AdapterCounters::new(LABELS);
            let mut now = Instant::now();
            let mut traffic: BTreeMap<String, f64> = BTreeMap::new();
            for round in rounds {
                for (name, tokens) in round {
                    // Names of low number are asked for more.
                    let name = (name / 8 * (name % 8)).to_string();
                    ask(&counters, &name, tokens, now);
                    *traffic.entry(name).or_default() += 1.0 + tokens as f64;
                }
                now += seconds(pause);
                counters.settle(now);
                let left = 0.5f64.powf(pause as f64 / HALF_LIFE.as_secs_f64());
                traffic.values_mut().for_each(|traffic| *traffic *= left);
                let labels = labels(&counters);
                prop_assert_eq!(labels.len(), traffic.len().min(LABELS));
                let tenured: Vec<f64> = {
                    let held = counters.labels.lock();
                    let tenured = held.holders.iter().filter(|(_, holder)| now - holder.since >= MIN_TENURE);
                    tenured.map(|(name, _)| traffic[&**name]).collect()
                };
                let least = tenured.into_iter().fold(f64::INFINITY, f64::min);
                for (name, traffic) in traffic.iter().filter(|(name, _)| !labels.contains(*name)) {
                    prop_assert!(*traffic <= LEAD * least * 1.000001 || *traffic < 1.0, "{} has {}, somebody with a label {}", name, traffic, least);
                }
            }
        }
    }

    #[test]
    fn names_that_are_all_asked_for_alike_do_not_take_turns() {
        let counters = AdapterCounters::new(8);
        let start = Instant::now();
        let ask_all = |minute: u64| {
            (0..1000).for_each(|name| ask(&counters, &name.to_string(), 100, start + seconds(60 * minute)));
            counters.settle(start + seconds(60 * minute + 30));
            labels(&counters)
        };
        let first = ask_all(0);
        assert_eq!(first.len(), 8);
        for minute in 1..240 {
            assert_eq!(ask_all(minute), first, "minute {minute}");
        }
        assert!(counters.labels.lock().holders.len() <= 8);
    }

    #[test]
    fn one_that_becomes_busy_among_ten_thousand_names_gets_a_label_and_keeps_it_in_a_pause() {
        let counters = AdapterCounters::new(8);
        let start = Instant::now();
        for name in 0..10_000 {
            ask(&counters, &name.to_string(), 10, start);
        }
        for name in 10_000..20_000 {
            ask(&counters, &name.to_string(), 10, start);
            if name % 100 == 0 {
                ask(&counters, "busy", 10, start);
            }
        }
        counters.settle(start + seconds(30));
        assert!(!labels(&counters).contains("busy"), "the others have just got theirs");
        counters.settle(start + seconds(60));
        assert!(labels(&counters).contains("busy"));
        let series = counters.asked(Some("busy"), start + seconds(60)).series;
        assert_eq!(series.traffic(), 0, "what it had is in (other)");
        // Nobody asks for it for an hour, and the others go on.
        for minute in 1..60 {
            for name in 0..1000 {
                ask(&counters, &name.to_string(), 10, start + seconds(60 * minute));
            }
            counters.settle(start + seconds(60 * minute + 60));
        }
        assert!(labels(&counters).contains("busy"));
    }

    #[test]
    fn a_label_that_was_given_for_a_load_goes_to_who_is_asked_for() {
        let counters = AdapterCounters::new(1);
        let now = Instant::now();
        counters.unasked("loaded", now).moved(&AdapterMoves {
            loads: 1,
            ..AdapterMoves::default()
        });
        assert!(counters.unasked("also loaded", now).label == OTHER_LABEL.into());
        ask(&counters, "asked", 1, now);
        assert_eq!(labels(&counters), ["asked".to_owned()].into());
        counters.settle(now);
        let former = counters.read().into_iter().find(|counts| *counts.label == *FORMER_LABEL);
        assert_eq!(former.expect("a label was lost").counters[LOADED], 1);
    }
}
