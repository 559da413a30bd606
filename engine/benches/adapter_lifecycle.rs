//! What adapters cost when there are many: over the demo model on the CPU, every answer checked against its golden one.
//!
//! `cargo bench -p polylora-engine --bench adapter_lifecycle`. Three tables: throughput by the number of registered names; time to the first
//! token by where the adapter is; the time between other requests' tokens while adapters are loaded.

#[path = "../tests/demo/mod.rs"]
mod demo;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use demo::{Case, Limits, ROOMY, Zipf, adapter_names, check, goldens, lease, load_request, request, start, unload};
use futures::executor::block_on;
use polylora_engine::{InferenceEngine, LlmEngine, TokenEvent};

fn main() {
    throughput();
    first_token();
    between_tokens();
}

fn cases_of(name: &str) -> Vec<Case> {
    goldens().into_iter().filter(|case| case.adapter.as_deref() == Some(name)).collect()
}

fn start_with_names(num_names: usize) -> Arc<LlmEngine> {
    let engine = start(&Limits {
        max_loaded: Some(200),
        max_running: 32,
        ..ROOMY
    });
    let names = adapter_names();
    for number in 0..num_names {
        let adapter = &names[number % names.len()];
        let registry = engine.adapters().expect("LoRA is on");
        registry
            .register(load_request(&format!("adapter-{number}"), adapter))
            .expect("a new name");
    }
    engine
}

/// Clients that each have one request at a time.
const CLIENTS: usize = 48;

/// Output tokens a second of Zipf traffic. Both engines get the same prompts on the same weights in the same order, so that only the number
/// of names differs, and the loads that come with it. Who waits for a load holds up nobody else.
fn throughput() {
    println!("registered names | output tokens/s, each of 3 runs, taken in turn | host loads | ms of a load | ratio of the medians");
    let cases: Vec<Vec<Case>> = adapter_names().iter().map(|name| cases_of(name)).collect();
    let zipf = Zipf::new(10_000);
    let engines = [16, 10_000].map(|num_names| (num_names, start_with_names(num_names)));
    let mut rates = [Vec::new(), Vec::new()];
    for run in 0..4 {
        for (place, (num_names, engine)) in engines.iter().enumerate() {
            let started = Instant::now();
            let client = |client: usize| {
                let mut state = (run * CLIENTS + client) as u64;
                let mut tokens = 0;
                for _ in 0..32 {
                    let number = zipf.draw(&mut state);
                    let of = &cases[number % cases.len()];
                    let case = &of[demo::random(&mut state, of.len())];
                    let lease = lease(engine, &format!("adapter-{}", number % num_names));
                    check(case, engine.submit(request(case, Some(lease))).expect("there is room"));
                    tokens += case.output_tokens.len();
                }
                tokens
            };
            let tokens: usize = std::thread::scope(|scope| {
                let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || client(number))).collect();
                clients.into_iter().map(|client| client.join().expect("right answers")).sum()
            });
            // The first run warms up.
            if run > 0 {
                rates[place].push(tokens as f64 / started.elapsed().as_secs_f64());
            }
        }
    }
    let medians = rates.clone().map(|mut rates| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    for ((num_names, engine), rates) in engines.iter().zip(&rates) {
        let runs: Vec<String> = rates.iter().map(|rate| format!("{rate:.0}")).collect();
        let registry = engine.stats().registry;
        let ms = 1e3 * registry.load_seconds_total / registry.loads_total as f64;
        println!("{num_names:16} | {:46} | {:10} | {ms:12.3} |", runs.join(" "), registry.loads_total);
    }
    println!("{:16} | {:46} | {:10} | {:12} | {:.3}", "", "", "", "", medians[1] / medians[0]);
}

fn time_to_first_token(engine: &LlmEngine, case: &Case, name: &str) -> Duration {
    let started = Instant::now();
    let adapter = lease(engine, name);
    let mut stream = engine.submit(request(case, Some(adapter))).expect("there is room");
    let first = loop {
        match stream.blocking_next().expect("an answer") {
            TokenEvent::Token { .. } => break started.elapsed(),
            TokenEvent::Started { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    while stream.blocking_next().is_some() {}
    first
}

/// An idle engine, one request at a time. Its files are in the page cache.
fn first_token() {
    println!("\nadapter is   | time to first token, ms: median    p90");
    let names = adapter_names();
    let largest = names.iter().max_by_key(|name| {
        let file = demo::demo().join("adapters").join(name).join("adapter_model.safetensors");
        std::fs::metadata(file).expect("it is there").len()
    });
    let name = largest.expect("there are adapters");
    let case = &cases_of(name)[0];
    // Room on the device for one: another one drives it out.
    let bytes = {
        let engine = start(&ROOMY);
        block_on(engine.load_adapter(load_request(name, name))).expect("a good adapter").bytes
    };
    let engine = start(&Limits {
        adapter_bytes: bytes,
        ..ROOMY
    });
    let other = names.iter().find(|other| *other != name).expect("there are several");
    block_on(engine.load_adapter(load_request(other, other))).expect("a good adapter");
    let other_case = &cases_of(other)[0];
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..40 {
        let fresh = format!("fresh-{round}");
        let registry = engine.adapters().expect("LoRA is on");
        registry.register(load_request(&fresh, name)).expect("a new name");
        times[2].push(time_to_first_token(&engine, case, &fresh));
        times[0].push(time_to_first_token(&engine, case, &fresh));
        time_to_first_token(&engine, other_case, other);
        times[1].push(time_to_first_token(&engine, case, &fresh));
        time_to_first_token(&engine, other_case, other);
        unload(&engine, &fresh);
    }
    for (place, mut times) in ["on the device", "in host memory", "on disk"].into_iter().zip(times) {
        times.sort_unstable();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        println!("{place:14} | {:29.2} {:6.2}", ms(times[20]), ms(times[36]));
    }
}

/// Four base-model streams, with and without a hundred loads a second beside them.
fn between_tokens() {
    println!("\nloads a second | time between other requests' tokens, ms: median    p99    max");
    let engine = start(&ROOMY);
    let names = adapter_names();
    let case = goldens()
        .into_iter()
        .filter(|case| case.adapter.is_none())
        .max_by_key(|case| case.output_tokens.len())
        .expect("cases");
    for loads_per_second in [0, 100, 0, 100] {
        let stop = AtomicBool::new(false);
        let mut gaps = Vec::new();
        let loads = std::thread::scope(|scope| {
            let loader = scope.spawn(|| {
                let started = Instant::now();
                let mut loads = 0;
                while !stop.load(Relaxed) && loads_per_second > 0 {
                    let due = Duration::from_secs_f64(f64::from(loads) / f64::from(loads_per_second));
                    std::thread::sleep(due.saturating_sub(started.elapsed()));
                    let name = format!("loaded-{loads}");
                    let adapter = &names[loads as usize % names.len()];
                    block_on(engine.load_adapter(load_request(&name, adapter))).expect("a good adapter");
                    unload(&engine, &name);
                    loads += 1;
                }
                f64::from(loads) / started.elapsed().as_secs_f64()
            });
            let started = Instant::now();
            while started.elapsed() < Duration::from_secs(4) {
                let mut streams: Vec<_> = (0..4).map(|_| engine.submit(request(&case, None)).expect("there is room")).collect();
                let mut last = None;
                while let Some(event) = streams[0].blocking_next() {
                    if matches!(event, TokenEvent::Token { .. }) {
                        let now = Instant::now();
                        gaps.extend(last.replace(now).map(|last| now.duration_since(last)));
                    }
                }
                streams.drain(1..).for_each(|stream| check(&case, stream));
            }
            stop.store(true, Relaxed);
            loader.join().expect("the loader ends")
        });
        gaps.sort_unstable();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        println!(
            "{loads:14.0} | {:46.2} {:6.2} {:6.2}",
            ms(gaps[gaps.len() / 2]),
            ms(gaps[gaps.len() * 99 / 100]),
            ms(gaps[gaps.len() - 1])
        );
    }
}
