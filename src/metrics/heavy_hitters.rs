//! The heaviest of any number of names, in bounded memory.

use std::{collections::HashMap, sync::Arc};

/// *Space-Saving* (Metwally, Agrawal and El Abbadi, 2005) with weights: `capacity` names are counted; a new one takes the place of the lightest,
/// and its count over, as what may be wrong with its own. A name with more than one `capacity`th of all weight is therefore among them, and none
/// has less than [`Self::heaviest`] says of it. Weights may age ([`Self::scale`]): all of them alike, so that both hold of what is left of them.
///
/// Adding costs a look into a hash table and at most `log2(capacity)` swaps in a heap.
#[derive(Debug)]
pub(super) struct HeavyHitters {
    capacity: usize,
    slots: Vec<Slot>,
    /// Places in `slots`; no parent is heavier than its children.
    heap: Vec<usize>,
    by_name: HashMap<Arc<str>, usize>,
}

#[derive(Debug)]
struct Slot {
    name: Arc<str>,
    count: f64,
    /// How much of `count` may be others'.
    error: f64,
    /// Its place in `heap`.
    place: usize,
}

impl Slot {
    fn certain(&self) -> f64 {
        self.count - self.error
    }
}

impl HeavyHitters {
    /// Counts at most `capacity` names.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity: capacity.max(1),
            slots: Vec::new(),
            heap: Vec::new(),
            by_name: HashMap::new(),
        }
    }

    /// Adds to a name's weight.
    pub fn add(&mut self, name: &Arc<str>, weight: f64) {
        let slot = if let Some(&slot) = self.by_name.get(name) {
            slot
        } else if self.slots.len() < self.capacity {
            let (slot, place) = (self.slots.len(), self.heap.len());
            self.slots.push(Slot {
                name: Arc::clone(name),
                count: 0.0,
                error: 0.0,
                place,
            });
            self.heap.push(slot);
            self.by_name.insert(Arc::clone(name), slot);
            self.sift_up(place);
            slot
        } else {
            let slot = self.heap[0];
            let lightest = &mut self.slots[slot];
            self.by_name.remove(&lightest.name);
            lightest.name = Arc::clone(name);
            lightest.error = lightest.count;
            self.by_name.insert(Arc::clone(name), slot);
            slot
        };
        self.slots[slot].count += weight;
        self.sift_down(self.slots[slot].place);
    }

    /// The name that certainly has most, and how much that is.
    pub fn heaviest(&self) -> Option<(&Arc<str>, f64)> {
        let heaviest = self.slots.iter().max_by(|a, b| a.certain().total_cmp(&b.certain()))?;
        Some((&heaviest.name, heaviest.certain()))
    }

    /// Counts a name no more; what it certainly had.
    pub fn remove(&mut self, name: &str) -> f64 {
        let Some(slot) = self.by_name.remove(name) else { return 0.0 };
        let place = self.slots[slot].place;
        self.heap.swap_remove(place);
        if let Some(&moved) = self.heap.get(place) {
            self.slots[moved].place = place;
            self.sift_up(place);
            self.sift_down(self.slots[moved].place);
        }
        let removed = self.slots.swap_remove(slot);
        if let Some(moved) = self.slots.get(slot) {
            self.heap[moved.place] = slot;
            *self.by_name.get_mut(&moved.name).expect("every slot's name is in the table") = slot;
        }
        removed.certain()
    }

    /// Every weight so far counts this many times as much.
    pub fn scale(&mut self, factor: f64) {
        for slot in &mut self.slots {
            slot.count *= factor;
            slot.error *= factor;
        }
    }

    fn count_at(&self, place: usize) -> f64 {
        self.slots[self.heap[place]].count
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.slots[self.heap[a]].place = a;
        self.slots[self.heap[b]].place = b;
    }

    fn sift_up(&mut self, mut place: usize) {
        while place > 0 {
            let parent = (place - 1) / 2;
            if self.count_at(parent) <= self.count_at(place) {
                return;
            }
            self.swap(parent, place);
            place = parent;
        }
    }

    fn sift_down(&mut self, mut place: usize) {
        loop {
            let children = [2 * place + 1, 2 * place + 2].into_iter().filter(|&child| child < self.heap.len());
            let Some(lighter) = children.min_by(|&a, &b| self.count_at(a).total_cmp(&self.count_at(b))) else {
                return;
            };
            if self.count_at(place) <= self.count_at(lighter) {
                return;
            }
            self.swap(place, lighter);
            place = lighter;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Add(u8, u16),
        Remove(u8),
        Halve,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            20 => (any::<u8>(), 1..1000u16).prop_map(|(name, weight)| Op::Add(name % 40, weight)),
            20 => (0..4u8, 1..1000u16).prop_map(|(name, weight)| Op::Add(name, weight)),
            1 => (0..40u8).prop_map(Op::Remove),
            1 => Just(Op::Halve),
        ]
    }

    proptest! {
        #[test]
        fn no_name_has_less_than_is_certain_and_a_heavy_one_is_counted(ops in prop::collection::vec(op(), 1..400), capacity in 1..12usize) {
            let mut heavy = HeavyHitters::new(capacity);
            let mut truth: BTreeMap<Arc<str>, f64> = BTreeMap::new();
            let mut has_removed = false;
            for op in ops {
                match op {
                    Op::Add(name, weight) => {
                        let name: Arc<str> = name.to_string().into();
                        heavy.add(&name, f64::from(weight));
                        *truth.entry(name).or_default() += f64::from(weight);
                    }
                    Op::Remove(name) => {
                        let name = name.to_string();
                        let certain = heavy.remove(&name);
                        let had = truth.remove(name.as_str()).unwrap_or(0.0);
                        prop_assert!(certain <= had * 1.000001);
                        has_removed = true;
                    }
                    Op::Halve => {
                        heavy.scale(0.5);
                        truth.values_mut().for_each(|weight| *weight *= 0.5);
                    }
                }
                prop_assert!(heavy.slots.len() <= capacity);
                prop_assert_eq!(heavy.by_name.len(), heavy.slots.len());
                prop_assert_eq!(heavy.heap.len(), heavy.slots.len());
                for (place, &slot) in heavy.heap.iter().enumerate() {
                    prop_assert_eq!(heavy.slots[slot].place, place);
                    prop_assert!(place == 0 || heavy.count_at((place - 1) / 2) <= heavy.count_at(place));
                }
                for (name, &slot) in &heavy.by_name {
                    prop_assert_eq!(name, &heavy.slots[slot].name);
                    prop_assert!(heavy.slots[slot].certain() <= truth[name] * 1.000001);
                }
                // Who was taken out may have had a place that others were counted in.
                let all: f64 = truth.values().sum();
                for (name, weight) in truth.iter().filter(|(_, weight)| **weight > all / capacity as f64 * 1.000001) {
                    prop_assert!(has_removed || heavy.by_name.contains_key(name), "{} of {}", weight, all);
                }
            }
        }
    }
}
