//! The whole engine over the demo model on the CPU, against what transformers + PEFT answered (`demo/golden`, made by
//! `demo/make_demo.py`): every adapter and the base model in one batch, in random company, preempted, and replaced under traffic.
//!
//! In f32 the greedy ids are equal. Log-probabilities are within 1e-3, which is some thirty times what summing in another order changes.

mod demo;

use std::time::Duration;

use demo::{
    Case, Limits, ROOMY, adapter_names, assert_nothing_is_held, check, goldens, lease, load_all, load_request, random, request, start, submit, unload,
};
use futures::executor::block_on;
use polylora_engine::{AdapterError, AdapterLease, EngineStats, InferenceEngine, LoadRequest, TokenStream, UnloadMode, adapter::AdapterState};

#[test]
fn every_adapter_and_the_base_model_in_one_batch_give_their_golden_answers() {
    let engine = start(&ROOMY);
    load_all(&engine);
    let cases = goldens();
    for round in 0..2 {
        let streams: Vec<TokenStream> = cases.iter().map(|case| submit(&engine, case)).collect();
        for (case, stream) in cases.iter().zip(streams) {
            check(case, stream);
        }
        let cached = engine.stats().cached_tokens_total;
        assert_eq!(cached > 0, round == 1, "the second time the prompts' first blocks are cached");
    }
    assert_nothing_is_held(&engine);
}

#[test]
fn each_alone_gives_the_same() {
    let engine = start(&ROOMY);
    load_all(&engine);
    goldens().iter().for_each(|case| check(case, submit(&engine, case)));
}

/// Few blocks, so that sequences are preempted; a small chunk; device and host room for three adapters; two a step.
#[test]
fn random_company_eviction_and_preemption_change_no_answer() {
    let stats = random_company(3, false);
    assert!(stats.preemptions_total > 0 && stats.device_evictions_total > 0, "{stats:?}");
}

/// The same where what adapters don't have is the KV cache's: both grow at the other's cost all the time.
#[test]
fn memory_that_goes_to_and_fro_between_blocks_and_adapters_changes_no_answer() {
    let stats = random_company(2, true);
    assert!(stats.device_evictions_total > 0, "{stats:?}");
}

/// With device room for so many adapters.
fn random_company(num_adapters: usize, is_shared: bool) -> EngineStats {
    let adapter_bytes = {
        let engine = start(&ROOMY);
        load_all(&engine);
        engine.list_adapters().iter().map(|info| info.bytes).max().expect("there are adapters")
    };
    let cases = goldens();
    let longest = cases
        .iter()
        .map(|case| case.prompt_tokens.len() + case.output_tokens.len())
        .max()
        .expect("cases");
    let engine = start(&Limits {
        num_blocks: longest.div_ceil(4) + 4,
        block_size: 4,
        adapter_bytes: num_adapters * adapter_bytes,
        is_shared,
        max_running: 12,
        max_loras: 2,
        step_tokens: 24,
        ..ROOMY
    });
    load_all(&engine);
    for seed in 1..=4 {
        let mut state = seed;
        let chosen: Vec<&Case> = (0..40).map(|_| &cases[random(&mut state, cases.len())]).collect();
        let streams: Vec<TokenStream> = chosen.iter().map(|case| submit(&engine, case)).collect();
        for (case, stream) in chosen.into_iter().zip(streams) {
            // Every fifth is cancelled instead.
            if random(&mut state, 5) > 0 {
                check(case, stream);
            }
        }
    }
    while !block_on(engine.flush_cache()) {}
    assert_nothing_is_held(&engine);
    engine.stats()
}

#[test]
fn a_name_that_is_replaced_under_traffic_gives_each_request_the_version_it_began_with() {
    let engine = start(&ROOMY);
    let cases = goldens();
    let names = adapter_names();
    let of = |name: &str| -> Vec<Case> { cases.iter().filter(|case| case.adapter.as_deref() == Some(name)).cloned().collect() };
    let mut streams = Vec::new();
    for round in 0..3 {
        for adapter in &names {
            let replacement = LoadRequest {
                replace: true,
                ..load_request("changing", adapter)
            };
            block_on(engine.load_adapter(replacement)).expect("a good adapter");
            for case in of(adapter).into_iter().take(3) {
                let lease = lease(&engine, "changing");
                streams.push((case.clone(), engine.submit(request(&case, Some(lease))).expect("there is room")));
            }
        }
        assert!(streams.len() == 3 * names.len() * (round + 1));
    }
    let unloaded = block_on(async {
        let unloading = engine.unload_adapter("changing", UnloadMode::Drain).expect("it was loaded");
        let error = engine.acquire_adapter("changing").await.err();
        assert!(matches!(error, Some(AdapterError::Unknown { .. })), "forgotten at once: {error:?}");
        unloading.drained().await
    });
    assert!(unloaded.waited_for <= streams.len());
    for (case, stream) in streams {
        check(&case, stream);
    }
    assert_nothing_is_held(&engine);
}

#[test]
fn a_prefix_is_never_used_under_another_version_of_the_same_name() {
    let engine = start(&ROOMY);
    let cases = goldens();
    let names = adapter_names();
    // Two adapters with a golden answer to the same long prompt.
    let case_of = |name: &str| {
        let mut of: Vec<&Case> = cases.iter().filter(|case| case.adapter.as_deref() == Some(name)).collect();
        of.sort_by_key(|case| std::cmp::Reverse(case.prompt_tokens.len()));
        of[0]
    };
    let (first, second) = (case_of(&names[0]), case_of(&names[1]));
    let run = |case: &Case, adapter: Option<AdapterLease>| {
        let before = engine.stats().cached_tokens_total;
        check(case, engine.submit(request(case, adapter)).expect("there is room"));
        engine.stats().cached_tokens_total - before
    };
    block_on(engine.load_adapter(load_request("name", &names[0]))).expect("a good adapter");
    assert_eq!(run(first, Some(lease(&engine, "name"))), 0);
    assert!(run(first, Some(lease(&engine, "name"))) >= 16, "cached for its own version");
    unload(&engine, "name");
    block_on(engine.load_adapter(load_request("name", &names[1]))).expect("a good adapter");
    assert_eq!(run(second, Some(lease(&engine, "name"))), 0, "the same name, another version");
    block_on(engine.load_adapter(load_request("again", &names[0]))).expect("a good adapter");
    assert!(run(first, Some(lease(&engine, "again"))) >= 16, "another name, the version of before");
}

#[test]
fn a_pinned_adapter_is_on_the_device_before_anyone_asks_and_stays() {
    let engine = start(&Limits { max_loras: 2, ..ROOMY });
    let names = adapter_names();
    let state = |name: &str| engine.adapter_info(name).expect("it is registered").state;
    let pinned = LoadRequest {
        pinned: true,
        ..load_request("pinned", &names[0])
    };
    block_on(engine.load_adapter(pinned)).expect("a good adapter");
    // The engine thread answers after it has seen the pin; a GPU's copy may take some more of its turns.
    let is_there = (0..1_000_000).any(|_| block_on(engine.flush_cache()) && state("pinned") == AdapterState::Device);
    assert!(is_there, "{:?}", state("pinned"));
    let refused = engine.load_adapter(LoadRequest {
        pinned: true,
        ..load_request("another", &names[1])
    });
    let error = block_on(refused).expect_err("one pin of two adapters a batch");
    assert!(
        matches!(error, AdapterError::TooManyPinned { .. }) && error.to_string().contains("starvation"),
        "{error}"
    );
    block_on(engine.load_adapter(load_request("host", &names[1]))).expect("a good adapter");
    assert!(block_on(engine.flush_cache()));
    assert_eq!(state("host"), AdapterState::Host);
    block_on(engine.shutdown(Duration::ZERO));
    assert_eq!(state("pinned"), AdapterState::Host, "nothing is on a device that is gone");
}

#[test]
fn far_more_adapters_in_flight_than_host_memory_holds_are_all_answered() {
    let engine = start(&Limits {
        max_loaded: Some(3),
        max_loras: 2,
        ..ROOMY
    });
    let registry = engine.adapters().expect("LoRA is on");
    for name in adapter_names() {
        registry.register(load_request(&name, &name)).expect("a name that is free");
    }
    let cases = goldens();
    std::thread::scope(|scope| {
        for case in cases.iter().filter(|case| case.adapter.is_some()) {
            let engine = &engine;
            scope.spawn(move || check(case, submit(engine, case)));
        }
    });
    let stats = engine.stats().registry;
    assert_eq!((stats.leases, stats.waiting_for_room), (0, 0));
    assert!(stats.evictions_total > 0 && stats.loaded <= 3, "{stats:?}");
}

#[test]
fn a_thousand_loads_and_unloads_change_no_answer_of_the_others() {
    let engine = start(&ROOMY);
    load_all(&engine);
    let (names, cases) = (adapter_names(), goldens());
    let churning = std::sync::atomic::AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for index in 0..1000 {
                let adapter = &names[index % names.len()];
                block_on(engine.load_adapter(load_request("churn", adapter))).expect("the name is free");
                // Some are used, and unloaded while they are.
                let case = cases
                    .iter()
                    .find(|case| case.adapter.as_ref() == Some(adapter))
                    .expect("it has golden answers");
                let used = (index % 16 == 0).then(|| engine.submit(request(case, Some(lease(&engine, "churn")))).expect("there is room"));
                let mode = if index % 32 == 0 { UnloadMode::Abort } else { UnloadMode::Drain };
                let unloading = engine.unload_adapter("churn", mode).expect("it is loaded");
                match (used, mode) {
                    (Some(stream), UnloadMode::Drain) => check(case, stream),
                    (Some(stream), UnloadMode::Abort) => drop(stream),
                    (None, _) => {}
                }
                assert_eq!(block_on(unloading.drained()).still_running, 0);
            }
            churning.store(false, std::sync::atomic::Ordering::SeqCst);
        });
        let mut state = 1;
        while churning.load(std::sync::atomic::Ordering::SeqCst) {
            let chosen: Vec<&Case> = (0..8).map(|_| &cases[random(&mut state, cases.len())]).collect();
            let streams: Vec<TokenStream> = chosen.iter().map(|case| submit(&engine, case)).collect();
            chosen.into_iter().zip(streams).for_each(|(case, stream)| check(case, stream));
        }
    });
    assert_eq!(engine.list_adapters().len(), names.len());
    assert_nothing_is_held(&engine);
}
