//! Ten thousand registered names over the demo model, a few hundred of them in host memory at a time: every answer is the golden one, and
//! memory is bounded. A process of its own, since it looks at the process's memory.

mod demo;

use std::{collections::VecDeque, sync::Arc};

use demo::{Case, Limits, ROOMY, Zipf, adapter_names, assert_nothing_is_held, check, goldens, lease, load_request, random, request, start};
use polylora_engine::{InferenceEngine, LlmEngine};

const NUM_NAMES: usize = 10_000;
const MAX_LOADED: usize = 200;
const IN_FLIGHT: usize = 48;

/// Sends `num_requests` by Zipf's law and checks every answer; gives how many distinct names were asked for.
fn run(engine: &Arc<LlmEngine>, cases_of: &[Vec<Case>], zipf: &Zipf, state: &mut u64, num_requests: usize) -> usize {
    let mut asked = std::collections::BTreeSet::new();
    let mut in_flight = VecDeque::new();
    for _ in 0..num_requests {
        if in_flight.len() == IN_FLIGHT {
            let (case, stream): (&Case, _) = in_flight.pop_front().expect("it is full");
            check(case, stream);
        }
        let number = zipf.draw(state);
        asked.insert(number);
        let cases = &cases_of[number % cases_of.len()];
        let case = &cases[random(state, cases.len())];
        let lease = lease(engine, &format!("adapter-{number}"));
        in_flight.push_back((case, engine.submit(request(case, Some(lease))).expect("there is room")));
        let stats = engine.stats();
        assert!(stats.registry.loaded <= MAX_LOADED, "{} adapters in host memory", stats.registry.loaded);
        assert!(stats.device_adapter_bytes <= stats.device_adapter_capacity_bytes);
    }
    in_flight.into_iter().for_each(|(case, stream)| check(case, stream));
    asked.len()
}

#[cfg(target_os = "linux")]
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    let pages: usize = statm.split(' ').nth(1).and_then(|field| field.parse().ok()).expect("pages");
    pages * 4096
}

#[test]
fn ten_thousand_names_give_their_golden_answers_in_bounded_memory() {
    let engine = start(&Limits {
        max_loaded: Some(MAX_LOADED),
        max_running: 32,
        ..ROOMY
    });
    let names = adapter_names();
    let registry = engine.adapters().expect("LoRA is on");
    for number in 0..NUM_NAMES {
        registry
            .register(load_request(&format!("adapter-{number}"), &names[number % names.len()]))
            .expect("a new name");
    }
    assert_eq!(engine.stats().registry.registered, NUM_NAMES);
    let goldens = goldens();
    let cases_of: Vec<Vec<Case>> = names
        .iter()
        .map(|name| goldens.iter().filter(|case| case.adapter.as_ref() == Some(name)).cloned().collect())
        .collect();
    let zipf = Zipf::new(NUM_NAMES);
    let mut state = 1;
    let asked = run(&engine, &cases_of, &zipf, &mut state, 500);
    assert!(asked > MAX_LOADED, "{asked} names were asked for, {MAX_LOADED} may be in host memory");
    #[cfg(target_os = "linux")]
    let before = resident_bytes();
    run(&engine, &cases_of, &zipf, &mut state, 1000);
    #[cfg(target_os = "linux")]
    {
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 16 << 20, "{grown} bytes more than after the first third");
    }
    assert_nothing_is_held(&engine);
    let stats = engine.stats();
    assert!(stats.registry.evictions_total > 0 && stats.registry.load_failures_total == 0, "{stats:?}");
    let adapters = engine.adapter_stats();
    assert_eq!(adapters.iter().map(|stats| stats.requests_total).sum::<u64>(), 1500);
    assert_eq!(adapters.iter().map(|stats| stats.admitted_total).sum::<u64>(), 1500);
}
