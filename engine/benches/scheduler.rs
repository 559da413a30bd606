//! Host time of one step without a device: `schedule` and `commit` over a batch that decodes, with and without a long queue behind it.
//!
//! `cargo bench -p polylora-engine --bench scheduler`. What it prints is what the engine thread adds to a step before and after the
//! device's part of it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use polylora_engine::{
    AdapterLease, GenerationRequest, LogprobsParams, RequestId, SamplingParams,
    adapter::{AlignedBytes, HostAdapter, PackedDtype, VersionId},
    backend::BackendError,
    batch::{AdapterHandle, SampleOutput, StepOutput},
    residency::{AdapterResidency, BlocksFor, KvBlocks, Residency, ResidentAdapter},
    scheduler::{Scheduler, SchedulerConfig},
    sequence::Sequence,
};

/// Everything fits.
struct AllResident(Vec<Arc<ResidentAdapter>>);

impl AdapterResidency for AllResident {
    fn request(&mut self, adapter: &Arc<HostAdapter>, _cache: &mut dyn KvBlocks) -> Result<Residency, BackendError> {
        let number = u32::from_be_bytes(adapter.version.0[..4].try_into().expect("4 bytes"));
        Ok(Residency::Ready(self.0[number as usize].clone()))
    }

    fn prefetch(&mut self, _adapter: &Arc<HostAdapter>, _cache: &mut dyn KvBlocks) -> Result<Option<bool>, BackendError> {
        Ok(Some(true))
    }

    fn make_blocks(&mut self, _missing: usize, _whose: BlocksFor, _cache: &mut dyn KvBlocks) -> Result<bool, BackendError> {
        Ok(false)
    }
}

struct Case {
    running: usize,
    adapters: usize,
    waiting: usize,
    prompt: usize,
}

const STEPS: usize = 400;
/// Output tokens of each sequence: more than `STEPS`, since the first ones decode while the last are prefilled.
const OUTPUT_LEN: usize = 1000;

fn main() {
    println!("running adapters waiting prompt | schedule + commit per step, µs: median    p10    p90");
    for (running, adapters, waiting, prompt) in [
        (1, 0, 0, 128),
        (64, 64, 0, 128),
        (256, 0, 0, 128),
        (256, 64, 0, 128),
        (256, 64, 0, 4096),
        (256, 64, 2000, 128),
    ] {
        let case = Case {
            running,
            adapters,
            waiting,
            prompt,
        };
        let mut times = measure(&case);
        times.sort_unstable();
        let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e6;
        println!(
            "{running:7} {adapters:8} {waiting:7} {prompt:6} | {:39.1} {:6.1} {:6.1}",
            at(50),
            at(10),
            at(90)
        );
    }
}

fn measure(case: &Case) -> Vec<Duration> {
    let block_size = 16;
    let blocks_each = (case.prompt + OUTPUT_LEN).div_ceil(block_size) + 1;
    let mut scheduler = Scheduler::new(SchedulerConfig {
        num_blocks: (case.running + 1) * blocks_each,
        min_blocks: (case.running + 1) * blocks_each,
        block_size,
        token_budget: 8192,
        mixed_prefill_tokens: 8192,
        max_running_requests: case.running,
        max_loras_per_batch: case.adapters.max(1),
        prefix_caching: true,
        min_awaited_tokens: 64,
        eos_token_ids: vec![0],
        overtake_limit: 1024,
    });
    let host: Vec<_> = (0..case.adapters as u32).map(host_adapter).collect();
    let mut residency = AllResident(host.iter().zip(0..).map(|(adapter, handle)| resident(adapter, handle)).collect());
    for number in 0..case.running + case.waiting {
        let lease = (!host.is_empty()).then(|| {
            let adapter = &host[number % host.len()];
            AdapterLease::detached("adapter".into(), adapter.clone(), None)
        });
        scheduler.add(Sequence::new(RequestId(number as u64), request(number, case.prompt, lease)));
    }
    let mut events = Vec::new();
    let mut times = Vec::new();
    while times.len() < STEPS {
        let started = Instant::now();
        let schedule = scheduler.schedule(&mut residency).expect("nothing fails here");
        let step = schedule.step.expect("there is work");
        let scheduled = started.elapsed();
        let is_decode = step.batch.token_ids.len() == case.running;
        let sample = SampleOutput {
            token_id: Some(7),
            ..SampleOutput::default()
        };
        let output = StepOutput {
            samples: vec![sample; step.batch.samples.len()],
        };
        let started = Instant::now();
        scheduler.commit(step, output, &mut events).expect("the output belongs to the step");
        let committed = started.elapsed();
        events.clear();
        if is_decode {
            times.push(scheduled + committed);
        }
    }
    assert_eq!(scheduler.num_running(), case.running);
    assert_eq!(scheduler.counters().preemptions, 0);
    times
}

fn host_adapter(number: u32) -> Arc<HostAdapter> {
    let mut version = [0; 32];
    version[..4].copy_from_slice(&number.to_be_bytes());
    Arc::new(HostAdapter {
        version: VersionId(version),
        dtype: PackedDtype::F32,
        modules: Vec::new(),
        replaced: Vec::new(),
        token_rows: Vec::new(),
        resized_vocab: None,
        companion: None,
        blob: Arc::new(AlignedBytes::zeroed(64)),
        max_lora_rank: 16,
    })
}

fn resident(adapter: &HostAdapter, handle: u32) -> Arc<ResidentAdapter> {
    Arc::new(ResidentAdapter {
        version: adapter.version,
        handle: AdapterHandle(handle),
    })
}

fn request(number: usize, prompt: usize, adapter: Option<AdapterLease>) -> GenerationRequest {
    GenerationRequest {
        prompt_tokens: (0..prompt).map(|position| ((number * 31 + position) % 1000) as u32 + 1).collect(),
        sampling: SamplingParams {
            max_tokens: OUTPUT_LEN as u32,
            temperature: 0.0,
            ..SamplingParams::default()
        },
        adapter,
        logprobs: LogprobsParams::default(),
        constraint: None,
        fairness_key: "".into(),
    }
}
