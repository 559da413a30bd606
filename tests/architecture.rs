//! The invariants of ARCHITECTURE.md that a compiler doesn't check.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every Rust source below `directory`, with the path from the root.
fn rust_files(directory: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(directory)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root()).unwrap().to_path_buf(), text));
            }
        }
    }
    assert!(!found.is_empty(), "{directory} holds Rust files");
    found
}

/// The code of a source file, without its line comments: a doc comment may speak of what the code must not do.
fn code(text: &str) -> String {
    text.lines()
        .map(|line| line.split_once("//").map_or(line, |(before, _)| before))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Whether `word` stands in `text` as a word of its own.
fn mentions(text: &str, word: &str) -> bool {
    text.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|found| found == word)
}

/// Whether `package` with its default features depends on `dependency`, through however many others.
fn depends_on(package: &[&str], dependency: &str) -> bool {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--edges", "normal", "--invert", dependency])
        .args(package)
        .current_dir(root())
        .output()
        .expect("cargo runs: it started this test");
    let message = String::from_utf8_lossy(&output.stderr);
    // Any other failure must not pass for "does not depend".
    let absent = message.contains("did not match any packages");
    assert!(output.status.success() || absent, "cargo tree: {message}");
    output.status.success()
}

#[test]
fn engine_knows_neither_http_nor_templates() {
    for dependency in ["axum", "http", "hyper", "tower", "minijinja", "utoipa"] {
        assert!(
            depends_on(&["--package", "polylora"], dependency),
            "the gateway uses {dependency}; is the name right?"
        );
        assert!(
            !depends_on(&["--package", "polylora-engine"], dependency),
            "the engine must not depend on {dependency}"
        );
    }
}

/// candle-core depends on tokenizers, so the engine's tree has it; the engine itself must not use it.
#[test]
fn engine_takes_token_ids_not_text() {
    let manifest = read("engine/Cargo.toml");
    for dependency in ["tokenizers", "toktrie", "llguidance"] {
        assert!(!mentions(&manifest, dependency), "engine/Cargo.toml names {dependency}");
        assert!(
            mentions(&read("Cargo.toml"), dependency),
            "the gateway uses {dependency}; is the name right?"
        );
    }
    for (path, text) in rust_files("engine/src") {
        assert!(!mentions(&code(&text), "tokenizers"), "{} uses tokenizers", path.display());
    }
}

#[test]
fn arrows_go_one_way() {
    assert!(depends_on(&["--package", "polylora"], "polylora-kernels"));
    assert!(!depends_on(&["--package", "polylora-kernels"], "polylora-engine"));
    assert!(!mentions(&read("kernels/Cargo.toml").replace('-', "_"), "polylora_engine"));
    assert!(
        !mentions(&read("engine/Cargo.toml").replace("polylora-kernels", ""), "path"),
        "the engine depends on no other crate of the workspace"
    );
}

/// The gateway reaches a device through `InferenceEngine` only.
#[test]
fn gateway_does_not_touch_kernels() {
    for (path, text) in rust_files("src") {
        assert!(!mentions(&code(&text), "polylora_kernels"), "{} reaches past the engine", path.display());
    }
}

#[test]
fn nothing_of_cuda_is_built_by_default() {
    assert!(!depends_on(&["--workspace"], "cudarc"), "the default features pull in cudarc");
    assert!(
        read("Cargo.lock").contains("name = \"cudarc\""),
        "the feature cuda has it; is the name right?"
    );
}

/// `unsafe` lives in the kernels, in the CUDA backend, and in files.rs, which maps files and gives their pages back.
#[test]
fn unsafe_stays_where_it_belongs() {
    let mut in_files = 0;
    for directory in ["src", "engine/src"] {
        for (path, text) in rust_files(directory) {
            let count = code(&text)
                .split(|c: char| !(c.is_alphanumeric() || c == '_'))
                .filter(|word| *word == "unsafe")
                .count();
            if path == Path::new("engine/src/files.rs") {
                in_files = count;
            } else if !path.starts_with("engine/src/backend/cuda") {
                assert_eq!(count, 0, "{} has unsafe code", path.display());
            }
        }
    }
    assert_eq!(
        in_files, 2,
        "engine/src/files.rs maps files in one place and gives their pages back in one"
    );
}

/// (state, arrivals) -> StepBatch: nothing that waits, measures time or knows a device. An upload's error is plain data, and may pass through.
#[test]
fn scheduler_is_pure() {
    for path in ["scheduler", "block_pool", "sequence", "fairness"] {
        let path = format!("engine/src/{path}.rs");
        let text = read(&path);
        let product = code(text.split("#[cfg(test)]").next().unwrap()).replace("backend::BackendError", "");
        for word in [
            "tokio",
            "candle_core",
            "backend",
            "decoder",
            "Instant",
            "SystemTime",
            "thread",
            "fs",
            "net",
            "async",
            "tokenizers",
        ] {
            assert!(!mentions(&product, word), "{path} mentions {word}");
        }
    }
}

/// One reader of flags, environment and files; the Hub client reads what the Hub documents (HF_HOME, HF_TOKEN, …).
#[test]
fn only_config_reads_the_environment() {
    for (path, text) in rust_files("src") {
        let stem = path.to_string_lossy().into_owned();
        if matches!(stem.as_str(), "src/config.rs" | "src/hub.rs") {
            continue;
        }
        let product = code(text.split("#[cfg(test)]").next().unwrap());
        assert!(!product.contains("env::var"), "{stem} reads the environment");
    }
}

/// The README's first block is what a newcomer types; CI types the same.
#[test]
fn ci_runs_the_readme_s_test_command() {
    let command = "cargo test --workspace";
    assert!(read("README.md").lines().any(|line| line.split('#').next().unwrap().trim() == command));
    assert!(read(".ci/run").contains(&format!("step_test() {{ {command}; }}")));
}

/// An invariant that nobody checks is a wish.
#[test]
fn every_invariant_names_tests_that_exist() {
    let text = read("ARCHITECTURE.md");
    let table = text
        .split("## Invariants")
        .nth(1)
        .and_then(|rest| rest.split("\n## ").next())
        .expect("a section on invariants");
    let rows: Vec<_> = table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| ---"))
        .skip(1)
        .collect();
    assert!(rows.len() >= 10, "{} invariants", rows.len());
    let sources: Vec<_> = ["src", "engine", "kernels/src", "tests"].into_iter().flat_map(rust_files).collect();
    for row in rows {
        let tests: Vec<_> = row.split('|').nth(2).expect("a second column").split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "{row}");
        for test in tests {
            let exists = sources.iter().any(|(_, text)| text.contains(&format!("fn {test}(")));
            assert!(exists, "no test is called {test}: {row}");
        }
    }
}
