//! What [`super::gemm::Gemm::tune`] found, on disk: one text file per device and library, a line per shape.
//!
//! ```text
//! polylora-gemm-tuning 3
//! for NVIDIA H100 80GB HBM3, compute capability 9.0, driver 13000, cuBLASLt 130000, kernels 0.1.0-91f2a7…
//! 64 4096 14336 add_f32 plain beside stream 10 4 6
//! 256 28672 4096 gated plain alone wide 11 1 2 4 3
//! 512 6144 4096 bf16 bias alone cublas 15 0 … (eight words, hexadecimal)
//! end 3
//! ```
//!
//! A file that says it is for something else, or that is damaged anywhere, is not used at all: measuring again costs a second.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::{
    gemm::{Choice, Key, OutputKind},
    stream_gemm::StreamCut,
    wide_gemm::WideCut,
};

const MAGIC: &str = "polylora-gemm-tuning 3";
/// A shape's line has at most 200 bytes; a model has a few hundred shapes.
const MAX_BYTES: u64 = 4 << 20;

/// What a file of measurements is good for. Each part of it may change what is fastest, or what an algorithm's words mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunedFor(pub(super) String);

impl TunedFor {
    fn file_name(&self) -> String {
        let hash = self.0.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        format!("gemm-{hash:016x}.txt")
    }
}

/// Choices by shape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tuning(pub(super) BTreeMap<Key, Choice>);

/// Why a file was not used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct TuningError {
    path: PathBuf,
    reason: String,
}

impl Tuning {
    /// Reads what was written for this before; none is an empty one.
    ///
    /// # Errors
    /// A file that can't be read or is damaged, with the line.
    pub fn read(directory: &Path, tuned_for: &TunedFor) -> Result<Self, TuningError> {
        let path = directory.join(tuned_for.file_name());
        let read = || -> io::Result<String> {
            let mut text = String::new();
            fs::File::open(&path)?.take(MAX_BYTES).read_to_string(&mut text)?;
            Ok(text)
        };
        match read() {
            Ok(text) => Self::parse(&text, tuned_for).map_err(|reason| TuningError { path, reason }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(TuningError {
                path,
                reason: error.to_string(),
            }),
        }
    }

    /// Writes all of it, atomically; the directory is made if it is not there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, directory: &Path, tuned_for: &TunedFor) -> Result<(), TuningError> {
        let path = directory.join(tuned_for.file_name());
        // Containers that share a volume may have the same process id.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let partial = path.with_extension(format!("{}-{now}.partial", std::process::id()));
        let write = || -> io::Result<()> {
            fs::create_dir_all(directory)?;
            fs::write(&partial, self.to_text(tuned_for))?;
            fs::rename(&partial, &path)
        };
        write().map_err(|error| {
            // It may not be there.
            let _ = fs::remove_file(&partial);
            TuningError {
                path: path.clone(),
                reason: error.to_string(),
            }
        })
    }

    fn to_text(&self, tuned_for: &TunedFor) -> String {
        let mut text = format!("{MAGIC}\nfor {}\n", tuned_for.0);
        let mut line = |key: &Key, choice: &Choice| {
            let output = match key.output {
                OutputKind::Bf16 => "bf16",
                OutputKind::F32 => "f32",
                OutputKind::AddF32 => "add_f32",
                OutputKind::Gated => "gated",
            };
            let bias = if key.bias { "bias" } else { "plain" };
            let beside = if key.beside { "beside" } else { "alone" };
            write!(text, "{} {} {} {output} {bias} {beside} ", key.m, key.n, key.k)?;
            match choice {
                Choice::Cublas(words) => {
                    text.push_str("cublas");
                    words.iter().try_for_each(|word| write!(text, " {word:x}"))?;
                }
                Choice::Apart => text.push_str("apart"),
                Choice::Skinny => text.push_str("skinny"),
                Choice::Stream(cut) => write!(text, "stream {} {} {}", cut.variant, cut.num_splits, cut.num_stages)?,
                Choice::Wide(cut) => {
                    let WideCut {
                        variant,
                        num_splits,
                        num_sharing,
                        num_stages,
                        num_x_stages,
                    } = cut;
                    write!(text, "wide {variant} {num_splits} {num_sharing} {num_stages} {num_x_stages}")?;
                }
            }
            writeln!(text)
        };
        for (key, choice) in &self.0 {
            line(key, choice).expect("a String takes all that is written to it");
        }
        text + &format!("end {}\n", self.0.len())
    }

    fn parse(text: &str, tuned_for: &TunedFor) -> Result<Self, String> {
        let mut lines = text.lines().enumerate();
        let mut expect = |expected: &str| match lines.next() {
            Some((_, line)) if line == expected => Ok(()),
            got => Err(format!("expected {expected:?}, got {:?}", got.map(|(_, line)| line))),
        };
        expect(MAGIC)?;
        expect(&format!("for {}", tuned_for.0))?;
        let mut choices = BTreeMap::new();
        let mut ended = None;
        for (index, line) in lines {
            if ended.is_some() {
                return Err(format!("line {}: something after the end", index + 1));
            }
            match line.strip_prefix("end ") {
                Some(count) => ended = Some(count),
                None => {
                    let (key, choice) = parse_line(line).ok_or_else(|| format!("line {}: not a shape's: {line:?}", index + 1))?;
                    choices.insert(key, choice);
                }
            }
        }
        match ended.and_then(|count| count.parse::<usize>().ok()) {
            Some(count) if count == choices.len() && text.ends_with('\n') => Ok(Self(choices)),
            Some(count) => Err(format!("expected {count} shapes, got {}", choices.len())),
            None => Err("it has no end".into()),
        }
    }
}

fn parse_line(line: &str) -> Option<(Key, Choice)> {
    let mut words = line.split(' ');
    fn number<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<usize> {
        words.next()?.parse().ok()
    }
    let (m, n, k) = (number(&mut words)?, number(&mut words)?, number(&mut words)?);
    let output = match words.next()? {
        "bf16" => OutputKind::Bf16,
        "f32" => OutputKind::F32,
        "add_f32" => OutputKind::AddF32,
        "gated" => OutputKind::Gated,
        _ => return None,
    };
    let bias = match words.next()? {
        "bias" => true,
        "plain" => false,
        _ => return None,
    };
    let beside = match words.next()? {
        "beside" => true,
        "alone" => false,
        _ => return None,
    };
    let choice = match words.next()? {
        "apart" => Choice::Apart,
        "skinny" => Choice::Skinny,
        "stream" => Choice::Stream(StreamCut {
            variant: number(&mut words)?,
            num_splits: number(&mut words)?,
            num_stages: number(&mut words)?,
        }),
        "wide" => Choice::Wide(WideCut {
            variant: number(&mut words)?,
            num_splits: number(&mut words)?,
            num_sharing: number(&mut words)?,
            num_stages: number(&mut words)?,
            num_x_stages: number(&mut words)?,
        }),
        "cublas" => {
            let mut algorithm = [0; 8];
            for word in &mut algorithm {
                *word = u64::from_str_radix(words.next()?, 16).ok()?;
            }
            Choice::Cublas(algorithm)
        }
        _ => return None,
    };
    let key = Key {
        m,
        n,
        k,
        output,
        bias,
        beside,
    };
    words.next().is_none().then_some((key, choice))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuned_for(name: &str) -> TunedFor {
        TunedFor(format!("{name}, compute capability 9.0"))
    }

    fn tuning() -> Tuning {
        let key = |m, output, bias| Key {
            m,
            n: 4096,
            k: 14336,
            output,
            bias,
            beside: m == 64,
        };
        let cut = StreamCut {
            variant: 10,
            num_splits: 4,
            num_stages: 6,
        };
        let wide = WideCut {
            variant: 9,
            num_splits: 1,
            num_sharing: 2,
            num_stages: 4,
            num_x_stages: 3,
        };
        Tuning(BTreeMap::from([
            (key(8, OutputKind::Bf16, true), Choice::Skinny),
            (key(64, OutputKind::AddF32, false), Choice::Stream(cut)),
            (key(256, OutputKind::Bf16, false), Choice::Wide(wide)),
            (key(256, OutputKind::Gated, false), Choice::Apart),
            (key(2048, OutputKind::F32, false), Choice::Cublas([15, 0, u64::MAX, 1, 2, 3, 4, 5])),
        ]))
    }

    fn directory(test: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("polylora-tuning-{}-{test}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn what_was_written_is_read_and_only_for_the_same_device() {
        let directory = directory("same");
        let (here, there) = (tuned_for("here"), tuned_for("there"));
        assert_eq!(Tuning::read(&directory, &here).unwrap(), Tuning::default());
        tuning().write(&directory, &here).unwrap();
        assert_eq!(Tuning::read(&directory, &here).unwrap(), tuning());
        assert_eq!(Tuning::read(&directory, &there).unwrap(), Tuning::default());
        // A file under another's name is found out by what it says.
        fs::copy(directory.join(here.file_name()), directory.join(there.file_name())).unwrap();
        assert!(Tuning::read(&directory, &there).unwrap_err().to_string().contains("expected \"for there"));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2, "nothing partial is left");
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_damaged_file_is_an_error_and_never_half_used() {
        let device = tuned_for("a");
        let text = tuning().to_text(&device);
        assert_eq!(Tuning::parse(&text, &device), Ok(tuning()));
        for end in (0..text.len()).filter(|&end| text.is_char_boundary(end)) {
            assert!(Tuning::parse(&text[..end], &device).is_err(), "cut at {end}");
        }
        for damaged in [
            text.replace("add_f32", "f64"),
            text.replace("alone skinny", "skinny"),
            text.replace("alone skinny", "alone skinny 1"),
            text.replace("stream 10 4", "stream 10 -4"),
            text.replace("wide 9 1 2 4 3", "wide 9 1 2 4"),
            text.replace("end 5", "end 4"),
            text.clone() + "8 8 8 bf16 plain alone skinny\n",
            text.replace("8 4096", "99999999999999999999999 4096"),
        ] {
            assert_ne!(damaged, text);
            assert!(Tuning::parse(&damaged, &device).is_err(), "{damaged}");
        }
    }

    #[test]
    fn what_cannot_be_written_is_an_error_that_names_the_file() {
        let directory = directory("blocked");
        fs::write(&directory, "a file where the directory should be").unwrap();
        let error = tuning().write(&directory, &tuned_for("a")).unwrap_err().to_string();
        assert!(error.contains(&directory.display().to_string()), "{error}");
        fs::remove_file(&directory).unwrap();
    }
}
