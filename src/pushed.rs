//! Adapters that clients send as bytes: from a multipart body to a folder, never through memory, never half.
//!
//! A body has two parts: `config` (`adapter_config.json`) and `weights` (`adapter_model.safetensors`). They are written to a folder
//! of their own as they come, bounded by [`PushedAdapters::max_bytes`]; a body that ends early, is too large or has other parts
//! leaves nothing behind. What is in the files is checked like every other adapter's when they are loaded.

use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
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
    config::{CONFIG_FILE, MAX_CONFIG_BYTES},
    tensors::WEIGHTS_FILE,
};
use tokio::{
    io::{AsyncWriteExt, BufWriter},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use crate::{error::ApiError, extract::is_timeout, state_dir::sync_folder};

/// Largest `weights`, if nobody says otherwise: rank 256 on every projection of an 8B model has 1.3 GB.
pub const DEFAULT_MAX_PUSH_BYTES: u64 = 2 << 30;
/// Bodies that are received at once.
const MAX_UPLOADS: usize = 4;
/// Bytes gathered before a write.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes of a body in which no part is found.
const MAX_UNREAD_BYTES: usize = 4 << 20;

/// Where pushed adapters are kept.
#[derive(Debug)]
pub struct PushedAdapters {
    place: Place,
    /// Largest `weights`.
    max_bytes: u64,
    uploads: Arc<Semaphore>,
}

#[derive(Debug)]
enum Place {
    Folder(PathBuf),
    /// Made for the first push; removed with everything in it when this is dropped.
    Temporary(Mutex<Option<tempfile::TempDir>>),
}

/// The complete files of a pushed adapter. Dropped, they are removed, unless they were kept.
#[derive(Debug)]
pub struct Upload {
    directory: PathBuf,
    is_kept: bool,
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
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.is_kept {
            remove(&self.directory);
        }
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

impl PushedAdapters {
    /// In a folder that stays.
    pub fn in_folder(folder: PathBuf, max_bytes: u64) -> Self {
        Self::new(Place::Folder(folder), max_bytes)
    }

    /// In a temporary folder, which goes when this is dropped.
    pub fn temporary(max_bytes: u64) -> Self {
        Self::new(Place::Temporary(Mutex::default()), max_bytes)
    }

    fn new(place: Place, max_bytes: u64) -> Self {
        Self {
            place,
            max_bytes,
            uploads: Arc::new(Semaphore::new(MAX_UPLOADS)),
        }
    }

    fn root(&self) -> io::Result<PathBuf> {
        match &self.place {
            Place::Folder(folder) => Ok(folder.clone()),
            Place::Temporary(made) => {
                let mut made = made.lock();
                let folder = match made.take() {
                    Some(folder) => folder,
                    None => tempfile::Builder::new().prefix("polylora-adapters-").tempdir()?,
                };
                let path = folder.path().to_owned();
                *made = Some(folder);
                Ok(path)
            }
        }
    }

    /// Removes a pushed adapter's files, by [`Upload::name`]. Blocks.
    pub fn remove(&self, name: &str) {
        if let Ok(root) = self.root() {
            remove(&root.join(name));
        }
    }

    /// Receives a body.
    ///
    /// # Errors
    /// 400 for parts that are missing, twice there, unknown or cut off; 408 and 413 for a body that takes too long or is too large;
    /// 415 for another media type; 503 while others are received; 507 for a full disk. Nothing is left behind.
    pub async fn receive(&self, headers: &HeaderMap, body: Body) -> Result<Upload, ApiError> {
        let (mut body, read) = self.parts_of(headers, body)?;
        let Ok(permit) = Arc::clone(&self.uploads).try_acquire_owned() else {
            return Err(ApiError::too_many_uploads(MAX_UPLOADS));
        };
        let root = self.root().map_err(storage_error)?;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let mut upload = Upload {
            directory: root.join(format!("{name}.partial")),
            is_kept: false,
            _permit: permit,
        };
        tokio::fs::create_dir(&upload.directory).await.map_err(storage_error)?;
        let mut missing = vec!["config", "weights"];
        while let Some(field) = body.next_field().await.map_err(body_error)? {
            read.store(0, Relaxed);
            let (part, file, max_bytes) = match field.name() {
                Some("config") => ("config", CONFIG_FILE, MAX_CONFIG_BYTES),
                Some("weights") => ("weights", WEIGHTS_FILE, self.max_bytes),
                other => {
                    let other = other.unwrap_or_default();
                    let message = format!("The parts of the body are `config` and `weights`, got {other:?}.");
                    return Err(ApiError::invalid(other, message));
                }
            };
            let Some(index) = missing.iter().position(|missing| *missing == part) else {
                return Err(ApiError::invalid(part, format!("The body has two parts `{part}`.")));
            };
            missing.swap_remove(index);
            write(field, &read, &upload.directory.join(file), part, max_bytes).await?;
        }
        if let Some(part) = missing.first() {
            return Err(ApiError::invalid(*part, format!("The body has no part `{part}`.")));
        }
        // Whoever finds a folder without `.partial` finds all of it.
        let complete = root.join(&name);
        tokio::fs::rename(&upload.directory, &complete).await.map_err(storage_error)?;
        upload.directory.clone_from(&complete);
        let synced = tokio::task::spawn_blocking(move || sync_folder(&complete).and_then(|()| sync_folder(&root)));
        synced.await.map_err(|_| ApiError::internal())?.map_err(storage_error)?;
        Ok(upload)
    }

    fn parts_of(&self, headers: &HeaderMap, body: Body) -> Result<(Multipart<'static>, Arc<AtomicUsize>), ApiError> {
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let boundary = multer::parse_boundary(header(CONTENT_TYPE)).map_err(|_| {
            let message = "The body must be multipart/form-data, with the parts `config` and `weights`.";
            ApiError::bad_body(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
        })?;
        if header(CONTENT_LENGTH)
            .parse()
            .is_ok_and(|len: u64| len > self.max_bytes + 2 * MAX_CONFIG_BYTES)
        {
            return Err(too_large("weights", self.max_bytes));
        }
        let read = Arc::new(AtomicUsize::new(0));
        let paced = Paced {
            body: body.into_data_stream(),
            rests: false,
            read: Arc::clone(&read),
        };
        Ok((Multipart::new(paced, boundary), read))
    }
}

/// A body that gives one chunk a poll: multer gathers whatever is ready, which would be all of a body that comes faster than the disk
/// takes it. And one that gives up when nothing is made of its chunks.
struct Paced {
    body: BodyDataStream,
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
        let Some(chunk) = ready!(self.body.poll_next_unpin(context)) else {
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

fn too_large(part: &str, max_bytes: u64) -> ApiError {
    let message = format!("`{part}` may have {max_bytes} bytes.");
    ApiError::bad_body(StatusCode::PAYLOAD_TOO_LARGE, message).for_param(part)
}

/// Writes one part to a file, at most so many bytes.
async fn write(mut field: Field<'_>, read: &AtomicUsize, path: &Path, part: &str, max_bytes: u64) -> Result<(), ApiError> {
    let file = tokio::fs::File::create(path).await.map_err(storage_error)?;
    let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
    let mut bytes = 0;
    while let Some(chunk) = field.chunk().await.map_err(body_error)? {
        read.store(0, Relaxed);
        bytes += chunk.len() as u64;
        if bytes > max_bytes {
            return Err(too_large(part, max_bytes));
        }
        file.write_all(&chunk).await.map_err(storage_error)?;
    }
    file.flush().await.map_err(storage_error)?;
    file.get_ref().sync_all().await.map_err(storage_error)
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
