//! Compiles the CUDA kernels when the feature `cuda` is on: each `cuda/*.cu` to one fatbin, all of them embedded by `images.rs`.
//!
//! nvcc is looked for in `$CUDA_NVCC`, `$CUDA_HOME/bin`, `$CUDA_PATH/bin`, the PyPI wheels of `$VIRTUAL_ENV` and of `.cuda/` in the
//! repository, `$PATH`, and `/usr/local/cuda/bin`. No GPU and no driver are needed. `KERNEL_ARCHES=90a` (a comma-separated list) keeps a
//! developer's build short; the default serves every card from Ampere on.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};

/// Cubins for these, and PTX of the first for cards that are newer than all.
const DEFAULT_ARCHES: &str = "80,86,89,90a";
const NVCC_VARIABLES: [&str; 5] = ["CUDA_NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "PATH"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-env-changed=KERNEL_ARCHES");
    for variable in NVCC_VARIABLES {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let sources = sources(Path::new("cuda"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    compile_all(&find_nvcc(), &sources, &out);
    fs::write(out.join("images.rs"), images(&sources, &out)).expect("OUT_DIR is writable");
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut sources: Vec<PathBuf> = fs::read_dir(folder)
        .expect("kernels/cuda is there")
        .map(|entry| entry.expect("kernels/cuda can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    sources
}

fn find_nvcc() -> PathBuf {
    let variable = |name: &str| env::var_os(name).map(PathBuf::from);
    let mut candidates = Vec::new();
    candidates.extend(variable("CUDA_NVCC"));
    candidates.extend(variable("CUDA_HOME").map(|home| home.join("bin/nvcc")));
    candidates.extend(variable("CUDA_PATH").map(|home| home.join("bin/nvcc")));
    let repository = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("..");
    for venv in variable("VIRTUAL_ENV").into_iter().chain([repository.join(".cuda")]) {
        for python in fs::read_dir(venv.join("lib")).into_iter().flatten().flatten() {
            candidates.push(python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
        }
    }
    if let Some(path) = env::var_os("PATH") {
        candidates.extend(env::split_paths(&path).map(|folder| folder.join("nvcc")));
    }
    candidates.push("/usr/local/cuda/bin/nvcc".into());
    match candidates.iter().find(|candidate| candidate.is_file()) {
        Some(nvcc) => nvcc.clone(),
        None => panic!(
            "the feature `cuda` needs nvcc (CUDA 13.0; PyPI's nvidia-cuda-nvcc 13.0 will do, see README.md). Looked at:\n{}",
            candidates.iter().map(|path| format!("  {}\n", path.display())).collect::<String>()
        ),
    }
}

fn compile_all(nvcc: &Path, sources: &[PathBuf], out: &Path) {
    let arches = env::var("KERNEL_ARCHES").unwrap_or_else(|_| DEFAULT_ARCHES.into());
    let arches: Vec<&str> = arches.split(',').map(str::trim).filter(|arch| !arch.is_empty()).collect();
    assert!(!arches.is_empty(), "KERNEL_ARCHES names no architecture");
    let mut flags: Vec<String> = arches.iter().map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}")).collect();
    // PTX of `90a` would run on Hopper alone.
    let plain = arches[0].trim_end_matches(char::is_alphabetic);
    flags.push(format!("-gencode=arch=compute_{plain},code=compute_{plain}"));
    // What is newer than its source, the shared headers and the last change of flags is not compiled again.
    let flags_file = out.join("flags.txt");
    let all_flags = format!("{} {}", nvcc.display(), flags.join(" "));
    if fs::read_to_string(&flags_file).ok().as_ref() != Some(&all_flags) {
        fs::write(&flags_file, all_flags).expect("OUT_DIR is writable");
    }
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let inputs = [Path::new("cuda/common.cuh"), Path::new("cuda/hopper.cuh"), &flags_file].map(modified);
    let is_stale = |source: &&PathBuf| {
        let made = modified(&fatbin(source, out));
        made.is_none() || inputs.iter().chain([&modified(source)]).any(|input| *input >= made)
    };
    let stale: Vec<&PathBuf> = sources.iter().filter(is_stale).collect();
    let queue = Mutex::new(stale.iter());
    let jobs: usize = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, sources.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no compile job panics with the lock held").next();
                    let Some(source) = next else { break };
                    compile(nvcc, source, &flags, out);
                }
            });
        }
    });
}

fn compile(nvcc: &Path, source: &Path, flags: &[String], out: &Path) {
    let output = Command::new(nvcc)
        .args(["-O3", "-std=c++17", "-fatbin", "-Werror", "all-warnings"])
        .args(flags)
        .arg("-o")
        .arg(fatbin(source, out))
        .arg(source)
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", nvcc.display()));
    assert!(
        output.status.success(),
        "{}:\n{}{}",
        source.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn stem(source: &Path) -> &str {
    source.file_stem().and_then(|stem| stem.to_str()).expect("kernel files have ASCII names")
}

fn fatbin(source: &Path, out: &Path) -> PathBuf {
    out.join(stem(source)).with_extension("fatbin")
}

/// `pub(super) static RMS_NORM: &[u8] = …;` for each source. The driver wants images aligned; `include_bytes!` alone is not.
fn images(sources: &[PathBuf], out: &Path) -> String {
    let mut text = String::new();
    for source in sources {
        let path = fatbin(source, out);
        let len = fs::metadata(&path).expect("nvcc wrote it").len();
        text += &format!(
            "pub(super) static {}: &[u8] = &Aligned::<[u8; {len}]>(*include_bytes!({:?})).0;\n",
            stem(source).to_uppercase(),
            path.display()
        );
    }
    text
}
