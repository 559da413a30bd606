//! [`FairQueue`]: whose turn it is among the waiting requests.
//!
//! Requests are sorted into *flows*, one per adapter version and fairness key, and flows are served by deficit round robin over tokens
//! (Shreedhar and Varghese, SIGCOMM 1995). They stand in a ring; each may have a *quantum* of tokens a round, `Q`, and the one whose turn
//! it is goes on until it has had it, so requests of one adapter are taken in a row. What a request costs is known only when it has ended:
//! its prompt counts when it is taken, its output as it is made. What a flow had beyond its quantum is taken off its next ones (surplus
//! round robin). So a flow's tokens, counted from the start, say which round it is in: `served / Q`. Its turn is the first of the sorted
//! set of `(round, place in the ring)`, and a round that it must sit out for its debts costs nobody a look at it.
//!
//! A flow that had nothing waiting is owed nothing for that time: when it comes again, it begins with the lowest round that waits, or later
//! if it has had more. If it has had nothing of that round yet, it is *new* in it: the new flows of a round go first, by their coming, and then
//! stand at the end of the ring (as in FQ-CoDel, RFC 8290). An adapter that is asked for now and then is served at once, beside any number
//! of busy ones; it gains no tokens by that, only their order.
//!
//! **Bounds** for flows whose adapters are there, with `n` flows, the costliest prompt `P`, and `U` the most tokens that requests of one flow
//! come to that run together:
//! - A flow that waits is behind no other by `Q + U` tokens or more. The other was last taken from in a round no later than this one's, so it
//!   had less than `Q` more before; since then at most its running requests are counted.
//! - Let a request become the first of its flow when `v` is the lowest round, and be taken in round `r`. Meanwhile each other flow has fewer
//!   than `(r - v + 1) * Q + P` tokens of prompts taken: it is taken from in rounds `v` to `r` alone, and only the last prompt passes the end
//!   of `r`. For a flow that owes nothing, that is `(n - 1) * (Q + P)` in all; if it is new, only flows that were new before it count.
//! - `r - v` is what the flow owes: less than `U / Q + 1` rounds.
//!
//! `n` has no bound itself: an endless supply of fresh flows could keep a round from ending. So a flow that waits while more requests than
//! [`FairQueue::overtake_limit`] are taken from others is overdue, and every second turn is that of the flow overdue for longest: others have no
//! more than `overtake_limit + 2 * n` turns in a row, where `n` flows wait. Such a turn does not ask what the flow owes: the bounds above are for as
//! long as there is none.

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

/// Where a walk over the waiting flows has come to. A flow keeps it until its quantum is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Turn {
    round: u64,
    /// New ones go first.
    is_old: bool,
    place: u64,
    flow: FlowIdx,
}

#[derive(Debug)]
struct Waiting {
    arrival: u64,
    request_id: RequestId,
}

#[derive(Debug)]
struct Flow {
    key: FlowKey,
    /// Tokens.
    served: u64,
    /// In the ring.
    place: u64,
    /// The round that it came new in.
    new_in: u64,
    /// `FairQueue::taken` when it last had a turn, or began to wait.
    taken_before: u64,
    /// By arrival.
    waiting: VecDeque<Waiting>,
    running: usize,
}

impl Flow {
    fn is_active(&self) -> bool {
        self.running > 0 || !self.waiting.is_empty()
    }
}

/// Idle flows whose counts are kept, beside as many as there are active ones.
const IDLE_FLOWS_KEPT: usize = 1024;

/// The waiting requests, in fair order. Each operation takes a time logarithmic in the number of flows (on average: forgetting idle ones takes longer,
/// and seldom is), and one that removes a waiting request a look at those of its flow. See the module.
#[derive(Debug)]
pub struct FairQueue {
    quantum: u64,
    flows: Vec<Option<Flow>>,
    vacant: Vec<FlowIdx>,
    by_key: HashMap<FlowKey, FlowIdx>,
    /// Flows with waiting requests.
    turns: BTreeSet<Turn>,
    /// The same, by `taken_before`.
    ages: BTreeSet<(u64, FlowIdx)>,
    /// The lowest round that waits, or the last that did.
    round: u64,
    /// The end of the ring.
    next_place: u64,
    num_active: usize,
    num_waiting: usize,
    taken: u64,
    overtake_limit: u64,
}

impl FairQueue {
    /// Empty. `quantum` is in tokens, at least 1; see the module for both.
    pub fn new(quantum: u64, overtake_limit: u64) -> Self {
        assert!(quantum > 0, "nobody would ever be served");
        Self {
            quantum,
            flows: Vec::new(),
            vacant: Vec::new(),
            by_key: HashMap::new(),
            turns: BTreeSet::new(),
            ages: BTreeSet::new(),
            round: 0,
            next_place: 0,
            num_active: 0,
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

    /// So many requests may be taken from others before a waiting flow is overdue.
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

    /// The flow that has waited longest for a turn and its first request, if it is overdue and this turn goes to overdue ones.
    pub fn overdue_turn(&self) -> Option<(Turn, RequestId)> {
        let (taken_before, flow_idx) = self.ages.first()?;
        let is_overdue = self.taken - taken_before > self.overtake_limit && self.taken.is_multiple_of(2);
        let (turn, _) = is_overdue.then(|| self.listing(*flow_idx))?.expect("it waits");
        Some((turn, self.first_waiting(*flow_idx)))
    }

    /// Takes the first request of the flow whose turn it is; from now on it runs. `tokens` are the ones that it costs to begin.
    /// The flow's next request, if any, has the same turn, unless that has used the quantum up.
    pub fn take(&mut self, turn: Turn, tokens: u64) -> RequestId {
        self.advance_round();
        self.num_waiting -= 1;
        self.taken += 1;
        let taken = self.taken;
        self.change(turn.flow, |flow| {
            flow.running += 1;
            flow.taken_before = taken;
            flow.served += tokens;
            flow.waiting.pop_front().expect("a flow with a turn has a waiting request").request_id
        })
    }

    /// A running request of `key` goes back to waiting.
    pub fn push_back(&mut self, key: &FlowKey, arrival: u64, request_id: RequestId) {
        let flow_idx = self.by_key[key];
        self.insert_waiting(flow_idx, arrival, request_id);
        self.end_running(key);
    }

    /// A running request of `key` has ended.
    pub fn end_running(&mut self, key: &FlowKey) {
        self.change(self.by_key[key], |flow| {
            assert!(flow.running > 0, "only a running request ends");
            flow.running -= 1;
        });
        self.forget_idle_flows();
    }

    /// Forgets a waiting request of `key`.
    pub fn remove_waiting(&mut self, key: &FlowKey, request_id: RequestId) {
        self.num_waiting -= 1;
        self.change(self.by_key[key], |flow| {
            let place = flow.waiting.iter().position(|waiting| waiting.request_id == request_id);
            flow.waiting.remove(place.expect("a waiting request is in its flow"));
        });
        self.forget_idle_flows();
    }

    /// Counts output tokens of a running request of `key`.
    pub fn charge(&mut self, key: &FlowKey, tokens: u64) {
        self.change(self.by_key[key], |flow| flow.served += tokens);
    }

    fn flow_idx(&mut self, key: FlowKey) -> FlowIdx {
        if let Some(flow_idx) = self.by_key.get(&key) {
            return *flow_idx;
        }
        let flow = Some(Flow {
            key: key.clone(),
            served: 0,
            place: 0,
            new_in: 0,
            taken_before: 0,
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
        self.advance_round();
        let (round, next_place, taken) = (self.round, self.next_place, self.taken);
        let round_start = round * self.quantum;
        self.change(flow_idx, |flow| {
            if flow.waiting.is_empty() {
                flow.taken_before = taken;
                if flow.served <= round_start {
                    (flow.served, flow.new_in, flow.place) = (round_start, round, next_place);
                }
            }
            let place = flow.waiting.partition_point(|waiting| waiting.arrival < arrival);
            flow.waiting.insert(place, Waiting { arrival, request_id });
        });
        self.next_place += 1;
        self.num_waiting += 1;
    }

    /// Flows that begin to wait do so in `self.round` or later: it never goes back.
    fn advance_round(&mut self) {
        self.round = self.turns.first().map_or(self.round, |turn| turn.round);
    }

    fn flow(&self, flow_idx: FlowIdx) -> &Flow {
        self.flows[flow_idx.0].as_ref().expect("an index names a flow until it is forgotten")
    }

    fn first_waiting(&self, flow_idx: FlowIdx) -> RequestId {
        self.flow(flow_idx).waiting[0].request_id
    }

    /// What the sorted sets have of a flow.
    fn listing(&self, flow_idx: FlowIdx) -> Option<(Turn, u64)> {
        let flow = self.flow(flow_idx);
        let round = flow.served / self.quantum;
        let turn = Turn {
            round,
            is_old: round != flow.new_in,
            place: flow.place,
            flow: flow_idx,
        };
        (!flow.waiting.is_empty()).then_some((turn, flow.taken_before))
    }

    /// Changes a flow, and what the sorted sets have of it if that is another then.
    fn change<T>(&mut self, flow_idx: FlowIdx, change: impl FnOnce(&mut Flow) -> T) -> T {
        let listed = self.listing(flow_idx);
        let flow = self.flows[flow_idx.0].as_mut().expect("an index names a flow until it is forgotten");
        self.num_active -= usize::from(flow.is_active());
        let changed = change(flow);
        self.num_active += usize::from(flow.is_active());
        let listing = self.listing(flow_idx);
        if listing != listed {
            if let Some((turn, taken_before)) = listed {
                self.turns.remove(&turn);
                self.ages.remove(&(taken_before, flow_idx));
            }
            if let Some((turn, taken_before)) = listing {
                self.turns.insert(turn);
                self.ages.insert((taken_before, flow_idx));
            }
        }
        changed
    }

    /// Counts of idle flows matter only while they are above the lowest round's start.
    fn forget_idle_flows(&mut self) {
        if self.num_active == 0 {
            // At once, and not by a look at every place that there ever was.
            self.flows.clear();
            self.vacant.clear();
            self.by_key.clear();
            return;
        }
        if self.by_key.len() <= 2 * self.num_active + IDLE_FLOWS_KEPT {
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
    use proptest::prelude::*;

    use super::*;

    const QUANTUM: u64 = 100;

    fn key(name: &str) -> FlowKey {
        FlowKey {
            adapter: None,
            fairness_key: name.into(),
        }
    }

    /// With so many requests waiting in each flow, numbered one flow after the other.
    fn queue(flows: &[(&str, u64)]) -> FairQueue {
        let mut queue = FairQueue::new(QUANTUM, 1000);
        let names = flows.iter().flat_map(|(name, requests)| (0..*requests).map(|_| *name));
        for (name, number) in names.zip(0..) {
            queue.push(key(name), number, RequestId(number));
        }
        queue
    }

    fn take_next(queue: &mut FairQueue, tokens: u64) -> u64 {
        let (turn, _) = queue.overdue_turn().or_else(|| queue.next_turn(None)).expect("somebody waits");
        queue.take(turn, tokens).0
    }

    fn take_so_many(queue: &mut FairQueue, requests: usize, tokens: u64) -> Vec<u64> {
        (0..requests).map(|_| take_next(queue, tokens)).collect()
    }

    #[test]
    fn a_flow_has_its_quantum_in_a_row_and_what_it_had_beyond_is_taken_off_the_next_one() {
        let mut queue = queue(&[("a", 9), ("b", 9), ("c", 2)]);
        let order = take_so_many(&mut queue, 20, 40);
        assert_eq!(order[..8], [0, 1, 2, 9, 10, 11, 18, 19], "120 tokens each, as far as there are any");
        assert_eq!(order[8..12], [3, 4, 12, 13], "80, to 200");
        assert_eq!(order[12..18], [5, 6, 7, 14, 15, 16], "120, to 320");
        assert_eq!(order[18..], [8, 17]);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_request_of_many_quanta_sits_out_as_many_rounds() {
        let mut queue = queue(&[("long", 2), ("short", 20)]);
        assert_eq!(take_next(&mut queue, 450), 0);
        let order = take_so_many(&mut queue, 11, 50);
        assert_eq!(order[..8], (2..10).collect::<Vec<_>>(), "of four rounds");
        assert_eq!(order[8..], [1, 10, 11], "and each in the fifth");
    }

    #[test]
    fn output_tokens_count_too() {
        let mut queue = queue(&[("long answers", 3), ("short answers", 30)]);
        assert_eq!(take_next(&mut queue, 10), 0);
        (0..235).for_each(|_| queue.charge(&key("long answers"), 1));
        let order = take_so_many(&mut queue, 21, 10);
        assert_eq!(order[..20], (3..23).collect::<Vec<_>>(), "two rounds for themselves");
        assert_eq!(order[20], 1, "and then it is the other's turn, which has had 245 tokens");
    }

    #[test]
    fn an_idle_flow_is_not_owed_for_the_past_nor_forgiven_its_debts() {
        let mut queue = queue(&[("busy", 3)]);
        assert_eq!(take_next(&mut queue, 1_000_000), 0);
        for number in 3..15 {
            queue.push(key("late"), number, RequestId(number));
        }
        let order = take_so_many(&mut queue, 11, 10);
        assert_eq!(order[..10], (3..13).collect::<Vec<_>>(), "the late flow has one quantum");
        assert_eq!(order[10], 1, "like the busy one");
        // It is served while it has nothing waiting, and owes that when it comes back.
        queue.charge(&key("late"), 300);
        (13..15).for_each(|number| queue.remove_waiting(&key("late"), RequestId(number)));
        (0..10).for_each(|_| queue.end_running(&key("late")));
        queue.push(key("late"), 15, RequestId(15));
        (16..80).for_each(|number| queue.push(key("busy"), number, RequestId(number)));
        let order = take_so_many(&mut queue, 50, 10);
        assert_eq!(order[49], 15, "the busy one has 10 of its 500 tokens until then");
    }

    /// Fifty flows that always have requests waiting, and one that asks again whenever it was served.
    #[test]
    fn a_sparse_flow_is_served_at_once_and_gets_no_more_than_its_share() {
        let names: Vec<String> = (0..50).map(|number| format!("busy {number}")).collect();
        let flows: Vec<(&str, u64)> = names.iter().map(|name| (&**name, 200)).collect();
        let mut queue = queue(&flows);
        take_so_many(&mut queue, 777, 30);
        let mut at_once = 0;
        for number in 10_000..10_100 {
            queue.push(key("sparse"), number, RequestId(number));
            let mut before = 0;
            while take_next(&mut queue, 30) != number {
                before += 1;
                assert!(30 * before < 50 * (2 * QUANTUM + 30), "it owes less than a round");
            }
            at_once += u64::from(before == 0);
            let least = names.iter().map(|name| queue.flow(queue.by_key[&key(name)]).served).min();
            let sparse = queue.flow(queue.by_key[&key("sparse")]).served;
            assert!(sparse < least.expect("there are fifty") + QUANTUM + 30);
        }
        // Ten requests are three quanta: four of the first round, three of each other one. It waits for the second and the third round to
        // begin; when it has had all three to the token, it is new in the fourth.
        assert_eq!(at_once, 80);
    }

    #[test]
    fn new_flows_are_served_by_their_coming_and_none_is_new_twice_in_a_round() {
        let mut queue = queue(&[("busy", 100)]);
        take_so_many(&mut queue, 3, 60);
        for (name, number) in [("x", 100), ("y", 101), ("x", 102), ("z", 103)] {
            queue.push(key(name), number, RequestId(number));
        }
        assert_eq!(take_so_many(&mut queue, 2, 60), [100, 102], "x has its quantum and more");
        queue.push(key("x"), 104, RequestId(104));
        assert_eq!(take_so_many(&mut queue, 2, 60), [101, 103]);
        queue.push(key("y"), 105, RequestId(105));
        assert_eq!(take_next(&mut queue, 60), 105, "y has had 60 tokens and goes on");
        assert_eq!(take_next(&mut queue, 60), 3, "to the end of the busy one's round");
        queue.push(key("y"), 106, RequestId(106));
        assert_eq!(take_so_many(&mut queue, 4, 60), [4, 104, 106, 5], "in the order of the ring");
    }

    #[test]
    fn fresh_flows_without_end_overtake_a_request_only_so_often() {
        let mut queue = FairQueue::new(QUANTUM, 10);
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
        let mut queue = queue(&[("always there", 1)]);
        for arrival in 1..10_000 {
            let flow = key(&arrival.to_string());
            queue.push(flow.clone(), arrival, RequestId(arrival));
            queue.remove_waiting(&flow, RequestId(arrival));
        }
        assert!(queue.by_key.len() <= IDLE_FLOWS_KEPT + 4 && queue.flows.len() <= IDLE_FLOWS_KEPT + 4);
        queue.remove_waiting(&key("always there"), RequestId(0));
        assert_eq!(queue.by_key.len(), 0);
        assert_eq!(
            queue.flows.len(),
            0,
            "no places of those that have gone, to be looked at when the next one goes"
        );
    }

    #[test]
    fn a_walk_visits_each_waiting_flow_once() {
        let queue = queue(&[("a", 2), ("b", 2), ("c", 1)]);
        let mut visited = Vec::new();
        let mut cursor = None;
        while let Some((turn, request_id)) = queue.next_turn(cursor) {
            visited.push(request_id.0);
            cursor = Some(turn);
        }
        assert_eq!(visited, [0, 2, 4]);
    }

    #[derive(Clone, Debug)]
    enum Action {
        Ask { flow: u8, prompt: u64, output: u64 },
        Take,
        Decode { index: usize, tokens: u64 },
        Preempt(usize),
        Cancel(usize),
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            6 => (0..6u8, 1..250u64, 0..150u64).prop_map(|(flow, prompt, output)| Action::Ask { flow, prompt, output }),
            // One flow that floods.
            2 => (1..30u64, 0..30u64).prop_map(|(prompt, output)| Action::Ask { flow: 0, prompt, output }),
            6 => Just(Action::Take),
            6 => (any::<usize>(), 1..60u64).prop_map(|(index, tokens)| Action::Decode { index, tokens }),
            1 => any::<usize>().prop_map(Action::Preempt),
            1 => any::<usize>().prop_map(Action::Cancel),
        ]
    }

    #[derive(Clone, Debug)]
    struct Request {
        number: u64,
        flow: u8,
        prompt: u64,
        output: u64,
        produced: u64,
    }

    impl Request {
        fn key(&self) -> FlowKey {
            key(&self.flow.to_string())
        }
    }

    /// The first request of a flow.
    #[derive(Debug)]
    struct First {
        number: u64,
        /// Requests taken since from others.
        turns: u64,
        /// The lowest round when it became the first.
        lowest_round: u64,
        /// Tokens of prompts that others were taken with since.
        others: HashMap<u8, u64>,
    }

    /// A queue, who waits and who runs, and the largest numbers of the bounds.
    struct Model {
        queue: FairQueue,
        waiting: Vec<Request>,
        running: Vec<Request>,
        first: HashMap<u8, First>,
        most_prompt: u64,
        most_together: u64,
    }

    impl Model {
        fn new(overtake_limit: u64) -> Self {
            Self {
                queue: FairQueue::new(QUANTUM, overtake_limit),
                waiting: Vec::new(),
                running: Vec::new(),
                first: HashMap::new(),
                most_prompt: 0,
                most_together: 0,
            }
        }

        fn act(&mut self, action: Action, number: u64) {
            let pick = |index: usize, requests: &[Request]| (!requests.is_empty()).then(|| index % requests.len());
            match action {
                Action::Ask { flow, prompt, output } => {
                    let produced = 0;
                    self.wait(Request {
                        number,
                        flow,
                        prompt,
                        output,
                        produced,
                    });
                }
                Action::Take => self.take(),
                Action::Decode { index, tokens } => {
                    if let Some(index) = pick(index, &self.running) {
                        let request = &mut self.running[index];
                        let tokens = tokens.min(request.output - request.produced);
                        request.produced += tokens;
                        self.queue.charge(&request.key(), tokens);
                        if request.produced == request.output {
                            self.queue.end_running(&self.running.swap_remove(index).key());
                        }
                    }
                }
                Action::Preempt(index) => {
                    if let Some(index) = pick(index, &self.running) {
                        let mut request = self.running.swap_remove(index);
                        request.prompt += request.produced;
                        request.output -= request.produced;
                        request.produced = 0;
                        self.queue.push_back(&request.key(), request.number, RequestId(request.number));
                        self.waiting.push(request);
                    }
                }
                Action::Cancel(index) => {
                    if let Some(index) = pick(index, &self.waiting) {
                        let request = self.waiting.swap_remove(index);
                        self.queue.remove_waiting(&request.key(), RequestId(request.number));
                    }
                }
            }
            self.note_first();
            self.check_counts();
        }

        fn wait(&mut self, request: Request) {
            self.queue.push(request.key(), request.number, RequestId(request.number));
            self.waiting.push(request);
        }

        fn take(&mut self) {
            let Some((turn, request_id)) = self.queue.overdue_turn().or_else(|| self.queue.next_turn(None)) else {
                return assert!(self.waiting.is_empty());
            };
            let index = self.waiting.iter().position(|request| request.number == request_id.0);
            let request = self.waiting.swap_remove(index.expect("it waits"));
            let overtakes = |other: &Request| other.flow == request.flow && other.number < request.number;
            assert!(!self.waiting.iter().any(overtakes), "a flow is first come, first served");
            assert_eq!(self.queue.take(turn, request.prompt), request_id);
            self.most_prompt = self.most_prompt.max(request.prompt);
            let first = self.first.remove(&request.flow).expect("it was noted");
            if self.queue.overtake_limit < u64::MAX {
                assert!(first.turns <= self.queue.overtake_limit + 2 * 6, "{request:?} waited for {first:?}");
            } else {
                let bound = (turn.round - first.lowest_round + 1) * QUANTUM + self.most_prompt;
                assert!(first.others.values().all(|tokens| *tokens < bound), "{request:?} waited for {first:?}");
            }
            for other in self.first.values_mut() {
                other.turns += 1;
                *other.others.entry(request.flow).or_default() += request.prompt;
            }
            self.running.push(request.clone());
            let together = self.running.iter().filter(|running| running.flow == request.flow);
            self.most_together = self.most_together.max(together.map(|running| running.prompt + running.output).sum());
        }

        fn note_first(&mut self) {
            for flow in 0..6 {
                let waiting = self.waiting.iter().filter(|request| request.flow == flow);
                let Some(number) = waiting.map(|request| request.number).min() else {
                    self.first.remove(&flow);
                    continue;
                };
                if self.first.get(&flow).is_none_or(|first| first.number != number) {
                    let first = First {
                        number,
                        turns: 0,
                        lowest_round: self.queue.next_turn(None).expect("it waits").0.round,
                        others: HashMap::new(),
                    };
                    self.first.insert(flow, first);
                }
            }
        }

        /// No flow that waits is behind any other by more than it may be, but for overdue turns.
        fn check_counts(&self) {
            assert_eq!(self.queue.len(), self.waiting.len());
            if self.queue.overtake_limit < u64::MAX {
                return;
            }
            let flows = || self.queue.flows.iter().flatten();
            let most = flows().map(|flow| flow.served).max();
            let least = flows().filter(|flow| !flow.waiting.is_empty()).map(|flow| flow.served).min();
            if let (Some(most), Some(least)) = (most, least) {
                assert!(most < least + QUANTUM + self.most_together, "{most} and {least}, {}", self.most_together);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// The bounds of the module, whatever comes, costs, ends, is preempted or given up.
        #[test]
        fn no_flow_is_behind_and_no_request_waits_by_more_than_the_bounds(
            actions in prop::collection::vec(action(), 1..300),
            overtake_limit in prop_oneof![3 => Just(u64::MAX), 1 => 0..12u64],
        ) {
            let mut model = Model::new(overtake_limit);
            for (action, number) in actions.into_iter().zip(0..) {
                model.act(action, number);
            }
            while !model.waiting.is_empty() {
                model.act(Action::Take, u64::MAX);
            }
            while let Some(request) = model.running.pop() {
                model.queue.end_running(&request.key());
            }
            prop_assert!(model.queue.is_empty() && model.queue.by_key.is_empty() && model.queue.num_active == 0);
        }
    }
}
