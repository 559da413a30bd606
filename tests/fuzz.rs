//! Every fuzz target on its seeds (`fuzz/seeds`) and on damaged copies of them: what `cargo fuzz` does for hours, in a second and the same
//! each time.

use std::{
    collections::BTreeSet,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use polylora::fuzzing::{FuzzTarget, TARGETS};

/// Damaged copies of each seed.
const COPIES: usize = 60;

fn fuzz_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = fuzz_folder().join("seeds").join(target);
    let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut seeds: Vec<_> = files
        .map(|file| file.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{} is empty", folder.display());
    seeds
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound.max(1)
    }
}

/// What parsers stumble over.
const PIECES: [&[u8]; 24] = [
    b"\0",
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"18446744073709551616",
    b"0",
    b"\\ud800",
    b"\xff\xfe",
    "\u{1f600}".as_bytes(),
    b"..",
    b"/",
    b":",
    b",",
    b"\n",
    b"{{",
    b"{%",
    b"\\",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
];

fn damaged(seed: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut data = seed.to_vec();
    for _ in 0..=random.below(3) {
        let place = random.below(data.len() + 1);
        let end = (place + random.below(16)).min(data.len());
        match random.below(6) {
            0 => data.truncate(place),
            1 if place < data.len() => data[place] ^= 1 << random.below(8),
            2 => drop(data.drain(place..end)),
            3 => drop(data.splice(place..end, PIECES[random.below(PIECES.len())].iter().copied())),
            4 => {
                let copy = data[place..end].to_vec();
                data.splice(place..place, copy);
            }
            _ => drop(data.splice(place.., other[random.below(other.len())..].iter().copied())),
        }
    }
    data
}

fn check(&(name, target): &FuzzTarget) {
    let seeds = seeds(name);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let run = |what: &str, data: &[u8]| {
        if catch_unwind(AssertUnwindSafe(|| target(data))).is_err() {
            panic!("target {name}, {what}: {:?}", String::from_utf8_lossy(data));
        }
    };
    for (seed_name, seed) in &seeds {
        run(seed_name, seed);
    }
    for (seed_name, seed) in &seeds {
        for copy in 0..COPIES {
            let other = &seeds[random.below(seeds.len())].1;
            run(&format!("copy {copy} of {seed_name}"), &damaged(seed, other, &mut random));
        }
    }
}

#[test]
fn no_file_breaks_its_reader() {
    let of_requests = ["generate", "completions", "chat_completions", "responses", "native_adapters", "grammar"];
    TARGETS.iter().filter(|(name, _)| !of_requests.contains(name)).for_each(check);
}

#[test]
fn no_body_is_the_servers_fault() {
    for name in ["generate", "completions", "chat_completions", "responses", "native_adapters"] {
        check(TARGETS.iter().find(|(target, _)| *target == name).unwrap());
    }
}

#[test]
fn no_grammar_is_the_servers_fault() {
    check(TARGETS.iter().find(|(target, _)| *target == "grammar").unwrap());
}

/// The list, the binaries of `fuzz/Cargo.toml` and the folders of seeds are the same.
#[test]
fn every_target_is_in_the_fuzz_crate() {
    let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let manifest: toml::Table = fs::read_to_string(fuzz_folder().join("Cargo.toml")).unwrap().parse().unwrap();
    let bins = manifest["bin"]
        .as_array()
        .unwrap()
        .iter()
        .map(|bin| bin["name"].as_str().unwrap().to_owned());
    assert_eq!(bins.collect::<BTreeSet<_>>(), names);
    let folders = fs::read_dir(fuzz_folder().join("seeds")).unwrap();
    assert_eq!(
        folders
            .map(|folder| folder.unwrap().file_name().into_string().unwrap())
            .collect::<BTreeSet<_>>(),
        names
    );
    for name in names {
        let source = fs::read_to_string(fuzz_folder().join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(source.contains(&format!("polylora::fuzzing::{name}(data)")), "{source}");
    }
}
