//! [`FairQueue`]: whose turn it is among the waiting requests.
//!
//! Requests are sorted into *flows*, one per adapter version and fairness key. Each flow counts the tokens that it was served, and the
//! flow served least goes first; a flow that was idle starts at the count of the least served active one, so that it neither owes nor
//! is owed for the past. This is the virtual token counter of Sheng et al., arXiv:2401.00588 (fair queueing on tokens). Deficit round
//! robin bounds the same difference between flows by a quantum per round; counters need no quantum, and make admission order a sorted set.
//!
//! Counters alone let an endless supply of fresh flows overtake an old request. So each waiting request also remembers how many
//! requests were taken before it: past [`FairQueue::overtake_limit`] it is overdue, and overdue ones get every second turn.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    ops::Bound::{Excluded, Unbounded},
    sync::Arc,
};

use crate::{adapter::VersionId, request::RequestId};

/// What requests are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// The adapter; `None` is the base model.
    pub adapter: Option<VersionId>,
    /// The tenant.
    pub fairness_key: Arc<str>,
}

/// A flow's place in the queue's memory, reused after the flow is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowIdx(usize);

/// Where a walk over the waiting flows has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Turn {
    served: u64,
    arrival: u64,
    flow: FlowIdx,
}

#[derive(Debug)]
struct Waiting {
    arrival: u64,
    request_id: RequestId,
    /// `FairQueue::taken` when it began to wait.
    taken_before: u64,
}

#[derive(Debug)]
struct Flow {
    key: FlowKey,
    served: u64,
    /// Served since the sorted sets last heard of it.
    unsettled: u64,
    /// By arrival.
    waiting: VecDeque<Waiting>,
    running: usize,
}

impl Flow {
    fn is_active(&self) -> bool {
        self.running > 0 || !self.waiting.is_empty()
    }
}

/// Decode serves one token at a time; the sorted sets are told of so many at once.
const SETTLE_TOKENS: u64 = 16;
/// Idle flows whose counters are kept, beside as many as there are active ones.
const IDLE_FLOWS_KEPT: usize = 1024;

/// The waiting requests, in fair order. See the module.
#[derive(Debug)]
pub struct FairQueue {
    flows: Vec<Option<Flow>>,
    vacant: Vec<FlowIdx>,
    by_key: HashMap<FlowKey, FlowIdx>,
    /// Flows with waiting requests: least served first, then the one whose first request arrived first.
    turns: BTreeSet<Turn>,
    /// Active flows.
    active: BTreeSet<(u64, FlowIdx)>,
    /// Flows with waiting requests, by `taken_before` of their first.
    ages: BTreeSet<(u64, FlowIdx)>,
    num_waiting: usize,
    taken: u64,
    overtake_limit: u64,
}

impl FairQueue {
    /// Empty. See the module for `overtake_limit`.
    pub fn new(overtake_limit: u64) -> Self {
        Self {
            flows: Vec::new(),
            vacant: Vec::new(),
            by_key: HashMap::new(),
            turns: BTreeSet::new(),
            active: BTreeSet::new(),
            ages: BTreeSet::new(),
            num_waiting: 0,
            taken: 0,
            overtake_limit,
        }
    }

    /// Waiting requests.
    pub fn len(&self) -> usize {
        self.num_waiting
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.num_waiting == 0
    }

    /// Requests taken so far: the clock that waiting is measured by.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// A request may be overtaken by so many before it is overdue.
    pub fn overtake_limit(&self) -> u64 {
        self.overtake_limit
    }

    /// Adds a request at its place by arrival within its flow.
    pub fn push(&mut self, key: FlowKey, arrival: u64, request_id: RequestId) {
        let flow_idx = self.flow_idx(key);
        self.insert_waiting(flow_idx, arrival, request_id);
    }

    /// The flow whose turn is next after `after` (from the start with `None`), and its first request.
    pub fn next_turn(&self, after: Option<Turn>) -> Option<(Turn, RequestId)> {
        let turn = match after {
            None => self.turns.first(),
            Some(turn) => self.turns.range((Excluded(turn), Unbounded)).next(),
        }?;
        Some((*turn, self.first_waiting(turn.flow)))
    }

    /// The first request of the flow that has been overtaken most, if that one is overdue and this turn goes to overdue ones.
    pub fn overdue_turn(&self) -> Option<(Turn, RequestId)> {
        let (taken_before, flow_idx) = self.ages.first()?;
        let is_overdue = self.taken - taken_before > self.overtake_limit && self.taken.is_multiple_of(2);
        is_overdue.then(|| (self.turn(*flow_idx), self.first_waiting(*flow_idx)))
    }

    /// Takes the first request of the flow whose turn it is; from now on it runs. `tokens` are the ones that it costs to begin.
    pub fn take(&mut self, turn: Turn, tokens: u64) -> RequestId {
        self.unlist(turn.flow);
        let flow = self.flow_mut(turn.flow);
        let request_id = flow.waiting.pop_front().expect("a flow with a turn has a waiting request").request_id;
        flow.running += 1;
        flow.served += flow.unsettled + tokens;
        flow.unsettled = 0;
        self.list(turn.flow);
        self.num_waiting -= 1;
        self.taken += 1;
        request_id
    }

    /// A running request of `key` goes back to waiting.
    pub fn push_back(&mut self, key: &FlowKey, arrival: u64, request_id: RequestId) {
        let flow_idx = self.by_key[key];
        self.insert_waiting(flow_idx, arrival, request_id);
        self.end_running(key);
    }

    /// A running request of `key` has ended.
    pub fn end_running(&mut self, key: &FlowKey) {
        let flow_idx = self.by_key[key];
        self.unlist(flow_idx);
        let flow = self.flow_mut(flow_idx);
        assert!(flow.running > 0, "only a running request ends");
        flow.running -= 1;
        self.list(flow_idx);
        self.forget_idle_flows();
    }

    /// Forgets a waiting request of `key`.
    pub fn remove_waiting(&mut self, key: &FlowKey, request_id: RequestId) {
        let flow_idx = self.by_key[key];
        self.unlist(flow_idx);
        let flow = self.flow_mut(flow_idx);
        let place = flow.waiting.iter().position(|waiting| waiting.request_id == request_id);
        flow.waiting.remove(place.expect("a waiting request is in its flow"));
        self.num_waiting -= 1;
        self.list(flow_idx);
        self.forget_idle_flows();
    }

    /// Counts output tokens of a running request of `key`.
    pub fn charge(&mut self, key: &FlowKey, tokens: u64) {
        let flow_idx = self.by_key[key];
        let flow = self.flow_mut(flow_idx);
        flow.unsettled += tokens;
        if flow.unsettled >= SETTLE_TOKENS {
            self.unlist(flow_idx);
            let flow = self.flow_mut(flow_idx);
            flow.served += std::mem::take(&mut flow.unsettled);
            self.list(flow_idx);
        }
    }

    fn flow_idx(&mut self, key: FlowKey) -> FlowIdx {
        if let Some(flow_idx) = self.by_key.get(&key) {
            return *flow_idx;
        }
        let flow = Some(Flow {
            key: key.clone(),
            served: 0,
            unsettled: 0,
            waiting: VecDeque::new(),
            running: 0,
        });
        let flow_idx = self.vacant.pop().unwrap_or_else(|| {
            self.flows.push(None);
            FlowIdx(self.flows.len() - 1)
        });
        self.flows[flow_idx.0] = flow;
        self.by_key.insert(key, flow_idx);
        flow_idx
    }

    fn insert_waiting(&mut self, flow_idx: FlowIdx, arrival: u64, request_id: RequestId) {
        self.unlist(flow_idx);
        let least_served = self.active.first().map(|(served, _)| *served);
        let taken_before = self.taken;
        let flow = self.flow_mut(flow_idx);
        if !flow.is_active() {
            flow.served = flow.served.max(least_served.unwrap_or(0));
        }
        let place = flow.waiting.partition_point(|waiting| waiting.arrival < arrival);
        let waiting = Waiting {
            arrival,
            request_id,
            taken_before,
        };
        flow.waiting.insert(place, waiting);
        self.num_waiting += 1;
        self.list(flow_idx);
    }

    fn flow(&self, flow_idx: FlowIdx) -> &Flow {
        self.flows[flow_idx.0].as_ref().expect("an index names a flow until it is forgotten")
    }

    fn flow_mut(&mut self, flow_idx: FlowIdx) -> &mut Flow {
        self.flows[flow_idx.0].as_mut().expect("an index names a flow until it is forgotten")
    }

    fn turn(&self, flow_idx: FlowIdx) -> Turn {
        let flow = self.flow(flow_idx);
        Turn {
            served: flow.served,
            arrival: flow.waiting[0].arrival,
            flow: flow_idx,
        }
    }

    fn first_waiting(&self, flow_idx: FlowIdx) -> RequestId {
        self.flow(flow_idx).waiting[0].request_id
    }

    /// Takes a flow out of the sorted sets, before anything that they sort by changes.
    fn unlist(&mut self, flow_idx: FlowIdx) {
        let flow = self.flow(flow_idx);
        if flow.is_active() {
            let served = flow.served;
            let first = flow.waiting.front().map(|waiting| waiting.taken_before);
            self.active.remove(&(served, flow_idx));
            if let Some(taken_before) = first {
                self.turns.remove(&self.turn(flow_idx));
                self.ages.remove(&(taken_before, flow_idx));
            }
        }
    }

    /// Puts it back.
    fn list(&mut self, flow_idx: FlowIdx) {
        let flow = self.flow(flow_idx);
        if flow.is_active() {
            let served = flow.served;
            let first = flow.waiting.front().map(|waiting| waiting.taken_before);
            self.active.insert((served, flow_idx));
            if let Some(taken_before) = first {
                self.turns.insert(self.turn(flow_idx));
                self.ages.insert((taken_before, flow_idx));
            }
        }
    }

    /// Counters of idle flows matter only while they are above the least served active one's.
    fn forget_idle_flows(&mut self) {
        if !self.active.is_empty() && self.by_key.len() <= 2 * self.active.len() + IDLE_FLOWS_KEPT {
            return;
        }
        for index in 0..self.flows.len() {
            if let Some(flow) = self.flows[index].take_if(|flow| !flow.is_active()) {
                self.by_key.remove(&flow.key);
                self.vacant.push(FlowIdx(index));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> FlowKey {
        FlowKey {
            adapter: None,
            fairness_key: name.into(),
        }
    }

    fn take_next(queue: &mut FairQueue, tokens: u64) -> u64 {
        let (turn, _) = queue.overdue_turn().or_else(|| queue.next_turn(None)).expect("somebody waits");
        queue.take(turn, tokens).0
    }

    #[test]
    fn equal_flows_take_turns_and_a_flow_is_first_come_first_served() {
        let mut queue = FairQueue::new(1000);
        for arrival in 0..4 {
            queue.push(key("hot"), arrival, RequestId(arrival));
        }
        queue.push(key("cold"), 4, RequestId(4));
        queue.push(key("cold"), 5, RequestId(5));
        let order: Vec<u64> = (0..6).map(|_| take_next(&mut queue, 10)).collect();
        assert_eq!(order, [0, 4, 1, 5, 2, 3]);
        assert!(queue.is_empty());
    }

    #[test]
    fn output_tokens_count_too() {
        let mut queue = FairQueue::new(1000);
        for arrival in 0..3 {
            queue.push(key("long answers"), arrival, RequestId(arrival));
        }
        for arrival in 3..8 {
            queue.push(key("short answers"), arrival, RequestId(arrival));
        }
        assert_eq!(take_next(&mut queue, 10), 0);
        queue.charge(&key("long answers"), 35);
        let order: Vec<u64> = (0..5).map(|_| take_next(&mut queue, 10)).collect();
        assert_eq!(
            order,
            [3, 4, 5, 6, 7],
            "45 tokens were served to one flow, 40 to the other before its last request"
        );
    }

    #[test]
    fn an_idle_flow_is_not_owed_for_the_past() {
        let mut queue = FairQueue::new(1000);
        queue.push(key("busy"), 0, RequestId(0));
        queue.push(key("busy"), 1, RequestId(1));
        assert_eq!(take_next(&mut queue, 1_000_000), 0);
        for arrival in 2..6 {
            queue.push(key("late"), arrival, RequestId(arrival));
        }
        let order: Vec<u64> = (0..3).map(|_| take_next(&mut queue, 10)).collect();
        assert_eq!(order, [1, 2, 3], "the late flow starts level with the busy one");
    }

    #[test]
    fn fresh_flows_without_end_overtake_a_request_only_so_often() {
        let mut queue = FairQueue::new(10);
        queue.push(key("old"), 0, RequestId(0));
        queue.push(key("other"), 1, RequestId(1));
        let (turn, _) = queue.next_turn(None).expect("it waits");
        queue.take(turn, 1_000);
        queue.push_back(&key("old"), 0, RequestId(0));
        let mut arrival = 2;
        let mut overtaken = 0;
        while take_next(&mut queue, 1) != 0 {
            queue.push(key(&format!("fresh {arrival}")), arrival, RequestId(arrival));
            arrival += 1;
            overtaken += 1;
            assert!(overtaken <= 12, "overtaken {overtaken} times");
        }
        assert!(
            overtaken >= 10,
            "only overdue requests are preferred, this one was overtaken {overtaken} times"
        );
    }

    #[test]
    fn idle_flows_are_forgotten_in_the_end() {
        let mut queue = FairQueue::new(1000);
        queue.push(key("always there"), 0, RequestId(0));
        for arrival in 1..10_000 {
            let flow = key(&arrival.to_string());
            queue.push(flow.clone(), arrival, RequestId(arrival));
            queue.remove_waiting(&flow, RequestId(arrival));
        }
        assert!(queue.by_key.len() <= IDLE_FLOWS_KEPT + 4 && queue.flows.len() <= IDLE_FLOWS_KEPT + 4);
        queue.remove_waiting(&key("always there"), RequestId(0));
        assert_eq!(queue.by_key.len(), 0);
    }

    #[test]
    fn a_walk_visits_each_waiting_flow_once() {
        let mut queue = FairQueue::new(1000);
        for arrival in 0..5 {
            queue.push(key(&(arrival % 3).to_string()), arrival, RequestId(arrival));
        }
        let mut visited = Vec::new();
        let mut cursor = None;
        while let Some((turn, request_id)) = queue.next_turn(cursor) {
            visited.push(request_id.0);
            cursor = Some(turn);
        }
        assert_eq!(visited, [0, 1, 2]);
    }
}
