//! What adapters cost when there are many: on the CPU, every answer checked.
//!
//! `cargo bench -p polylora-engine --bench adapter_lifecycle [-- TABLE...]`, on a machine that does nothing else. Tables: throughput by the
//! number of registered names (`demo`, `random`: of the demo model, and of one whose steps take longer); time to the first token by where
//! the adapter is (`first-token`); the time between other requests' tokens while adapters are loaded (`between-tokens`).
//! Engine and clients have a thread each, so that two cores are enough and no thread takes another's place in mid-step.

#[path = "../tests/demo/mod.rs"]
mod demo;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use demo::{
    Case, Limits, ROOMY, Zipf, adapter_names, check, check_events, demo as demo_folder, goldens, lease, load_request, random, request, start,
    start_random, unload,
};
use futures::{executor::block_on, future::join_all};
use polylora_engine::{FileSource, InferenceEngine, LlmEngine, LoadRequest, TokenEvent, adapter::Projection, decoder::DecoderConfig};
use safetensors::{Dtype, tensor::TensorView};

fn main() {
    // `cargo bench` passes `--bench`.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let is_wanted = |table: &str| wanted.is_empty() || wanted.iter().any(|name| name == table);
    if is_wanted("demo") {
        throughput("demo model", &Work::demo(), start, 12, 40);
    }
    if is_wanted("random") {
        let folder = tempfile::tempdir().expect("room for 16 adapters");
        let work = Work::random(folder.path());
        throughput("11 million parameters, random", &work, |limits| start_random(shape(), limits), 2, 20);
    }
    if is_wanted("first-token") {
        first_token();
    }
    if is_wanted("between-tokens") {
        between_tokens();
    }
}

fn cases_of(name: &str) -> Vec<Case> {
    goldens().into_iter().filter(|case| case.adapter.as_deref() == Some(name)).collect()
}

/// The limits of the issue's figure: 200 names in host memory, 16 adapters in a batch.
const MANY: Limits = Limits {
    max_loaded: Some(200),
    max_running: 32,
    num_threads: 1,
    ..ROOMY
};
/// Clients that each have one request at a time.
const CLIENTS: usize = 48;

/// What is asked for: folders of adapters, and requests on each with their answers.
struct Work {
    folders: Vec<FileSource>,
    cases: Vec<Vec<Case>>,
}

impl Work {
    fn demo() -> Self {
        let names = adapter_names();
        Self {
            folders: names
                .iter()
                .map(|name| FileSource::Directory(demo_folder().join("adapters").join(name)))
                .collect(),
            cases: names.iter().map(|name| cases_of(name)).collect(),
        }
    }

    /// Sixteen adapters of rank 16 on all projections of a random model; their answers are what each gives alone.
    fn random(folder: &Path) -> Self {
        let decoder = shape();
        let folders: Vec<FileSource> = (0..16).map(|number| write_adapter(folder, &decoder, number)).collect();
        let engine = start_random(decoder, &Limits { max_loaded: None, ..MANY });
        let mut state = 1;
        let cases = folders
            .iter()
            .map(|files| {
                let load = LoadRequest {
                    files: files.clone(),
                    ..load_request("alone", "")
                };
                block_on(engine.load_adapter(load)).expect("a good adapter");
                let cases = (0..4).map(|_| {
                    let mut case = Case {
                        adapter: Some("alone".to_owned()),
                        prompt_tokens: (0..32).map(|_| random(&mut state, 4000) as u32).collect(),
                        output_tokens: vec![0; 16],
                        ended_by_stop: false,
                        top_logprobs: Vec::new(),
                    };
                    let mut stream = engine.submit(request(&case, Some(lease(&engine, "alone")))).expect("there is room");
                    case.output_tokens.clear();
                    while let Some(event) = stream.blocking_next() {
                        if let TokenEvent::Token { token_id, .. } = event {
                            case.output_tokens.push(token_id);
                        }
                    }
                    case
                });
                let cases = cases.collect();
                unload(&engine, "alone");
                cases
            })
            .collect();
        Self { folders, cases }
    }

    fn register(&self, engine: &LlmEngine, num_names: usize) {
        let registry = engine.adapters().expect("LoRA is on");
        for number in 0..num_names {
            let request = LoadRequest {
                files: self.folders[number % self.folders.len()].clone(),
                ..load_request(&format!("adapter-{number}"), "")
            };
            registry.register(request).expect("a new name");
        }
    }
}

fn shape() -> DecoderConfig {
    let json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": true
    });
    DecoderConfig::from_json(json.to_string().as_bytes(), None).expect("a valid configuration")
}

fn write_adapter(folder: &Path, decoder: &DecoderConfig, number: u64) -> FileSource {
    let directory = folder.join(number.to_string());
    std::fs::create_dir(&directory).expect("a new folder");
    let config = serde_json::json!({
        "peft_type": "LORA", "r": 16, "lora_alpha": 16,
        "target_modules": Projection::ALL.map(Projection::module_name),
    });
    std::fs::write(directory.join("adapter_config.json"), config.to_string()).expect("room");
    let mut state = number;
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for layer in 0..decoder.num_layers {
        for projection in Projection::ALL {
            let (d_in, d_out) = projection_shape(decoder, projection);
            for (form, shape) in [("lora_A", vec![16, d_in]), ("lora_B", vec![d_out, 16])] {
                let len = shape.iter().product::<usize>();
                let value = |_| (random(&mut state, 2001) as f32 - 1000.0) * 5e-5;
                let bytes = (0..len).map(value).flat_map(f32::to_le_bytes).collect();
                let module = format!("model.layers.{layer}.{}.{}", projection.parent(), projection.module_name());
                tensors.insert(format!("base_model.model.{module}.{form}.weight"), (shape, bytes));
            }
        }
    }
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).expect("as many bytes as its shape says"),
        )
    });
    safetensors::serialize_to_file(views, None, &directory.join("adapter_model.safetensors")).expect("room");
    FileSource::Directory(directory)
}

fn projection_shape(decoder: &DecoderConfig, projection: Projection) -> (usize, usize) {
    let (hidden, kv) = (decoder.hidden_size, decoder.kv_size());
    let query = decoder.num_heads * decoder.head_dim;
    match projection {
        Projection::Q => (hidden, query),
        Projection::K | Projection::V => (hidden, kv),
        Projection::O => (query, hidden),
        Projection::Gate | Projection::Up => (hidden, decoder.intermediate_size),
        Projection::Down => (decoder.intermediate_size, hidden),
    }
}

/// One turn: every client's requests, by Zipf's law over 10,000, folded into as many names as there are. Gives output tokens a second.
async fn turn(engine: &LlmEngine, work: &Work, zipf: &Zipf, num_names: usize, seed: usize, requests_each: usize) -> f64 {
    let started = Instant::now();
    let client = async |client: usize| {
        let mut state = (seed * CLIENTS + client) as u64;
        let mut tokens = 0;
        for _ in 0..requests_each {
            let number = zipf.draw(&mut state);
            let of = &work.cases[number % work.cases.len()];
            let case = &of[random(&mut state, of.len())];
            let name = format!("adapter-{}", number % num_names);
            let lease = engine.acquire_adapter(&name).await.expect("it is registered");
            let mut stream = engine.submit(request(case, Some(lease))).expect("there is room");
            let mut events = Vec::new();
            while let Some(event) = stream.next().await {
                events.push(event);
            }
            check_events(case, events);
            tokens += case.output_tokens.len();
        }
        tokens
    };
    let tokens: usize = join_all((0..CLIENTS).map(client)).await.into_iter().sum();
    tokens as f64 / started.elapsed().as_secs_f64()
}

/// Output tokens a second of Zipf traffic over 16 names, over 16 again (what chance does), and over 10,000. All get the same prompts on the
/// same weights in the same order, in turns and with the order of the turns turned round: only the number of names differs, and the loads
/// that come with it. A turn's ratio is to the turn of the 16 beside it.
fn throughput(model: &str, work: &Work, start: impl Fn(&Limits) -> Arc<LlmEngine>, requests_each: usize, num_turns: usize) {
    println!("\n{model}");
    println!(
        "registered names | output tokens/s: median (p10, p90) | host loads/s | ms of a load | ratio to 16 names, of turns: median [95 % interval]"
    );
    let zipf = Zipf::new(10_000);
    let engines = [16, 16, 10_000].map(|num_names| {
        let engine = start(&MANY);
        work.register(&engine, num_names);
        // Warm: the host tier is full, prompts' first blocks are cached.
        for seed in 0..3 {
            block_on(turn(&engine, work, &zipf, num_names, seed, requests_each));
        }
        (num_names, engine)
    });
    let loads = || {
        engines
            .each_ref()
            .map(|(_, engine)| (engine.stats().registry.loads_total, engine.stats().registry.load_seconds_total))
    };
    let before = loads();
    let mut rates = [const { Vec::new() }; 3];
    let mut seconds = [0.0; 3];
    for seed in 3..3 + num_turns {
        let mut order = [0, 1, 2];
        order.rotate_left(seed % 3);
        if seed % 2 == 1 {
            order.reverse();
        }
        for place in order {
            let (num_names, engine) = &engines[place];
            let began = Instant::now();
            rates[place].push(block_on(turn(engine, work, &zipf, *num_names, seed, requests_each)));
            seconds[place] += began.elapsed().as_secs_f64();
        }
    }
    let after = loads();
    for (place, (num_names, _)) in engines.iter().enumerate() {
        let ratios = sorted(rates[place].iter().zip(&rates[0]).map(|(rate, base)| rate / base));
        let rates = sorted(rates[place].iter().copied());
        let at = |values: &[f64], share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
        let num_loads = after[place].0 - before[place].0;
        let ms = 1e3 * (after[place].1 - before[place].1) / num_loads.max(1) as f64;
        let (low, high) = interval_of_median(&ratios);
        println!(
            "{num_names:16} | {:12.0} ({:6.0}, {:6.0}) | {:12.0} | {ms:12.3} | {:.3} [{low:.3}, {high:.3}]",
            at(&rates, 0.5),
            at(&rates, 0.1),
            at(&rates, 0.9),
            num_loads as f64 / seconds[place],
            at(&ratios, 0.5),
        );
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The 95 % confidence interval of the median that holds for any distribution: from order statistics, by the binomial law (normal
/// approximation).
fn interval_of_median(sorted: &[f64]) -> (f64, f64) {
    let len = sorted.len() as f64;
    let low = ((len - 1.96 * len.sqrt()) / 2.0).floor().max(0.0) as usize;
    (sorted[low], sorted[sorted.len() - 1 - low])
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
    println!("\nadapter is     | time to first token, ms: median    p90");
    let names = adapter_names();
    let largest = names.iter().max_by_key(|name| {
        let file = demo_folder().join("adapters").join(name).join("adapter_model.safetensors");
        std::fs::metadata(file).expect("it is there").len()
    });
    let name = largest.expect("there are adapters");
    let case = &cases_of(name)[0];
    // Room on the device for one: another one drives it out.
    let bytes = {
        let engine = start(&Limits { num_threads: 1, ..ROOMY });
        block_on(engine.load_adapter(load_request(name, name))).expect("a good adapter").bytes
    };
    let engine = start(&Limits {
        adapter_bytes: bytes,
        num_threads: 1,
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

/// Four base-model streams, with and without a hundred loads a second beside them, in turns.
fn between_tokens() {
    println!("\nloads a second | time between other requests' tokens, ms: median of turns of p50    p99    max, each with least and most");
    let engine = start(&Limits { num_threads: 1, ..ROOMY });
    let case = goldens()
        .into_iter()
        .filter(|case| case.adapter.is_none())
        .max_by_key(|case| case.output_tokens.len())
        .expect("cases");
    let mut turns = [const { Vec::new() }; 2];
    for _ in 0..9 {
        for (turns, loads_per_second) in turns.iter_mut().zip([0, 100]) {
            turns.push(gaps_beside_loads(&engine, &case, loads_per_second));
        }
    }
    for turns in turns {
        let column = |of: fn(&Gaps) -> f64| {
            let values = sorted(turns.iter().map(of));
            format!("{:.2} ({:.2}, {:.2})", values[values.len() / 2], values[0], values[values.len() - 1])
        };
        let loads = sorted(turns.iter().map(|turn| turn.loads_per_second))[turns.len() / 2];
        println!(
            "{loads:14.0} | {} {} {}",
            column(|turn| turn.p50),
            column(|turn| turn.p99),
            column(|turn| turn.max)
        );
    }
}

/// Of one turn, in milliseconds.
struct Gaps {
    loads_per_second: f64,
    p50: f64,
    p99: f64,
    max: f64,
}

fn gaps_beside_loads(engine: &LlmEngine, case: &Case, loads_per_second: u32) -> Gaps {
    let names = adapter_names();
    let stop = AtomicBool::new(false);
    let mut gaps = Vec::new();
    let loads_per_second = std::thread::scope(|scope| {
        let loader = scope.spawn(|| {
            let started = Instant::now();
            let mut loads = 0;
            while !stop.load(Relaxed) && loads_per_second > 0 {
                let due = Duration::from_secs_f64(f64::from(loads) / f64::from(loads_per_second));
                std::thread::sleep(due.saturating_sub(started.elapsed()));
                let name = format!("loaded-{loads}");
                let adapter = &names[loads as usize % names.len()];
                block_on(engine.load_adapter(load_request(&name, adapter))).expect("a good adapter");
                unload(engine, &name);
                loads += 1;
            }
            f64::from(loads) / started.elapsed().as_secs_f64()
        });
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(3) {
            let mut streams: Vec<_> = (0..4).map(|_| engine.submit(request(case, None)).expect("there is room")).collect();
            let mut last = None;
            while let Some(event) = streams[0].blocking_next() {
                if matches!(event, TokenEvent::Token { .. }) {
                    let now = Instant::now();
                    gaps.extend(last.replace(now).map(|last| 1e3 * now.duration_since(last).as_secs_f64()));
                }
            }
            streams.drain(1..).for_each(|stream| check(case, stream));
        }
        stop.store(true, Relaxed);
        loader.join().expect("the loader ends")
    });
    let gaps = sorted(gaps.into_iter());
    Gaps {
        loads_per_second,
        p50: gaps[gaps.len() / 2],
        p99: gaps[gaps.len() * 99 / 100],
        max: gaps[gaps.len() - 1],
    }
}
