//! Ten thousand registered names over the demo model, each with bytes of its own, a few hundred of them in host memory at a time: every answer
//! is the golden one, memory is bounded and flat, and the counters are those of a queue that was kept by hand. A process of its own, since it
//! looks at the process's memory.

mod demo;

use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    path::Path,
    sync::Arc,
};

use demo::{Case, Limits, ROOMY, Zipf, adapter_names, assert_nothing_is_held, check, goldens, lease, random, request, start};
use polylora_engine::{FileSource, InferenceEngine, LlmEngine, LoadRequest};

const NUM_NAMES: usize = 10_000;
const MAX_LOADED: usize = 200;
const IN_FLIGHT: usize = 48;
/// Room on the device for a fraction of those.
const DEVICE_BYTES: usize = 24 << 20;

/// Weights that differ from others' by their bytes alone.
///
/// Of `number`, each bit negates a row of an A and the column of its B that belongs to it. Then `B·A` is the same, and so is every sum on the
/// way: a product of two negated numbers is the product of the two, and rounding knows no sign.
fn own_weights(weights: &[u8], number: usize) -> Vec<u8> {
    let mut own = weights.to_vec();
    let header_len = u64::from_le_bytes(weights[..8].try_into().expect("8 bytes")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&weights[8..8 + header_len]).expect("a header");
    let tensor = |name: &str| {
        let tensor = &header[name];
        let [rows, columns]: [usize; 2] = serde_json::from_value(tensor["shape"].clone()).expect("a matrix");
        let offsets: [usize; 2] = serde_json::from_value(tensor["data_offsets"].clone()).expect("its place");
        let size = (offsets[1] - offsets[0]) / (rows * columns);
        (8 + header_len + offsets[0], rows, columns, size)
    };
    let names = header.as_object().expect("tensors").keys();
    let mut pairs: Vec<&String> = names.filter(|name| name.ends_with("lora_A.weight")).collect();
    pairs.sort();
    let mut bits = 0;
    for a_name in pairs {
        let (a_start, rank, d_in, size) = tensor(a_name);
        let (b_start, d_out, b_rank, _) = tensor(&a_name.replace("lora_A", "lora_B"));
        assert_eq!(rank, b_rank);
        for component in 0..rank {
            if number >> bits & 1 == 1 {
                let a = (0..d_in).map(|column| a_start + (component * d_in + column) * size);
                let b = (0..d_out).map(|row| b_start + (row * rank + component) * size);
                // The sign is the last byte's first bit, whatever the dtype.
                a.chain(b).for_each(|start| own[start + size - 1] ^= 0x80);
            }
            bits += 1;
            if NUM_NAMES >> bits == 0 {
                return own;
            }
        }
    }
    panic!("{bits} components are too few for {NUM_NAMES} names");
}

/// The names' folders; one is written when it is asked for first.
struct Folders {
    root: tempfile::TempDir,
    adapters: Vec<String>,
}

impl Folders {
    fn load_request(&self, number: usize) -> LoadRequest {
        let folder = self.root.path().join(number.to_string());
        LoadRequest {
            name: name(number),
            source: folder.display().to_string(),
            files: FileSource::Directory(folder),
            pinned: false,
            replace: false,
            expected_version: None,
        }
    }

    fn write(&self, number: usize) {
        let from = demo::demo().join("adapters").join(&self.adapters[number % self.adapters.len()]);
        let to = self.root.path().join(number.to_string());
        fs::create_dir(&to).expect("a new folder");
        let copy = |file: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
            let read = |folder: &Path| fs::read(folder.join(file)).expect("a file of the demo");
            fs::write(to.join(file), change(read(&from))).expect("room on the disk");
        };
        copy("adapter_config.json", &|bytes| bytes);
        copy("adapter_model.safetensors", &|bytes| own_weights(&bytes, number));
    }
}

fn name(number: usize) -> String {
    format!("adapter-{number}")
}

/// What happened so far, as it should be.
#[derive(Default)]
struct Expected {
    asked: BTreeSet<usize>,
    /// The names in host memory, the one used last at the end.
    loaded: VecDeque<usize>,
    requests: u64,
    hits: u64,
    evictions: u64,
}

impl Expected {
    /// One more request.
    fn ask(&mut self, number: usize) {
        self.requests += 1;
        self.asked.insert(number);
        match self.loaded.iter().position(|loaded| *loaded == number) {
            Some(place) => {
                self.loaded.remove(place);
                self.hits += 1;
            }
            None if self.loaded.len() == MAX_LOADED => {
                self.loaded.pop_front();
                self.evictions += 1;
            }
            None => {}
        }
        self.loaded.push_back(number);
    }
}

struct Traffic {
    engine: Arc<LlmEngine>,
    folders: Folders,
    cases_of: Vec<Vec<Case>>,
    zipf: Zipf,
    random: u64,
    expected: Expected,
}

impl Traffic {
    /// Sends `num_requests` by Zipf's law and checks every answer.
    fn run(&mut self, num_requests: usize) {
        let mut in_flight = VecDeque::new();
        for _ in 0..num_requests {
            if in_flight.len() == IN_FLIGHT {
                let (case, stream): (&Case, _) = in_flight.pop_front().expect("it is full");
                check(case, stream);
            }
            let number = self.zipf.draw(&mut self.random);
            if !self.expected.asked.contains(&number) {
                self.folders.write(number);
            }
            self.expected.ask(number);
            let cases = &self.cases_of[number % self.cases_of.len()];
            let case = &cases[random(&mut self.random, cases.len())];
            let lease = lease(&self.engine, &name(number));
            in_flight.push_back((case, self.engine.submit(request(case, Some(lease))).expect("there is room")));
            let stats = self.engine.stats();
            assert!(stats.registry.loaded <= MAX_LOADED, "{} adapters in host memory", stats.registry.loaded);
            assert!(stats.device_adapter_bytes <= stats.device_adapter_capacity_bytes);
        }
        in_flight.into_iter().for_each(|(case, stream)| check(case, stream));
    }

    /// Compares the counters with what happened.
    fn check_counters(&self) {
        let (stats, expected) = (self.engine.stats(), &self.expected);
        let misses = expected.requests - expected.hits;
        let registry = &stats.registry;
        assert_eq!((registry.hits_total, registry.misses_total), (expected.hits, misses));
        assert_eq!((registry.loads_total, registry.load_failures_total), (misses, 0));
        assert_eq!((registry.evictions_total, registry.loaded), (expected.evictions, expected.loaded.len()));
        assert_eq!(stats.device_hits_total + stats.device_misses_total, expected.requests);
        let adapters = self.engine.adapters().expect("LoRA is on");
        let residents = adapters.residents();
        assert_eq!(stats.device_uploads_total - stats.device_evictions_total, residents.len() as u64);
        let infos = adapters.list();
        let versions: BTreeSet<_> = infos.iter().filter_map(|info| info.version.as_ref()).collect();
        assert_eq!(versions.len(), expected.asked.len(), "each has a content of its own");
        assert_eq!(infos.iter().map(|info| info.hits_total).sum::<u64>(), expected.hits);
        let loaded = infos
            .iter()
            .filter(|info| expected.loaded.iter().any(|number| *info.name == *name(*number)));
        assert_eq!(loaded.map(|info| info.bytes).sum::<usize>(), registry.loaded_bytes);
        let by_adapter = self.engine.adapter_stats();
        assert_eq!(by_adapter.iter().map(|stats| stats.requests_total).sum::<u64>(), expected.requests);
        assert_eq!(by_adapter.iter().map(|stats| stats.admitted_total).sum::<u64>(), expected.requests);
    }
}

#[cfg(target_os = "linux")]
fn resident_bytes() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").expect("Linux has it");
    let pages: usize = statm.split(' ').nth(1).and_then(|field| field.parse().ok()).expect("pages");
    pages * 4096
}

#[test]
fn ten_thousand_names_with_bytes_of_their_own_give_their_golden_answers_in_bounded_memory() {
    let engine = start(&Limits {
        max_loaded: Some(MAX_LOADED),
        max_running: 32,
        adapter_bytes: DEVICE_BYTES,
        // Full of cached prefixes, which no two names share, before memory is looked at.
        num_blocks: 512,
        ..ROOMY
    });
    let adapters = adapter_names();
    let goldens = goldens();
    let golden_of = |name: &String| goldens.iter().filter(|case| case.adapter.as_ref() == Some(name)).cloned().collect();
    let mut traffic = Traffic {
        engine: engine.clone(),
        cases_of: adapters.iter().map(golden_of).collect(),
        folders: Folders {
            root: tempfile::tempdir().expect("a folder"),
            adapters,
        },
        zipf: Zipf::new(NUM_NAMES),
        random: 1,
        expected: Expected::default(),
    };
    let registry = engine.adapters().expect("LoRA is on");
    for number in 0..NUM_NAMES {
        registry.register(traffic.folders.load_request(number)).expect("a new name");
    }
    assert_eq!(engine.stats().registry.registered, NUM_NAMES);
    traffic.run(600);
    assert_eq!(traffic.expected.loaded.len(), MAX_LOADED, "host memory is full");
    let stats = engine.stats();
    assert!(stats.cached_blocks > 480, "{} of 512 blocks have cached prefixes", stats.cached_blocks);
    traffic.check_counters();
    #[cfg(target_os = "linux")]
    let before = resident_bytes();
    let loads_before = engine.stats().registry.loads_total;
    traffic.run(1000);
    traffic.check_counters();
    assert_nothing_is_held(&engine);
    let stats = engine.stats();
    assert!(stats.device_evictions_total > 0, "the device was full, too");
    let loads = (stats.registry.loads_total - loads_before) as usize;
    let came_and_went = loads * (stats.registry.loaded_bytes / MAX_LOADED);
    // On a GPU they take half of what they take in f32.
    assert!(came_and_went > 64 << 20, "{came_and_went} bytes in {loads} loads");
    #[cfg(target_os = "linux")]
    {
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 24 << 20, "{grown} bytes more than before {loads} loads");
    }
}
