//! The Hub's client against a small server that speaks the Hub's endpoints as the real one does: the list of a revision, files by
//! range with etag and commit, large files by a redirect to another host, 401 and 404.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use polylora::hub::{Hub, HubConfig, HubError, HubId};
use serde_json::json;

const TOKEN: &str = "hf_secret";

/// A commit and its files.
type Revision = (String, BTreeMap<String, Vec<u8>>);

/// What the fake Hub holds, and what it was asked.
#[derive(Default)]
struct FakeHub {
    /// `org/name` → revision → what it holds.
    repos: BTreeMap<String, BTreeMap<String, Revision>>,
    private: Vec<String>,
    requests: Mutex<Vec<String>>,
    tokens_at_cdn: Mutex<Vec<bool>>,
    ranges_at_cdn: Mutex<Vec<String>>,
    cdn: Mutex<String>,
    /// The next download from the other host breaks off.
    breaks: Mutex<Option<()>>,
    /// Instead of a file's own.
    etag: Option<String>,
}

impl FakeHub {
    fn add(&mut self, repo: &str, revision: &str, commit: &str, files: &[(&str, &[u8])]) {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        let revisions = self.repos.entry(repo.to_owned()).or_default();
        revisions.insert(commit.to_owned(), (commit.to_owned(), files));
        let entry = revisions[commit].clone();
        revisions.insert(revision.to_owned(), entry);
    }

    fn is_denied(&self, repo: &str, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        self.private.iter().any(|private| private == repo) && given != Some(&format!("Bearer {TOKEN}"))
    }
}

async fn revision(
    State(hub): State<Arc<FakeHub>>,
    UrlPath((org, name, revision)): UrlPath<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    let repo = format!("{org}/{name}");
    hub.requests.lock().unwrap().push(format!("list {repo}@{revision}"));
    if hub.is_denied(&repo, &headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    match hub.repos.get(&repo).and_then(|revisions| revisions.get(&revision)) {
        Some((commit, files)) => {
            let siblings: Vec<_> = files.keys().map(|file| json!({"rfilename": file})).collect();
            Json(json!({"id": repo, "sha": commit, "siblings": siblings, "private": false})).into_response()
        }
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// One byte range of `bytes`, with the headers that the client looks at.
fn ranged(bytes: &[u8], headers: &HeaderMap) -> Response {
    let range = headers[header::RANGE].to_str().unwrap().strip_prefix("bytes=").unwrap();
    let (first, last) = range.split_once('-').unwrap();
    let first: usize = first.parse().unwrap();
    let end = last.parse().map_or(bytes.len(), |last: usize| (last + 1).min(bytes.len()));
    let content_range = format!("bytes {first}-{}/{}", end.saturating_sub(1), bytes.len());
    (
        StatusCode::PARTIAL_CONTENT,
        [(header::CONTENT_RANGE, content_range)],
        bytes[first..end].to_vec(),
    )
        .into_response()
}

async fn resolve(
    State(hub): State<Arc<FakeHub>>,
    UrlPath((org, name, revision, file)): UrlPath<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response {
    let repo = format!("{org}/{name}");
    hub.requests.lock().unwrap().push(format!("file {repo}@{revision}/{file}"));
    if hub.is_denied(&repo, &headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let Some((commit, files)) = hub.repos.get(&repo).and_then(|revisions| revisions.get(&revision)) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let Some(bytes) = files.get(&file) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let etag = hub.etag.clone().unwrap_or_else(|| format!("\"{commit}-{file}\""));
    let mut response = if file.ends_with(".safetensors") {
        // Large files lie elsewhere.
        let location = format!("{}/cdn/{repo}/{revision}/{file}", hub.cdn.lock().unwrap());
        (
            StatusCode::FOUND,
            [(header::LOCATION, location), ("x-linked-etag".parse().unwrap(), etag)],
        )
            .into_response()
    } else {
        let mut response = ranged(bytes, &headers);
        response.headers_mut().insert(header::ETAG, etag.parse().unwrap());
        response
    };
    response.headers_mut().insert("x-repo-commit", commit.parse().unwrap());
    response
}

async fn cdn(
    State(hub): State<Arc<FakeHub>>,
    UrlPath((org, name, revision, file)): UrlPath<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response {
    hub.tokens_at_cdn.lock().unwrap().push(headers.contains_key(header::AUTHORIZATION));
    let range = headers[header::RANGE].to_str().unwrap().to_owned();
    hub.ranges_at_cdn.lock().unwrap().push(range);
    if hub.breaks.lock().unwrap().take().is_some() {
        // Half of it, and the connection is gone.
        let mut response = ranged(&hub.repos[&format!("{org}/{name}")][&revision].1[&file], &headers);
        let bytes = std::mem::take(response.body_mut());
        let bytes = axum::body::to_bytes(bytes, usize::MAX).await.unwrap();
        let half = bytes.slice(..bytes.len() / 2);
        let broken = futures::stream::iter([Ok(half), Err(std::io::Error::other("broken"))]);
        *response.body_mut() = axum::body::Body::from_stream(broken);
        response.headers_mut().remove(header::CONTENT_LENGTH);
        return response;
    }
    ranged(&hub.repos[&format!("{org}/{name}")][&revision].1[&file], &headers)
}

/// The running fake, its address, and a cache folder.
struct Setup {
    hub: Arc<FakeHub>,
    endpoint: String,
    cache: tempfile::TempDir,
}

async fn start(hub: FakeHub) -> Setup {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    // Another host by name, so that the client must not send its token there.
    *hub.cdn.lock().unwrap() = format!("http://localhost:{port}");
    let hub = Arc::new(hub);
    let router = Router::new()
        .route("/api/models/{org}/{name}/revision/{revision}", get(revision))
        .route("/{org}/{name}/resolve/{revision}/{*file}", get(resolve))
        .route("/cdn/{org}/{name}/{revision}/{*file}", get(cdn))
        .with_state(hub.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    Setup {
        hub,
        endpoint: format!("http://127.0.0.1:{port}"),
        cache: tempfile::tempdir().unwrap(),
    }
}

impl Setup {
    fn client(&self) -> HubConfig {
        HubConfig {
            endpoint: Some(self.endpoint.clone()),
            cache_dir: self.cache.path().to_owned(),
            token: None,
            offline: false,
            progress: true,
        }
    }

    /// Fetches on a thread that may block.
    async fn fetch(&self, config: HubConfig, id: &str, adapter: bool) -> Result<std::path::PathBuf, HubError> {
        let id: HubId = id.parse().unwrap();
        let fetch = move || {
            let hub = Hub::new(config);
            if adapter { hub.fetch_adapter(&id) } else { hub.fetch_model(&id) }
        };
        tokio::task::spawn_blocking(fetch).await.unwrap()
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.hub.requests.lock().unwrap())
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

const MODEL: &[(&str, &[u8])] = &[
    (".gitattributes", b""),
    ("README.md", b"# model"),
    ("config.json", b"{}"),
    ("consolidated.safetensors", b"the same weights again"),
    ("model-00001-of-00002.safetensors", b"first"),
    ("model-00002-of-00002.safetensors", b"second"),
    (
        "model.safetensors.index.json",
        br#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#,
    ),
    ("onnx/model.safetensors", b"not ours"),
    ("pytorch_model.bin", b"pickle"),
    ("tokenizer.json", b"{}"),
];

#[tokio::test]
async fn a_model_is_fetched_once_and_only_what_is_needed() {
    let mut hub = FakeHub::default();
    hub.add("org/model", "main", "c0ffee", MODEL);
    let setup = start(hub).await;
    let folder = setup.fetch(setup.client(), "org/model", false).await.unwrap();
    assert_eq!(folder, setup.cache.path().join("models--org--model/snapshots/c0ffee"));
    assert_eq!(
        names(&folder),
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json"
        ]
    );
    assert_eq!(std::fs::read(folder.join("model-00002-of-00002.safetensors")).unwrap(), b"second");
    let asked = setup.requests();
    assert!(
        asked.iter().all(|request| !request.contains(".bin") && !request.contains("consolidated")),
        "{asked:?}"
    );
    assert!(
        asked.iter().skip(1).all(|request| request.starts_with("file org/model@c0ffee/")),
        "by commit: {asked:?}"
    );

    setup.fetch(setup.client(), "org/model", false).await.unwrap();
    assert_eq!(setup.requests(), ["list org/model@main"], "nothing is fetched twice");
}

#[tokio::test]
async fn a_revision_is_fetched_under_its_name_and_a_moved_branch_again() {
    let mut hub = FakeHub::default();
    let adapter = |config: &'static [u8]| {
        [
            ("adapter_config.json", config),
            ("adapter_model.safetensors", b"ab"),
            ("adapter_model.bin", b"p"),
            ("chat_template.jinja", b"t"),
        ]
    };
    hub.add("org/adapter", "v1", "aaa1", &adapter(b"{\"r\":1}"));
    hub.add("org/adapter", "main", "aaa2", &adapter(b"{\"r\":2}"));
    let setup = start(hub).await;
    for (id, config) in [
        ("org/adapter@v1", "{\"r\":1}"),
        ("org/adapter", "{\"r\":2}"),
        ("org/adapter@aaa1", "{\"r\":1}"),
    ] {
        let folder = setup.fetch(setup.client(), id, true).await.unwrap();
        let expected = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"];
        assert_eq!(names(&folder), expected, "{id}");
        assert_eq!(std::fs::read_to_string(folder.join("adapter_config.json")).unwrap(), config, "{id}");
    }

    // The branch moves: the same cache, another server.
    let mut moved = FakeHub::default();
    moved.add("org/adapter", "main", "aaa3", &adapter(b"{\"r\":3}"));
    let moved = start(moved).await;
    let mut config = setup.client();
    config.endpoint = Some(moved.endpoint.clone());
    let folder = setup.fetch(config, "org/adapter", true).await.unwrap();
    assert_eq!(std::fs::read_to_string(folder.join("adapter_config.json")).unwrap(), "{\"r\":3}");
}

#[tokio::test]
async fn offline_only_the_cache_is_asked() {
    let mut hub = FakeHub::default();
    hub.add("org/model", "main", "c0ffee", MODEL);
    let setup = start(hub).await;
    let mut offline = setup.client();
    offline.offline = true;
    let error = setup.fetch(offline.clone(), "org/model", false).await.unwrap_err();
    assert!(matches!(&error, HubError::NotCached { file, .. } if file == "config.json"), "{error}");
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");

    let folder = setup.fetch(setup.client(), "org/model", false).await.unwrap();
    setup.requests();
    assert_eq!(setup.fetch(offline.clone(), "org/model", false).await.unwrap(), folder);
    assert_eq!(setup.fetch(offline.clone(), "org/model@c0ffee", false).await.unwrap(), folder);
    assert!(setup.requests().is_empty());

    std::fs::remove_file(folder.join("model-00002-of-00002.safetensors")).unwrap();
    let error = setup.fetch(offline, "org/model", false).await.unwrap_err();
    assert!(error.to_string().contains("model-00002-of-00002.safetensors"), "{error}");
}

#[tokio::test]
async fn without_the_hub_a_cached_copy_is_served_and_else_the_reason_is_given() {
    let mut hub = FakeHub::default();
    hub.add("org/model", "main", "c0ffee", MODEL);
    let setup = start(hub).await;
    let mut unreachable = setup.client();
    // A port that was just free: nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    unreachable.endpoint = Some(format!("http://127.0.0.1:{port}"));
    let error = setup.fetch(unreachable.clone(), "org/model", false).await.unwrap_err();
    assert!(matches!(error, HubError::Failed { .. }), "{error}");
    let folder = setup.fetch(setup.client(), "org/model", false).await.unwrap();
    assert_eq!(setup.fetch(unreachable, "org/model", false).await.unwrap(), folder);
}

#[tokio::test]
async fn a_private_repository_needs_the_token_which_downloads_from_other_hosts_do_not_get() {
    let mut hub = FakeHub::default();
    hub.add("org/secret", "main", "5ec2e7", MODEL);
    hub.private.push("org/secret".to_owned());
    let setup = start(hub).await;
    let error = setup.fetch(setup.client(), "org/secret", false).await.unwrap_err();
    assert!(matches!(error, HubError::Denied { status: 401, .. }), "{error}");
    assert!(error.to_string().contains("set HF_TOKEN"), "{error}");

    let mut config = setup.client();
    config.token = Some(TOKEN.to_owned());
    setup.fetch(config.clone(), "org/secret", false).await.unwrap();
    let at_cdn = setup.hub.tokens_at_cdn.lock().unwrap();
    assert!(
        !at_cdn.is_empty() && at_cdn.iter().all(|sent| !sent),
        "a download from another host carries no token"
    );
    assert!(!format!("{config:?}").contains(TOKEN));
}

#[tokio::test]
async fn a_download_that_breaks_off_goes_on_where_it_was() {
    let mut hub = FakeHub::default();
    let weights: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
    hub.add(
        "org/adapter",
        "main",
        "aaa1",
        &[("adapter_config.json", b"{}"), ("adapter_model.safetensors", &weights)],
    );
    *hub.breaks.lock().unwrap() = Some(());
    let setup = start(hub).await;
    let folder = setup.fetch(setup.client(), "org/adapter", true).await.unwrap();
    assert_eq!(std::fs::read(folder.join("adapter_model.safetensors")).unwrap(), weights);
    let ranges = setup.hub.ranges_at_cdn.lock().unwrap().clone();
    assert_eq!((ranges.len(), ranges[0].as_str()), (2, "bytes=0-"), "{ranges:?}");
    assert_ne!(ranges[1], "bytes=0-", "what has come is not fetched again");
    let blobs = names(&setup.cache.path().join("models--org--adapter/blobs"));
    assert!(blobs.iter().all(|name| !name.ends_with(".part")), "{blobs:?}");
}

#[tokio::test]
async fn an_etag_that_is_a_path_is_refused() {
    let mut hub = FakeHub::default();
    hub.add("org/model", "main", "c0ffee", MODEL);
    hub.etag = Some("\"../../../outside\"".to_owned());
    let setup = start(hub).await;
    let error = setup.fetch(setup.client(), "org/model", false).await.unwrap_err();
    assert!(error.to_string().contains("can't be a file's name"), "{error}");
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let mut hub = FakeHub::default();
    hub.add(
        "org/pickle",
        "main",
        "aaa1",
        &[("adapter_config.json", b"{}"), ("adapter_model.bin", b"p")],
    );
    hub.add("org/empty", "main", "aaa2", &[("README.md", b"")]);
    let setup = start(hub).await;
    let error = |id| setup.fetch(setup.client(), id, true);
    let text = error("org/pickle").await.unwrap_err().to_string();
    assert!(text.contains("adapter_model.safetensors") && text.contains("pickle"), "{text}");
    let text = error("org/empty").await.unwrap_err().to_string();
    assert!(text.ends_with("org/empty has no adapter_config.json"), "{text}");
    for id in ["org/missing", "org/pickle@missing"] {
        assert!(matches!(error(id).await.unwrap_err(), HubError::NotFound { .. }), "{id}");
    }
}

#[test]
fn only_names_that_stay_in_the_cache_folder_are_ids() {
    for id in ["org/name", "o.r_g-1/n.a_m-e", "org/name@v1.0", "org/name@feature/x", "org/name@0123abcd"] {
        assert_eq!(id.parse::<HubId>().unwrap().to_string(), id);
    }
    for id in [
        "",
        "name",
        "/name",
        "org/",
        "org/name/more",
        "../name",
        "org/..",
        "org/.hidden",
        "org/na me",
        "org/name@",
        "org/name@../../x",
        "org/name@/etc",
        "org/name@a//b",
        "a--b/name",
        "https://host/x",
        "org\\name/x",
    ] {
        assert!(id.parse::<HubId>().is_err(), "{id:?}");
    }
}
