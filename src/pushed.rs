//! Adapters that clients send as bytes: from a multipart body to a folder, never through memory, never half.
//!
//! A body has two parts: `config` (`adapter_config.json`) and `weights` (`adapter_model.safetensors`). Of an adapter that was split it
//! has, in place of `weights`, an `index` (`adapter_model.safetensors.index.json`) and a part `shard` with a file name for each file that
//! the index names. An adapter with tokens or a chat template of its own has more ([`TEXT_PARTS`]). They are written to a folder of
//! their own as they come, bounded by [`PushLimits`]; a body that ends early, is too large or has other parts leaves nothing behind. What
//! is in the files is checked like every other adapter's when they are loaded.
//!
//! Memory holds no copy of the files: an adapter that has left the host tier is read from its folder again. Without `--state-dir` that
//! is a temporary folder, which goes with the server; one whose server was killed is removed by the next that starts.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use axum::{
    body::{Body, BodyDataStream},
    http::{
        HeaderMap, StatusCode,
        header::{CONTENT_LENGTH, CONTENT_TYPE},
    },
};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use multer::{Field, Multipart};
use parking_lot::Mutex;
use polylora_engine::adapter::{
    AdapterError,
    config::{CONFIG_FILE, MAX_CONFIG_BYTES},
    tensors::{INDEX_FILE, MAX_INDEX_BYTES, WEIGHTS_FILE, is_shard_name, parse_index},
};
use tokio::{
    io::{AsyncWriteExt, BufWriter},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use crate::{
    beside::{LARGE_BYTES, beside_if},
    error::ApiError,
    extract::is_timeout,
    state_dir::sync_folder,
};

/// Largest `weights`, if nobody says otherwise: rank 256 on every projection of an 8B model has 1.3 GB.
pub const DEFAULT_MAX_PUSH_BYTES: u64 = 2 << 30;
/// All files of pushed adapters, if nobody says otherwise.
pub const DEFAULT_MAX_PUSHED_BYTES: u64 = 64 << 30;
/// Files that the weights may be split into.
const MAX_SHARDS: usize = 1024;
/// Temporary folders are called by this and something of their own.
const TEMPORARY_PREFIX: &str = "polylora-adapters-";
/// In a temporary folder: locked by its server for as long as that lives.
const LOCK_FILE: &str = "lock";
/// Parts that a body may have beside `config` and `weights`, and their files.
pub const TEXT_PARTS: [(&str, &str); 5] = [
    ("tokenizer", "tokenizer.json"),
    ("tokenizer_config", "tokenizer_config.json"),
    ("special_tokens_map", "special_tokens_map.json"),
    ("added_tokens", "added_tokens.json"),
    ("chat_template", "chat_template.jinja"),
];
/// Largest of each.
const MAX_TEXT_PART_BYTES: u64 = 64 << 20;
/// Bodies that are received at once.
const MAX_UPLOADS: usize = 4;
/// Bytes of a body that are no weights: the configuration, an index, the tokenizer's files, and the heads of the parts.
const MAX_BYTES_BESIDE_WEIGHTS: u64 = MAX_CONFIG_BYTES + MAX_INDEX_BYTES + TEXT_PARTS.len() as u64 * MAX_TEXT_PART_BYTES + (2 << 20);
/// Bytes gathered before a write.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes of a body that are read although it is refused.
const MAX_DISCARDED_BYTES: usize = 64 << 20;
/// Bytes of a body in which no part is found.
const MAX_UNREAD_BYTES: usize = 4 << 20;

/// How much may be pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PushLimits {
    /// Bytes of one adapter's weights, all shards together.
    pub max_bytes: u64,
    /// Bytes of all files of all pushed adapters that are served or being received.
    pub max_total_bytes: u64,
}

impl Default for PushLimits {
    fn default() -> Self {
        Self {
            max_bytes: DEFAULT_MAX_PUSH_BYTES,
            max_total_bytes: DEFAULT_MAX_PUSHED_BYTES,
        }
    }
}

/// Where pushed adapters are kept.
#[derive(Debug)]
pub struct PushedAdapters {
    place: Place,
    limits: PushLimits,
    /// Bytes of all files, those being received included.
    used_bytes: Arc<AtomicU64>,
    uploads: Arc<Semaphore>,
}

#[derive(Debug)]
enum Place {
    Folder(PathBuf),
    /// Made for the first push; removed with everything in it when this is dropped.
    Temporary(Mutex<Option<Temporary>>),
}

#[derive(Debug)]
struct Temporary {
    folder: tempfile::TempDir,
    _lock: File,
}

impl Temporary {
    fn new() -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempdir()?;
        // Whoever finds the lock by its name finds it locked.
        let unlocked = folder.path().join("lock.new");
        let lock = File::create_new(&unlocked)?;
        lock.try_lock().map_err(io::Error::from)?;
        fs::rename(&unlocked, folder.path().join(LOCK_FILE))?;
        Ok(Self { folder, _lock: lock })
    }
}

/// Removes temporary folders whose servers have not come to remove them. Blocks.
pub fn remove_abandoned() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let folder = entry.path();
        let is_ours = entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) && entry.file_type().is_ok_and(|kind| kind.is_dir());
        let lock_path = folder.join(LOCK_FILE);
        if !is_ours || !fs::symlink_metadata(&lock_path).is_ok_and(|lock| lock.is_file()) {
            continue;
        }
        // One that can't be opened is another user's.
        let Ok(lock) = File::open(&lock_path) else { continue };
        if lock.try_lock().is_ok() {
            tracing::info!(folder = %folder.display(), "removing what a killed server has left of pushed adapters");
            remove(&folder);
        }
    }
}

/// The complete files of a pushed adapter. Dropped, they are removed, unless they were kept.
#[derive(Debug)]
pub struct Upload {
    directory: PathBuf,
    is_kept: bool,
    bytes: u64,
    used_bytes: Arc<AtomicU64>,
    _permit: OwnedSemaphorePermit,
}

impl Upload {
    /// The folder with its files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its name among the pushed ones.
    pub fn name(&self) -> String {
        self.directory.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Leaves the files where they are.
    pub fn keep(mut self) {
        self.is_kept = true;
    }

    /// Writes one part to a file of the folder, at most so many bytes.
    async fn write(&mut self, mut field: Field<'_>, read: &AtomicUsize, part: &Part, limits: PushLimits) -> Result<(), ApiError> {
        let file = tokio::fs::File::create(self.directory.join(&part.file)).await.map_err(storage_error)?;
        let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
        let mut bytes = 0;
        while let Some(chunk) = field.chunk().await.map_err(body_error)? {
            read.store(0, Relaxed);
            let len = chunk.len() as u64;
            bytes += len;
            if bytes > part.max_bytes {
                return Err(too_large(part.name, part.limit));
            }
            self.bytes += len;
            if self.used_bytes.fetch_add(len, Relaxed) + len > limits.max_total_bytes {
                return Err(ApiError::pushed_full(limits.max_total_bytes));
            }
            file.write_all(&chunk).await.map_err(storage_error)?;
        }
        file.flush().await.map_err(storage_error)?;
        file.get_ref().sync_all().await.map_err(storage_error)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.is_kept {
            remove(&self.directory);
            self.used_bytes.fetch_sub(self.bytes, Relaxed);
        }
    }
}

/// What is wrong with an adapter that was sent as parts of a form, by the part.
pub fn pushed_error(error: AdapterError) -> ApiError {
    let part = match &error {
        AdapterError::BadFile { file, .. } => {
            let name = Path::new(file).file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let text_part = TEXT_PARTS.iter().find(|(_, file)| *file == name);
            match name {
                WEIGHTS_FILE => "weights",
                INDEX_FILE => "index",
                shard if is_shard_name(shard) => "shard",
                _ => text_part.map_or("config", |(part, _)| part),
            }
        }
        AdapterError::Unsupported { .. } | AdapterError::Incompatible { .. } => "config",
        _ => return error.into(),
    };
    ApiError::from(error).for_param(part)
}

/// A part of a body, and the file that it becomes.
struct Part {
    name: &'static str,
    file: String,
    /// So many bytes are left for it.
    max_bytes: u64,
    /// Of how many.
    limit: u64,
}

/// The parts of a body that have come.
#[derive(Default)]
struct Parts {
    files: BTreeSet<String>,
    shards: usize,
    /// Of the weights.
    bytes: u64,
}

impl Parts {
    /// What a part is, by its head; refused if there is no place for it.
    fn next(&mut self, field: &Field<'_>, limits: PushLimits) -> Result<Part, ApiError> {
        let max_bytes = limits.max_bytes;
        let part = |name, file: &str, max_bytes| Part {
            name,
            file: file.to_owned(),
            max_bytes,
            limit: max_bytes,
        };
        let part = match field.name() {
            Some("config") => part("config", CONFIG_FILE, MAX_CONFIG_BYTES),
            Some("weights") => part("weights", WEIGHTS_FILE, max_bytes),
            Some("index") => part("index", INDEX_FILE, MAX_INDEX_BYTES),
            Some("shard") => {
                let Some(file) = field.file_name().filter(|file| is_shard_name(file)) else {
                    let message = format!(
                        "A part `shard` has the file's name as its `filename`, like adapter_model-00001-of-00002.safetensors, got {:?}.",
                        field.file_name().unwrap_or_default()
                    );
                    return Err(ApiError::invalid("shard", message));
                };
                self.shards += 1;
                if self.shards > MAX_SHARDS {
                    return Err(ApiError::invalid("shard", format!("Weights may be split into {MAX_SHARDS} files.")));
                }
                Part {
                    max_bytes: max_bytes - self.bytes,
                    ..part("shard", file, max_bytes)
                }
            }
            other => {
                let other = other.unwrap_or_default();
                let Some((name, file)) = TEXT_PARTS.into_iter().find(|(name, _)| *name == other) else {
                    let text_parts = TEXT_PARTS.map(|(name, _)| format!("`{name}`")).join(", ");
                    let message = format!(
                        "The parts of the body are `config` and `weights`, or `config`, `index` and `shard`s, and if need be {text_parts}, got {other:?}."
                    );
                    return Err(ApiError::invalid(other, message));
                };
                part(name, file, MAX_TEXT_PART_BYTES)
            }
        };
        if !self.files.insert(part.file.clone()) {
            let what = if part.name == "shard" {
                format!(" {:?}", part.file)
            } else {
                String::new()
            };
            return Err(ApiError::invalid(part.name, format!("The body has two parts `{}`{what}.", part.name)));
        }
        Ok(part)
    }

    /// Refuses a body that lacks files, or has some that belong to no adapter.
    async fn check(&self, directory: &Path) -> Result<(), ApiError> {
        let has = |file: &str| self.files.contains(file);
        let is_split = has(INDEX_FILE) || self.shards > 0;
        let missing = match (has(CONFIG_FILE), has(WEIGHTS_FILE)) {
            (false, _) => Some("config"),
            (true, false) if !is_split => Some("weights"),
            (true, true) if is_split => {
                let message = "The body has `weights`, which are one file, and parts of weights that were split.";
                return Err(ApiError::invalid("weights", message));
            }
            _ if is_split && !has(INDEX_FILE) => Some("index"),
            _ => None,
        };
        if let Some(part) = missing {
            return Err(ApiError::invalid(part, format!("The body has no part `{part}`.")));
        }
        if !is_split {
            return Ok(());
        }
        let index = tokio::fs::read(directory.join(INDEX_FILE)).await.map_err(storage_error)?;
        let parsed = beside_if(index.len() > LARGE_BYTES, || parse_index(&index)).await;
        let named: BTreeSet<String> = parsed.map_err(pushed_error)?.into_values().collect();
        let sent: BTreeSet<String> = self.files.iter().filter(|file| is_shard_name(file)).cloned().collect();
        if let Some(file) = named.difference(&sent).next() {
            return Err(ApiError::invalid(
                "shard",
                format!("The body has no part `shard` for {file:?}, which the index names."),
            ));
        }
        if let Some(file) = sent.difference(&named).next() {
            return Err(ApiError::invalid("shard", format!("The index names no file {file:?}.")));
        }
        Ok(())
    }
}

fn remove(directory: &Path) {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(directory = %directory.display(), %error, "a pushed adapter's files could not be removed");
        }
        _ => {}
    }
}

/// Bytes of the files in a folder and in its folders; what is not there has none.
fn folder_bytes(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.map(bytes).sum()
}

impl PushedAdapters {
    /// In a folder that stays. Blocks: it looks at what is there.
    pub fn in_folder(folder: PathBuf, limits: PushLimits) -> Self {
        let used_bytes = folder_bytes(&folder);
        Self::new(Place::Folder(folder), limits, used_bytes)
    }

    /// In a temporary folder, which goes when this is dropped.
    pub fn temporary(limits: PushLimits) -> Self {
        Self::new(Place::Temporary(Mutex::default()), limits, 0)
    }

    fn new(place: Place, limits: PushLimits, used_bytes: u64) -> Self {
        Self {
            place,
            limits,
            used_bytes: Arc::new(used_bytes.into()),
            uploads: Arc::new(Semaphore::new(MAX_UPLOADS)),
        }
    }

    fn root(&self) -> io::Result<PathBuf> {
        match &self.place {
            Place::Folder(folder) => Ok(folder.clone()),
            Place::Temporary(made) => {
                let mut made = made.lock();
                let temporary = match made.take() {
                    Some(temporary) => temporary,
                    None => Temporary::new()?,
                };
                let path = temporary.folder.path().to_owned();
                *made = Some(temporary);
                Ok(path)
            }
        }
    }

    /// Bytes of the files of all pushed adapters.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Relaxed)
    }

    /// Removes a pushed adapter's files, by [`Upload::name`]. Blocks.
    pub fn remove(&self, name: &str) {
        if let Ok(root) = self.root() {
            let directory = root.join(name);
            let before = folder_bytes(&directory);
            remove(&directory);
            // Should it have grown meanwhile, nothing is given back.
            self.used_bytes.fetch_sub(before.saturating_sub(folder_bytes(&directory)), Relaxed);
        }
    }

    /// Receives a body.
    ///
    /// # Errors
    /// 400 for parts that are missing, twice there, unknown or cut off; 408 and 413 for a body that takes too long or is too large;
    /// 415 for another media type; 503 while others are received; 507 for a full disk or [`PushLimits::max_total_bytes`]. Nothing is left
    /// behind.
    pub async fn receive(&self, headers: &HeaderMap, body: Body) -> Result<Upload, ApiError> {
        let (body, read, rest) = self.parts_of(headers, body)?;
        let received = match Arc::clone(&self.uploads).try_acquire_owned() {
            Ok(permit) => self.receive_parts(body, &read, permit).await,
            Err(_) => Err(ApiError::too_many_uploads(MAX_UPLOADS)),
        };
        if received.is_err() {
            // Whoever still sends hears of the error only when it is done, or when the connection breaks.
            rest.discard(MAX_DISCARDED_BYTES).await;
        }
        received
    }

    async fn receive_parts(&self, mut body: Multipart<'static>, read: &AtomicUsize, permit: OwnedSemaphorePermit) -> Result<Upload, ApiError> {
        let root = self.root().map_err(storage_error)?;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let mut upload = Upload {
            directory: root.join(format!("{name}.partial")),
            is_kept: false,
            bytes: 0,
            used_bytes: Arc::clone(&self.used_bytes),
            _permit: permit,
        };
        tokio::fs::create_dir(&upload.directory).await.map_err(storage_error)?;
        let mut parts = Parts::default();
        while let Some(field) = body.next_field().await.map_err(body_error)? {
            read.store(0, Relaxed);
            let part = parts.next(&field, self.limits)?;
            let before = upload.bytes;
            upload.write(field, read, &part, self.limits).await?;
            if part.name == "shard" {
                parts.bytes += upload.bytes - before;
            }
        }
        parts.check(&upload.directory).await?;
        // Whoever finds a folder without `.partial` finds all of it.
        let complete = root.join(&name);
        tokio::fs::rename(&upload.directory, &complete).await.map_err(storage_error)?;
        upload.directory.clone_from(&complete);
        let synced = tokio::task::spawn_blocking(move || sync_folder(&complete).and_then(|()| sync_folder(&root)));
        synced.await.map_err(|_| ApiError::internal())?.map_err(storage_error)?;
        Ok(upload)
    }

    fn parts_of(&self, headers: &HeaderMap, body: Body) -> Result<(Multipart<'static>, Arc<AtomicUsize>, Rest), ApiError> {
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let boundary = multer::parse_boundary(header(CONTENT_TYPE)).map_err(|_| {
            let message = "The body must be multipart/form-data, with the parts `config` and `weights`.";
            ApiError::bad_body(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
        })?;
        if header(CONTENT_LENGTH)
            .parse()
            .is_ok_and(|len: u64| len > self.limits.max_bytes.saturating_add(MAX_BYTES_BESIDE_WEIGHTS))
        {
            return Err(too_large("weights", self.limits.max_bytes));
        }
        let read = Arc::new(AtomicUsize::new(0));
        let body = Arc::new(Mutex::new(body.into_data_stream()));
        let paced = Paced {
            body: Arc::clone(&body),
            rests: false,
            read: Arc::clone(&read),
        };
        Ok((Multipart::new(paced, boundary), read, Rest(body)))
    }
}

/// A body that gives one chunk a poll: multer gathers whatever is ready, which would be all of a body that comes faster than the disk
/// takes it. And one that gives up when nothing is made of its chunks.
struct Paced {
    body: Arc<Mutex<BodyDataStream>>,
    rests: bool,
    /// Bytes since a part, or a piece of one, was taken out.
    read: Arc<AtomicUsize>,
}

impl Stream for Paced {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.rests) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Some(chunk) = ready!(self.body.lock().poll_next_unpin(context)) else {
            return Poll::Ready(None);
        };
        self.rests = true;
        let chunk = chunk.map_err(io::Error::other)?;
        if self.read.fetch_add(chunk.len(), Relaxed) > MAX_UNREAD_BYTES {
            return Poll::Ready(Some(Err(io::Error::other("the head of a part does not end"))));
        }
        Poll::Ready(Some(Ok(chunk)))
    }
}

/// What of a body nobody has read.
struct Rest(Arc<Mutex<BodyDataStream>>);

impl Rest {
    /// Reads to the body's end, or so many bytes.
    async fn discard(self, max_bytes: usize) {
        let mut discarded = 0;
        while discarded < max_bytes {
            let next = std::future::poll_fn(|context| self.0.lock().poll_next_unpin(context));
            match next.await {
                Some(Ok(chunk)) => discarded += chunk.len(),
                Some(Err(_)) | None => return,
            }
        }
    }
}

fn too_large(part: &str, max_bytes: u64) -> ApiError {
    let message = format!("`{part}` may have {max_bytes} bytes.");
    ApiError::bad_body(StatusCode::PAYLOAD_TOO_LARGE, message).for_param(part)
}

fn body_error(error: multer::Error) -> ApiError {
    if is_timeout(&error) {
        return ApiError::bad_body(StatusCode::REQUEST_TIMEOUT, "The body took too long.");
    }
    let reason = match &error {
        multer::Error::StreamReadFailed(cause) => cause.to_string(),
        other => other.to_string(),
    };
    ApiError::bad_request(format!("The body is no complete multipart/form-data: {reason}"))
}

fn storage_error(error: io::Error) -> ApiError {
    ApiError::storage(&error)
}
