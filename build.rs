//! Writes the table of the demo's files that `src/demo.rs` includes: every model and adapter file under `demo/base` and `demo/adapters/*`.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

fn main() {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let demo = root.join("demo");
    println!("cargo::rerun-if-changed={}", demo.display());

    let mut table = format!(
        "/// The base model's files.\npub static BASE: &[EmbeddedFile] = {};\n",
        file_table(&demo.join("base"))
    );
    table.push_str("/// The adapters, by name.\npub static ADAPTERS: &[EmbeddedAdapter] = &[\n");
    for adapter in sorted(&demo.join("adapters")).iter().filter(|path| path.is_dir()) {
        table.push_str(&format!(
            "    EmbeddedAdapter {{ name: {:?}, files: {} }},\n",
            file_name(adapter),
            file_table(adapter)
        ));
    }
    table.push_str("];\n");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it")).join("demo.rs");
    fs::write(&out, table).expect("cargo's output folder can be written");
}

fn file_table(folder: &Path) -> String {
    let is_model_file = |path: &&PathBuf| {
        matches!(
            path.extension().and_then(|extension| extension.to_str()),
            Some("json" | "safetensors" | "jinja")
        )
    };
    let rows: Vec<String> = sorted(folder)
        .iter()
        .filter(is_model_file)
        .map(|path| format!("EmbeddedFile {{ name: {:?}, bytes: include_bytes!({path:?}) }}", file_name(path)))
        .collect();
    format!("&[{}]", rows.join(", "))
}

/// The entries of a folder by name, so that the same tree always gives the same binary; none if it is missing.
fn sorted(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().expect("an entry of a folder has a name");
    name.to_str().expect("the demo's names are ASCII").to_owned()
}
