//! Transfers files of the Hub into the cache's blobs.
//!
//! Not by `hf-hub` (0.5): to learn a large file's size it sends the token to whatever host the Hub redirects to. Here the token goes to
//! the Hub's own origin and nowhere else, which means following redirects by hand.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use ureq::{
    Agent, Body,
    http::{Response, Uri, header},
};

const MAX_REDIRECTS: usize = 8;
const ATTEMPTS: usize = 3;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Until an answer begins; its body may take as long as it likes.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a file could not be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransferError {
    /// The Hub's answer.
    #[error("status {0}")]
    Status(u16),
    /// The network.
    #[error("{0}")]
    Request(#[from] Box<ureq::Error>),
    /// The disk, or a connection that broke.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// An answer that makes no sense.
    #[error("{url}: {reason}")]
    BadAnswer {
        /// What was asked for, without what may be a signature.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Told how a transfer goes.
pub(super) trait Progress {
    /// A file of so many bytes, some of which are here already.
    fn begin(&self, file: &str, total: u64, here: u64);
    /// More bytes.
    fn advance(&self, bytes: u64);
}

/// Transfers one file.
pub(super) struct Transfer {
    agent: Agent,
    /// At the Hub: the token is for this origin.
    url: Uri,
    user_agent: String,
    authorization: Option<String>,
}

/// An answer, and the redirects' last word on the file's identity.
struct Answer {
    response: Response<Body>,
    url: Uri,
    etag: Option<String>,
}

impl Transfer {
    /// Of the file that the Hub has at `url`, as whom `token` says.
    ///
    /// # Errors
    /// No URL.
    pub fn new(url: &str, token: Option<&str>) -> Result<Self, TransferError> {
        let url = url.parse().map_err(|_| bad_answer_at(url, "is no URL"))?;
        let agent = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .build()
            .into();
        Ok(Self {
            agent,
            url,
            user_agent: format!("polylora/{}", env!("CARGO_PKG_VERSION")),
            authorization: token.map(|token| format!("Bearer {token}")),
        })
    }

    /// Brings the file into `blobs`, unless it is there; its place. A transfer that broke off goes on where it was.
    ///
    /// # Errors
    /// See [`TransferError`].
    pub fn fetch(&self, file: &str, blobs: &Path, progress: &dyn Progress) -> Result<PathBuf, TransferError> {
        // The Hub says what the file is, whoever has its bytes.
        let etag = self.get("bytes=0-0", false)?.etag;
        let blob = blobs.join(etag.ok_or_else(|| bad_answer(&self.url, "the file has no etag"))?);
        std::fs::create_dir_all(blobs)?;
        let lock = File::create(with_end(&blob, "lock"))?;
        // Another process may be at the same file: then it is here when the lock is.
        lock.lock()?;
        if blob.exists() {
            return Ok(blob);
        }
        let part = with_end(&blob, "part");
        let mut attempt = 1;
        loop {
            match self.fetch_part(file, &part, progress) {
                Ok(()) => break,
                Err(error @ (TransferError::Io(_) | TransferError::Request(_))) if attempt < ATTEMPTS => {
                    tracing::info!(file, %error, "a download broke off; it goes on");
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
        std::fs::rename(&part, &blob)?;
        Ok(blob)
    }

    /// The rest of a file, appended to `part`.
    fn fetch_part(&self, file: &str, part: &Path, progress: &dyn Progress) -> Result<(), TransferError> {
        let mut output = OpenOptions::new().create(true).truncate(false).write(true).open(part)?;
        let here = output.seek(SeekFrom::End(0))?;
        let Answer { response, url, .. } = match self.get(&format!("bytes={here}-"), true) {
            // Everything is here, or what is here is of no use.
            Err(TransferError::Status(416)) if here > 0 => {
                output.set_len(0)?;
                return self.fetch_part(file, part, progress);
            }
            other => other?,
        };
        let is_rest = response.status() == 206;
        let here = if is_rest { here } else { 0 };
        output.set_len(here)?;
        output.seek(SeekFrom::Start(here))?;
        let length = |name: header::HeaderName| response.headers().get(name)?.to_str().ok();
        let total = if is_rest {
            length(header::CONTENT_RANGE).and_then(|range| range.rsplit_once('/')?.1.parse().ok())
        } else {
            length(header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok())
        };
        let total = total.ok_or_else(|| bad_answer(&url, "the answer does not say how long the file is"))?;
        progress.begin(file, total, here);
        let mut input = response.into_body().into_with_config().limit(total.saturating_sub(here) + 1).reader();
        let mut buffer = vec![0; 1 << 16];
        let mut written = here;
        loop {
            let bytes = input.read(&mut buffer)?;
            if bytes == 0 {
                break;
            }
            output.write_all(&buffer[..bytes])?;
            written += bytes as u64;
            progress.advance(bytes as u64);
        }
        if written < total {
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("{written} of {total} bytes came")).into());
        }
        if written > total {
            output.set_len(0)?;
            return Err(bad_answer(&url, "more bytes came than the file has"));
        }
        output.sync_all()?;
        Ok(())
    }

    /// Asks for a range. Redirects within the Hub are followed; those to elsewhere only if `to_the_bytes`, and then without the token.
    fn get(&self, range: &str, to_the_bytes: bool) -> Result<Answer, TransferError> {
        let mut url = self.url.clone();
        let mut etag = None;
        for _ in 0..=MAX_REDIRECTS {
            let is_hub = has_same_origin(&url, &self.url);
            let mut request = self
                .agent
                .get(url.clone())
                .header(header::RANGE, range)
                .header(header::USER_AGENT, &self.user_agent);
            if let Some(authorization) = self.authorization.as_ref().filter(|_| is_hub) {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            let response = request.call().map_err(Box::new)?;
            if is_hub {
                etag = etag_of(&url, &response)?.or(etag);
            }
            let status = response.status();
            if status.is_client_error() || status.is_server_error() {
                return Err(TransferError::Status(status.as_u16()));
            }
            let next = match response.headers().get(header::LOCATION) {
                Some(location) if status.is_redirection() => {
                    let location = location.to_str().ok().and_then(|location| redirected(&url, location));
                    location.ok_or_else(|| bad_answer(&url, "it redirects to what is no http address"))?
                }
                _ => return Ok(Answer { response, url, etag }),
            };
            if !to_the_bytes && !has_same_origin(&next, &self.url) {
                return Ok(Answer { response, url, etag });
            }
            if url.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(bad_answer(&url, "it redirects from https to http"));
            }
            url = next;
        }
        Err(bad_answer(&url, "too many redirects"))
    }
}

/// The file's identity, if the answer has it. It becomes a file's name: nothing that could leave the folder passes.
fn etag_of(url: &Uri, response: &Response<Body>) -> Result<Option<String>, TransferError> {
    let Some(etag) = response.headers().get("x-linked-etag").or_else(|| response.headers().get(header::ETAG)) else {
        return Ok(None);
    };
    let text = etag.to_str().unwrap_or_default();
    let text = text.strip_prefix("W/").unwrap_or(text).trim_matches('"');
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.len() > 200 || text.starts_with('.') || !text.chars().all(is_plain) {
        return Err(bad_answer(url, &format!("its etag {etag:?} can't be a file's name")));
    }
    Ok(Some(text.to_owned()))
}

/// Where a redirect leads.
fn redirected(from: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with('/') && !location.starts_with("//") {
        return format!("{}://{}{location}", from.scheme_str()?, from.authority()?).parse().ok();
    }
    let url: Uri = location.parse().ok()?;
    (matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some()).then_some(url)
}

fn has_same_origin(left: &Uri, right: &Uri) -> bool {
    let port = |uri: &Uri| {
        uri.port_u16()
            .or_else(|| (uri.scheme_str() == Some("https")).then_some(443))
            .unwrap_or(80)
    };
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    left.scheme() == right.scheme() && host(left) == host(right) && port(left) == port(right)
}

fn with_end(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(end);
    name.into()
}

fn bad_answer(url: &Uri, reason: &str) -> TransferError {
    bad_answer_at(
        &format!(
            "{}://{}{}",
            url.scheme_str().unwrap_or_default(),
            url.host().unwrap_or_default(),
            url.path()
        ),
        reason,
    )
}

fn bad_answer_at(url: &str, reason: &str) -> TransferError {
    TransferError::BadAnswer {
        url: url.to_owned(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |left: &str, right: &str| has_same_origin(&left.parse().unwrap(), &right.parse().unwrap());
        assert!(same("https://hub.test/a", "https://HUB.test:443"));
        assert!(same("http://127.0.0.1:80/a?b", "http://127.0.0.1"));
        for other in [
            "http://hub.test/a",
            "https://hub.test:8443/a",
            "https://cdn.hub.test/a",
            "https://hub.test.evil/a",
            "https://hub.test@evil.test/a",
        ] {
            assert!(!same(other, "https://hub.test"), "{other}");
        }
    }

    #[test]
    fn redirects_lead_to_http_addresses_or_nowhere() {
        let to = |location: &str| redirected(&"https://hub.test/a/b?c".parse().unwrap(), location).map(|url| url.to_string());
        assert_eq!(to("/d?e").as_deref(), Some("https://hub.test/d?e"));
        assert_eq!(to("https://cdn.test/x").as_deref(), Some("https://cdn.test/x"));
        for nowhere in ["//cdn.test/x", "d", "file:///etc/passwd", "", "ftp://x/y"] {
            assert_eq!(to(nowhere), None, "{nowhere}");
        }
    }
}
