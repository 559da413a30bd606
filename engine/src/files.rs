//! Where the files of a model or an adapter come from: a directory, memory, or the binary itself.

use std::{
    fs::File,
    io,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use polylora_kernels::cpu::HugeBuffer;
use sha2::{Digest, Sha256};

/// A thread reads at least so much of a file.
const BYTES_WORTH_A_THREAD: usize = 4 << 20;

/// Buffers that are kept for the next file: for as many files as are read at once.
const MOST_KEPT: usize = 8;
/// Bytes that they have together.
const MOST_KEPT_BYTES: usize = 1 << 30;
/// Buffers are made in multiples of this, a huge page, so that files of about the same length share them.
const BUFFER_STEP: usize = 2 << 20;

/// Clocks of file systems tell time in steps of at most this much.
const LONGEST_CLOCK_STEP: Duration = Duration::from_secs(2);

/// A file carried in the binary.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedFile {
    /// Its name, without a folder.
    pub name: &'static str,
    /// Its content.
    pub bytes: &'static [u8],
}

/// Memory that large files are read into, kept for the next ones. What the system gives anew it has to zero first, on a virtual machine perhaps to
/// fetch; and what goes back to it makes every thread of the process wait that takes memory or gives it back meanwhile.
#[derive(Default)]
pub struct ReadBuffers {
    /// The longest last.
    kept: Mutex<Vec<HugeBuffer<u8>>>,
}

impl ReadBuffers {
    /// A buffer of `len` bytes of any content.
    pub fn take(self: &Arc<Self>, len: usize) -> ReadBuffer {
        let kept = {
            let mut kept = self.kept.lock();
            let shortest = kept.partition_point(|memory| memory.len() < len);
            (shortest < kept.len()).then(|| kept.remove(shortest))
        };
        ReadBuffer {
            memory: Some(kept.unwrap_or_else(|| HugeBuffer::zeroed(len.next_multiple_of(BUFFER_STEP)))),
            len,
            home: self.clone(),
        }
    }

    /// Keeps the longest ones, as far as they may be kept. Gives back the others, to be dropped without the lock.
    fn keep(&self, memory: HugeBuffer<u8>) -> Vec<HugeBuffer<u8>> {
        if memory.len() > MOST_KEPT_BYTES {
            return vec![memory];
        }
        let mut kept = self.kept.lock();
        let place = kept.partition_point(|other| other.len() < memory.len());
        kept.insert(place, memory);
        let mut bytes = 0;
        let longest = kept.iter().rev().take(MOST_KEPT);
        let num_kept = longest.take_while(|memory| {
            bytes += memory.len();
            bytes <= MOST_KEPT_BYTES
        });
        let num_others = kept.len() - num_kept.count();
        kept.drain(..num_others).collect()
    }
}

/// A file's content, or what is to become that. Goes back to its [`ReadBuffers`] when it is dropped.
pub struct ReadBuffer {
    /// There until then.
    memory: Option<HugeBuffer<u8>>,
    len: usize,
    home: Arc<ReadBuffers>,
}

impl Deref for ReadBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_deref().map_or(&[], |memory| &memory[..self.len])
    }
}

impl DerefMut for ReadBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        self.memory.as_deref_mut().map_or(&mut [], |memory| &mut memory[..len])
    }
}

impl Drop for ReadBuffer {
    fn drop(&mut self) {
        drop(self.memory.take().map(|memory| self.home.keep(memory)));
    }
}

/// A file that somebody sent.
#[derive(Clone, PartialEq, Eq)]
pub struct MemoryFile {
    /// Its name, without a folder.
    pub name: String,
    /// Its content.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryFile({:?}, {} bytes)", self.name, self.bytes.len())
    }
}

/// A folder of files.
#[derive(Clone, Debug)]
pub enum FileSource {
    /// On disk.
    Directory(PathBuf),
    /// In the binary.
    Embedded(&'static [EmbeddedFile]),
    /// In memory, for as long as anyone has this value.
    Memory(Arc<[MemoryFile]>),
}

/// What tells one state of a folder's files (or of one file) from another without reading them: names, lengths, identities and times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceStamp {
    digest: [u8; 32],
    newest: SystemTime,
}

impl SourceStamp {
    /// Whether the last change is so long ago that a later one must have another time: equal stamps are equal files then.
    pub fn is_settled(&self) -> bool {
        SystemTime::now().duration_since(self.newest).is_ok_and(|age| age > LONGEST_CLOCK_STEP)
    }
}

/// The content of one file.
#[derive(Debug)]
pub enum FileBytes {
    /// Mapped from disk.
    Mapped(MappedFile),
    /// In the binary.
    Static(&'static [u8]),
    /// In memory.
    Owned(Vec<u8>),
    /// An empty file (which cannot be mapped).
    Empty,
}

/// How much of a mapped file is read before its pages are given back.
const RELEASE_BYTES: usize = 32 << 20;

/// A file in the address space.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
    /// Bytes read since its pages were last given back.
    read_bytes: AtomicUsize,
}

impl FileBytes {
    /// Says that so many bytes have been read and will not be needed again soon.
    ///
    /// Pages of a mapped file count as this process's memory once they are read. A model is read once, into the form that a device
    /// computes with: without this, its file and its weights would be in memory both by the end.
    pub fn was_read(&self, bytes: usize) {
        let Self::Mapped(file) = self else { return };
        if file.read_bytes.fetch_add(bytes, Relaxed) + bytes < RELEASE_BYTES {
            return;
        }
        file.read_bytes.store(0, Relaxed);
        // SAFETY: the map is of a file and is never written to: pages that are given back are the same when they are read again, also
        // by a thread that reads them just now.
        #[cfg(unix)]
        let released = unsafe { file.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        // A system that keeps them costs memory and changes no result.
        #[cfg(unix)]
        drop(released);
    }
}

impl Deref for FileBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => &file.map,
            Self::Static(bytes) => bytes,
            Self::Owned(bytes) => bytes,
            Self::Empty => &[],
        }
    }
}

impl FileSource {
    /// Whether there is a file of this name.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::Directory(directory) => directory.join(name).is_file(),
            Self::Embedded(files) => files.iter().any(|file| file.name == name),
            Self::Memory(files) => files.iter().any(|file| file.name == name),
        }
    }

    /// Opens a file; on disk it is memory-mapped.
    ///
    /// # Errors
    /// `NotFound`, or what the system says.
    pub fn open(&self, name: &str) -> io::Result<FileBytes> {
        match self {
            Self::Directory(directory) => {
                let file = File::open(directory.join(name))?;
                if file.metadata()?.len() == 0 {
                    return Ok(FileBytes::Empty);
                }
                // SAFETY: the map is read-only. Should another process truncate the file while it is mapped, reads past the new end
                // raise SIGBUS, as for every program that maps its model; adapters are therefore read through `read` instead.
                let map = unsafe { memmap2::Mmap::map(&file)? };
                Ok(FileBytes::Mapped(MappedFile {
                    map,
                    read_bytes: AtomicUsize::new(0),
                }))
            }
            Self::Embedded(files) => files
                .iter()
                .find(|file| file.name == name)
                .map(|file| FileBytes::Static(file.bytes))
                .ok_or_else(|| not_found(name)),
            Self::Memory(_) => Ok(FileBytes::Owned(self.read(name, u64::MAX)?)),
        }
    }

    /// Reads a whole file into memory, at most `max_bytes` of it.
    ///
    /// # Errors
    /// `NotFound`; `FileTooLarge` when it is longer than `max_bytes`; or what the system says.
    pub fn read(&self, name: &str, max_bytes: u64) -> io::Result<Vec<u8>> {
        use io::Read;
        let too_large = |len: u64| too_large(name, len, max_bytes);
        match self {
            Self::Directory(directory) => {
                let file = File::open(directory.join(name))?;
                let len = file.metadata()?.len();
                if len > max_bytes {
                    return Err(too_large(len));
                }
                let mut bytes = Vec::with_capacity(usize::try_from(len).map_err(io::Error::other)?);
                // The file may grow between the two calls: the bound is kept on what is read, too.
                file.take(max_bytes + 1).read_to_end(&mut bytes)?;
                if bytes.len() as u64 > max_bytes {
                    return Err(too_large(bytes.len() as u64));
                }
                Ok(bytes)
            }
            Self::Embedded(_) => {
                let bytes = self.open(name)?;
                if bytes.len() as u64 > max_bytes {
                    return Err(too_large(bytes.len() as u64));
                }
                Ok(bytes.to_vec())
            }
            Self::Memory(files) => {
                let file = files.iter().find(|file| file.name == name).ok_or_else(|| not_found(name))?;
                if file.bytes.len() as u64 > max_bytes {
                    return Err(too_large(file.bytes.len() as u64));
                }
                Ok(file.bytes.clone())
            }
        }
    }

    /// The same for a large file: into huge pages, by several threads.
    ///
    /// # Errors
    /// As `read`; `UnexpectedEof` when the file becomes shorter meanwhile.
    pub fn read_large(&self, name: &str, max_bytes: u64, threads: usize, buffers: &Arc<ReadBuffers>) -> io::Result<ReadBuffer> {
        let Self::Directory(directory) = self else {
            let bytes = self.read(name, max_bytes)?;
            let mut buffer = buffers.take(bytes.len());
            buffer.copy_from_slice(&bytes);
            return Ok(buffer);
        };
        let file = File::open(directory.join(name))?;
        let len = file.metadata()?.len();
        if len > max_bytes {
            return Err(too_large(name, len, max_bytes));
        }
        let mut buffer = buffers.take(usize::try_from(len).map_err(io::Error::other)?);
        let part = buffer.len().div_ceil(threads.max(1)).max(BYTES_WORTH_A_THREAD);
        if buffer.len() <= part {
            read_exact_at(&file, &mut buffer, 0)?;
            return Ok(buffer);
        }
        std::thread::scope(|scope| {
            let parts = buffer.chunks_mut(part).enumerate();
            let readers: Vec<_> = parts
                .map(|(index, bytes)| {
                    let (file, offset) = (&file, (index * part) as u64);
                    scope.spawn(move || read_exact_at(file, bytes, offset))
                })
                .collect();
            readers
                .into_iter()
                .try_for_each(|reader| reader.join().unwrap_or_else(|_| Err(io::Error::other("a reader panicked"))))
        })?;
        Ok(buffer)
    }

    /// Bytes that this value keeps in memory; 0 for files on disk and in the binary.
    pub fn memory_bytes(&self) -> usize {
        match self {
            Self::Directory(_) | Self::Embedded(_) => 0,
            Self::Memory(files) => files.iter().map(|file| file.bytes.len()).sum(),
        }
    }

    /// The state of the folder's files; `None` where there is no folder, or none that can be read.
    pub fn stamp(&self) -> Option<SourceStamp> {
        let mut files = Vec::new();
        let mut newest = SystemTime::UNIX_EPOCH;
        for child in std::fs::read_dir(self.directory()?).ok()? {
            let path = child.ok()?.path();
            // What a link leads to is what is read.
            let metadata = std::fs::metadata(&path).ok()?;
            if metadata.is_file() {
                let (identity, time) = identity(&metadata)?;
                newest = newest.max(time);
                files.push((path.file_name()?.to_owned(), metadata.len(), identity));
            }
        }
        files.sort();
        let mut hash = Sha256::new();
        for (name, len, identity) in files {
            let name = name.as_encoded_bytes();
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
            hash.update(len.to_le_bytes());
            identity.iter().for_each(|part| hash.update(part.to_le_bytes()));
        }
        Some(SourceStamp {
            digest: hash.finalize().into(),
            newest,
        })
    }

    /// The state of one file; `None` where there is no such file on disk.
    pub fn file_stamp(&self, name: &str) -> Option<SourceStamp> {
        let metadata = std::fs::metadata(self.directory()?.join(name)).ok()?;
        let (identity, newest) = identity(&metadata).filter(|_| metadata.is_file())?;
        let mut hash = Sha256::new();
        hash.update(metadata.len().to_le_bytes());
        identity.iter().for_each(|part| hash.update(part.to_le_bytes()));
        Some(SourceStamp {
            digest: hash.finalize().into(),
            newest,
        })
    }

    /// The folder on disk, if it is one.
    pub fn directory(&self) -> Option<&Path> {
        match self {
            Self::Directory(directory) => Some(directory),
            Self::Embedded(_) | Self::Memory(_) => None,
        }
    }
}

/// What a file is and when it was changed; and the latter as a time.
#[cfg(unix)]
fn identity(metadata: &std::fs::Metadata) -> Option<([u64; 6], SystemTime)> {
    use std::os::unix::fs::MetadataExt;
    let (seconds, nanoseconds) = (metadata.ctime(), metadata.ctime_nsec());
    let changed = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanoseconds).ok()?);
    let identity = [
        metadata.dev(),
        metadata.ino(),
        metadata.mtime() as u64,
        metadata.mtime_nsec() as u64,
        seconds as u64,
        nanoseconds as u64,
    ];
    Some((identity, SystemTime::UNIX_EPOCH.checked_add(changed)?))
}

/// When a file was changed.
#[cfg(not(unix))]
fn identity(metadata: &std::fs::Metadata) -> Option<([u64; 6], SystemTime)> {
    let modified = metadata.modified().ok()?;
    let since = modified.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(([since.as_secs(), u64::from(since.subsec_nanos()), 0, 0, 0, 0], modified))
}

fn not_found(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("no file {name}"))
}

fn too_large(name: &str, len: u64, max_bytes: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::FileTooLarge,
        format!("{name} has {len} bytes, at most {max_bytes} are read"),
    )
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_read(file, bytes, offset)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[count..];
        offset += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_changes_with_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let source = FileSource::Directory(folder.path().to_owned());
        let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        write("a", b"1");
        let mut stamps = vec![source.stamp().unwrap()];
        assert_eq!(source.stamp().unwrap(), stamps[0]);
        assert!(!stamps[0].is_settled(), "another write in the same tick of the clock would not show");
        write("a", b"22");
        stamps.push(source.stamp().unwrap());
        write("b", b"");
        stamps.push(source.stamp().unwrap());
        std::fs::rename(folder.path().join("b"), folder.path().join("c")).unwrap();
        stamps.push(source.stamp().unwrap());
        for (index, stamp) in stamps.iter().enumerate() {
            assert!(!stamps[..index].iter().any(|earlier| earlier.digest == stamp.digest), "{index}");
        }
        let old = SourceStamp {
            newest: SystemTime::now() - 2 * LONGEST_CLOCK_STEP,
            ..stamps[0]
        };
        assert!(old.is_settled());
        let one = source.file_stamp("a").unwrap();
        assert_eq!(source.file_stamp("a").unwrap(), one);
        // A link is the same file, a copy is another.
        std::fs::hard_link(folder.path().join("a"), folder.path().join("link")).unwrap();
        write("copy", b"22");
        assert_eq!(source.file_stamp("link"), source.file_stamp("a"));
        assert_ne!(source.file_stamp("copy").unwrap().digest, source.file_stamp("a").unwrap().digest);
        write("a", b"333");
        assert_ne!(source.file_stamp("a").unwrap().digest, one.digest);
        assert_eq!(source.file_stamp("none"), None);
        assert_eq!(FileSource::Directory("/nowhere".into()).stamp(), None);
        assert_eq!(FileSource::Embedded(&[]).stamp(), None);
    }

    #[test]
    fn a_large_file_is_read_as_it_is_by_any_number_of_threads() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..3 * BYTES_WORTH_A_THREAD + 5).map(|at| (at * 31 / 7) as u8).collect();
        std::fs::write(folder.path().join("large"), &bytes).unwrap();
        std::fs::write(folder.path().join("empty"), []).unwrap();
        let source = FileSource::Directory(folder.path().to_owned());
        let buffers = Arc::default();
        for threads in [0, 1, 3, 64] {
            let read = source.read_large("large", bytes.len() as u64, threads, &buffers).unwrap();
            assert!(*read == *bytes, "{threads} threads");
            assert!(source.read_large("empty", 0, threads, &buffers).unwrap().is_empty());
        }
        let kind = |name, max_bytes| source.read_large(name, max_bytes, 2, &buffers).err().unwrap().kind();
        assert_eq!(kind("large", bytes.len() as u64 - 1), io::ErrorKind::FileTooLarge);
        assert_eq!(kind("none", 1), io::ErrorKind::NotFound);
    }

    #[test]
    fn buffers_are_kept_for_files_of_their_length_and_not_too_many() {
        let buffers: Arc<ReadBuffers> = Arc::default();
        let mut long = buffers.take(3 * BUFFER_STEP - 5);
        long.fill(7);
        let (start, len) = (long.as_ptr(), long.len());
        assert_eq!(len, 3 * BUFFER_STEP - 5);
        drop(long);
        let longer = buffers.take(3 * BUFFER_STEP + 1);
        assert_eq!((longer.len(), longer[0]), (3 * BUFFER_STEP + 1, 0), "the one that is kept is too short");
        let again = buffers.take(2 * BUFFER_STEP + 1);
        assert_eq!((again.as_ptr(), again.len()), (start, 2 * BUFFER_STEP + 1));
        drop((longer, again));
        drop((0..2 * MOST_KEPT).map(|_| buffers.take(1)).collect::<Vec<_>>());
        drop(buffers.take(MOST_KEPT_BYTES + 1));
        let kept = || buffers.kept.lock().iter().map(|memory| memory.len() / BUFFER_STEP).collect::<Vec<_>>();
        assert_eq!(kept(), [1, 1, 1, 1, 1, 1, 3, 4], "the longest that are not too long");
        drop(buffers.take(MOST_KEPT_BYTES - 8 * BUFFER_STEP));
        assert_eq!(kept(), [1, 3, 4, MOST_KEPT_BYTES / BUFFER_STEP - 8], "and no more bytes than may be");
    }
}
