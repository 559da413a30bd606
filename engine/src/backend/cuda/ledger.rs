//! Which parts of the host memory for adapters have pages, which of these are locked, who uses them, and what is to be done next. Pure.
//!
//! Nothing is locked while a run is written for which the system has to find pages: that waits for those, and launches wait for it.
//!
//! Memory is dealt out in runs, from the bottom. A *part* is what is locked at a time. One that has pages and that no run touches is *spare*: such
//! parts are kept for the next adapters, half of a reserve at least and half as much again at most.

use std::{collections::VecDeque, ops::Range};

use super::arena::Arena;

/// Bytes of the memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub offset: usize,
    pub bytes: usize,
    id: u32,
    /// Has parts without pages.
    is_new: bool,
}

/// What is to be done about a part.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Lock it: it was written to.
    Lock(usize),
    /// Have the system find pages for it, and lock them.
    Reserve(usize),
    /// Unlock it and give its pages back. Nobody gets it until [`Ledger::discarded`].
    Discard(usize, Run),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    /// None yet, or none any more.
    Absent,
    /// There may be some.
    Present,
    Locked,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    runs: u32,
    pages: Pages,
}

impl Part {
    fn is_spare(self) -> bool {
        self.runs == 0 && self.pages != Pages::Absent
    }

    fn is_unused(self) -> bool {
        self.runs == 0 && self.pages == Pages::Absent
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spare {
    Enough,
    TooLittle,
    TooMuch,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ledger {
    part_bytes: usize,
    /// Spare parts wanted.
    reserve: usize,
    arena: Arena,
    parts: Vec<Part>,
    next_run: u32,
    num_spare: usize,
    spare: Spare,
    /// Runs that are new and not filled yet.
    num_new: usize,
    /// To be locked, the first to be so first.
    to_lock: VecDeque<usize>,
    may_lock: bool,
    /// No part below is unused.
    first_unused: usize,
    /// No part from here on is spare.
    spare_end: usize,
}

impl Ledger {
    /// `num_parts` of `part_bytes`; about `reserve_bytes` are kept spare.
    pub fn new(num_parts: usize, part_bytes: usize, reserve_bytes: usize) -> Self {
        let part = Part {
            runs: 0,
            pages: Pages::Absent,
        };
        Self {
            part_bytes,
            reserve: reserve_bytes.div_ceil(part_bytes).min(num_parts),
            arena: Arena::new(num_parts * part_bytes),
            parts: vec![part; num_parts],
            next_run: 0,
            num_spare: 0,
            spare: Spare::Enough,
            num_new: 0,
            to_lock: VecDeque::new(),
            may_lock: true,
            first_unused: 0,
            spare_end: 0,
        }
    }

    /// A run of `bytes`; `None` if there are not so many together.
    pub fn allocate(&mut self, bytes: usize) -> Option<Run> {
        let id = self.next_id();
        let bytes = bytes.max(1);
        let offset = self.arena.allocate(id, bytes)?;
        let mut run = Run {
            offset,
            bytes,
            id,
            is_new: false,
        };
        run.is_new = self.parts[self.parts_of(&run)].iter().any(|part| part.pages == Pages::Absent);
        self.num_new += usize::from(run.is_new);
        self.change(&run, |part| part.runs += 1);
        Some(run)
    }

    /// A run was written.
    pub fn filled(&mut self, run: &mut Run) {
        self.num_new -= usize::from(std::mem::take(&mut run.is_new));
        self.change(run, |part| {
            if part.pages == Pages::Absent {
                part.pages = Pages::Present;
            }
        });
    }

    /// A run ends. Somebody may have begun to write it.
    pub fn free(&mut self, run: &mut Run) {
        self.filled(run);
        self.change(run, |part| part.runs -= 1);
        self.arena.free(run.id);
    }

    /// What to do next; `None` if there is nothing until something changes.
    pub fn next_work(&mut self) -> Option<Work> {
        self.spare = match self.spare {
            Spare::TooMuch if self.num_spare > self.reserve => Spare::TooMuch,
            Spare::TooLittle if self.num_spare < self.reserve => Spare::TooLittle,
            _ if self.num_spare > self.reserve + self.reserve / 2 => Spare::TooMuch,
            _ if self.num_spare < self.reserve.div_ceil(2) => Spare::TooLittle,
            _ => Spare::Enough,
        };
        if self.spare == Spare::TooMuch {
            let last = self.parts[..self.spare_end].iter().rposition(|part| part.is_spare());
            self.spare_end = last.map_or(0, |last| last + 1);
            if let Some(part) = last {
                return Some(self.claim(part));
            }
        }
        if !self.may_lock || self.num_new > 0 {
            return None;
        }
        while let Some(part) = self.to_lock.pop_front() {
            if self.parts[part].pages == Pages::Present {
                return Some(Work::Lock(part));
            }
        }
        if self.spare != Spare::TooLittle {
            return None;
        }
        let unused = self.parts[self.first_unused..].iter().position(|part| part.is_unused());
        self.first_unused = unused.map_or(self.parts.len(), |unused| self.first_unused + unused);
        unused.map(|_| Work::Reserve(self.first_unused))
    }

    /// `Lock` or `Reserve` was done.
    pub fn locked(&mut self, part: usize) {
        self.change_part(part, |part| part.pages = Pages::Locked);
    }

    /// It can't be done, and is not tried again.
    pub fn cannot_lock(&mut self, part: usize) {
        self.may_lock = false;
        self.to_lock = VecDeque::new();
        self.change_part(part, |part| part.pages = Pages::Present);
    }

    /// `Discard` was done.
    pub fn discarded(&mut self, run: &Run) {
        self.change(run, |part| {
            part.pages = Pages::Absent;
            part.runs -= 1;
        });
        self.arena.free(run.id);
    }

    /// Takes a spare part away from those who might get it.
    fn claim(&mut self, part: usize) -> Work {
        let id = self.next_id();
        let (offset, bytes) = (part * self.part_bytes, self.part_bytes);
        self.arena.allocate_at(id, offset, bytes);
        let run = Run {
            offset,
            bytes,
            id,
            is_new: false,
        };
        self.change(&run, |part| part.runs += 1);
        Work::Discard(part, run)
    }

    fn next_id(&mut self) -> u32 {
        self.next_run = self.next_run.wrapping_add(1);
        self.next_run
    }

    fn parts_of(&self, run: &Run) -> Range<usize> {
        run.offset / self.part_bytes..(run.offset + run.bytes).div_ceil(self.part_bytes)
    }

    fn change(&mut self, run: &Run, change: impl Fn(&mut Part)) {
        self.parts_of(run).for_each(|part| self.change_part(part, &change));
    }

    fn change_part(&mut self, index: usize, change: impl FnOnce(&mut Part)) {
        let part = &mut self.parts[index];
        let was = *part;
        change(part);
        let is = *part;
        if is.pages == Pages::Present && was.pages != Pages::Present && self.may_lock {
            self.to_lock.push_back(index);
        }
        if is.is_unused() {
            self.first_unused = self.first_unused.min(index);
        }
        if is.is_spare() {
            self.spare_end = self.spare_end.max(index + 1);
        }
        self.num_spare = self.num_spare + usize::from(is.is_spare()) - usize::from(was.is_spare());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const PART: usize = 1024;

    /// Does all there is to do; how many parts were locked, reserved and discarded.
    fn settle(ledger: &mut Ledger) -> [usize; 3] {
        let mut done = [0; 3];
        while let Some(work) = ledger.next_work() {
            match work {
                Work::Lock(part) => {
                    done[0] += 1;
                    ledger.locked(part);
                }
                Work::Reserve(part) => {
                    done[1] += 1;
                    ledger.locked(part);
                }
                Work::Discard(_, run) => {
                    done[2] += 1;
                    ledger.discarded(&run);
                }
            }
        }
        done
    }

    fn is_locked(ledger: &Ledger, run: &Run) -> bool {
        ledger.parts[ledger.parts_of(run)].iter().all(|part| part.pages == Pages::Locked)
    }

    #[test]
    fn adapters_that_follow_each_other_use_the_same_locked_parts() {
        let mut ledger = Ledger::new(64, PART, 8 * PART);
        assert_eq!(settle(&mut ledger), [0, 8, 0], "the reserve");
        let mut runs: Vec<Run> = (0..2).map(|_| ledger.allocate(3 * PART).unwrap()).collect();
        runs.iter_mut().for_each(|run| ledger.filled(run));
        assert!(runs.iter().all(|run| is_locked(&ledger, run)), "from the reserve");
        assert_eq!(settle(&mut ledger), [0, 6, 0], "two were left of it, which is less than half");
        for _ in 0..20 {
            // As in a full host tier: the next one is read before the last one goes.
            let mut next = ledger.allocate(3 * PART).unwrap();
            ledger.filled(&mut next);
            assert!(is_locked(&ledger, &next));
            ledger.free(&mut runs.remove(0));
            runs.push(next);
            assert_eq!(settle(&mut ledger), [0, 0, 0]);
        }
        runs.iter_mut().for_each(|run| ledger.free(run));
        assert_eq!(settle(&mut ledger), [0, 0, 6], "all but the reserve goes back to the system");
        assert_eq!(ledger.num_spare, 8);
    }

    #[test]
    fn what_has_no_reserve_is_locked_once_it_is_written() {
        let mut ledger = Ledger::new(8, PART, 0);
        assert_eq!(settle(&mut ledger), [0, 0, 0]);
        let mut first = ledger.allocate(PART + 1).unwrap();
        assert_eq!(settle(&mut ledger), [0, 0, 0], "not before it is written");
        ledger.filled(&mut first);
        let mut second = ledger.allocate(PART).unwrap();
        assert_eq!(settle(&mut ledger), [0, 0, 0], "the second is new and being written");
        ledger.filled(&mut second);
        let third = ledger.allocate(10).unwrap();
        assert_eq!(settle(&mut ledger), [3, 0, 0], "the third lies where the second has pages");
        assert!(is_locked(&ledger, &first) && is_locked(&ledger, &third));
        ledger.free(&mut first);
        assert_eq!(settle(&mut ledger), [0, 0, 1], "the others have a part of the rest");
        assert_eq!(ledger.allocate(9 * PART), None);
    }

    #[test]
    fn where_nothing_can_be_locked_it_is_tried_once() {
        let mut ledger = Ledger::new(8, PART, 4 * PART);
        let Some(Work::Reserve(part)) = ledger.next_work() else {
            panic!("a reserve is wanted")
        };
        ledger.cannot_lock(part);
        let mut run = ledger.allocate(8 * PART).unwrap();
        ledger.filled(&mut run);
        assert_eq!(ledger.next_work(), None);
        ledger.free(&mut run);
        assert_eq!(settle(&mut ledger), [0, 0, 4], "what is spare is kept for the next one all the same");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        /// Whatever comes and goes, and whenever work is done: runs are apart, nobody has what is being discarded, and in the end what is used is
        /// locked and spare parts are near the reserve.
        #[test]
        fn parts_are_conserved(reserve in 0usize..12, steps in proptest::collection::vec((0usize..5, 1usize..4000), 1..120)) {
            let mut ledger = Ledger::new(64, PART, reserve * PART);
            let mut live: Vec<Run> = Vec::new();
            let mut discards: HashMap<usize, Run> = HashMap::new();
            for (what, amount) in steps {
                match what {
                    0 | 1 => if let Some(mut run) = ledger.allocate(amount) {
                        for other in live.iter().chain(discards.values()) {
                            prop_assert!(run.offset + run.bytes <= other.offset || other.offset + other.bytes <= run.offset);
                        }
                        if amount % 3 > 0 {
                            ledger.filled(&mut run);
                        }
                        live.push(run);
                    },
                    2 if !live.is_empty() => ledger.free(&mut live.swap_remove(amount % live.len())),
                    3 => if let Some(part) = discards.keys().next().copied() {
                        ledger.discarded(&discards.remove(&part).unwrap());
                    },
                    _ => match ledger.next_work() {
                        Some(Work::Lock(part) | Work::Reserve(part)) => ledger.locked(part),
                        Some(Work::Discard(part, run)) => prop_assert!(discards.insert(part, run).is_none()),
                        None => {}
                    },
                }
                let spare = ledger.parts.iter().filter(|part| part.is_spare()).count();
                prop_assert_eq!(ledger.num_spare, spare);
            }
            discards.values().for_each(|run| ledger.discarded(run));
            live.iter_mut().for_each(|run| ledger.filled(run));
            settle(&mut ledger);
            prop_assert!(live.iter().all(|run| is_locked(&ledger, run)));
            live.iter_mut().for_each(|run| ledger.free(run));
            settle(&mut ledger);
            prop_assert!(ledger.parts.iter().all(|part| part.runs == 0));
            prop_assert!((reserve.div_ceil(2)..=reserve + reserve / 2).contains(&ledger.num_spare), "{} of {reserve}", ledger.num_spare);
            prop_assert_eq!(ledger.arena.free_bytes(), 64 * PART);
        }
    }
}
