//! Pushed adapters over the mock engine (which reads no files), and what is kept of changes at run time.
//!
//! | outcome | status |
//! | --- | --- |
//! | served | 200 |
//! | a part is missing, twice there, unknown or cut off; the files are wrong; `replace=false` and the name is taken | 400 |
//! | the body takes too long | 408 |
//! | another version than `expected_version` | 409 |
//! | `weights` is too large | 413 |
//! | no multipart/form-data | 415 |
//! | in effect, but not in `--state-dir` | 500, `state_not_saved` |
//! | four others are being received | 503 |
//! | the disk is full, or what pushed adapters may have of it | 507 |
//!
//! Whatever it is: what is not served leaves no file behind.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{body::Body, http::Request};
use futures::FutureExt;
use polylora::{
    pushed::{PushLimits, PushedAdapters},
    state_dir::{Changes, RuntimeState},
};
use polylora_engine::{AdapterError, InferenceEngine};
use serde_json::json;

use crate::common::{Answer, Server};

const MAX_BYTES: u64 = 1000;
const LIMITS: PushLimits = PushLimits {
    max_bytes: MAX_BYTES,
    max_total_bytes: 10_000,
};

/// A server that keeps pushed adapters in a folder.
fn server_in(folder: &Path) -> Server {
    let folder = folder.to_owned();
    Server::with(
        |engine| engine,
        |gateway| gateway.pushed = Arc::new(PushedAdapters::in_folder(folder, LIMITS)),
    )
}

fn part(name: &str, content: &str) -> String {
    format!("--XX\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"x\"\r\n\r\n{content}\r\n")
}

fn form(parts: &[(&str, &str)]) -> String {
    let parts: String = parts.iter().map(|(name, content)| part(name, content)).collect();
    parts + "--XX--\r\n"
}

fn files() -> String {
    form(&[("config", "{\"r\": 2}"), ("weights", "bytes\r\n--X")])
}

async fn push(server: &Server, target: &str, body: impl Into<Body>) -> Answer {
    let request = Request::post(format!("/v1/adapters/{target}")).header("content-type", "multipart/form-data; boundary=XX");
    server.send(request.body(body.into()).unwrap()).await
}

fn shard(file: &str, content: &str) -> String {
    format!("--XX\r\nContent-Disposition: form-data; name=\"shard\"; filename=\"{file}\"\r\n\r\n{content}\r\n")
}

/// A form of an adapter that was split into `shards`, with an index that names `indexed`.
fn split_form(indexed: &[&str], shards: &[(&str, &str)]) -> String {
    let map: BTreeMap<String, &str> = indexed.iter().enumerate().map(|(number, file)| (format!("t{number}"), *file)).collect();
    let shards: String = shards.iter().map(|(file, content)| shard(file, content)).collect();
    part("config", "{}") + &part("index", &json!({"weight_map": map}).to_string()) + &shards + "--XX--\r\n"
}

/// Everything in a folder: path and content.
fn tree(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.insert(path.clone(), String::new());
            found.extend(tree(&path));
        } else {
            found.insert(path.clone(), fs::read_to_string(&path).unwrap());
        }
    }
    found
}

#[tokio::test]
async fn a_pushed_adapter_is_served_and_its_files_go_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let server = server_in(folder.path());
    let first = push(&server, "new", files()).await.json(200).await["adapter"].take();
    assert_eq!(
        (&first["name"], &first["pinned"], &first["state"]),
        (&json!("new"), &json!(false), &json!("host"))
    );
    let name = first["source"].as_str().unwrap().strip_prefix("pushed:").unwrap();
    let own = folder.path().join(name);
    let expected = [
        (own.clone(), ""),
        (own.join("adapter_config.json"), "{\"r\": 2}"),
        (own.join("adapter_model.safetensors"), "bytes\r\n--X"),
    ];
    let expected: BTreeMap<_, _> = expected.into_iter().map(|(path, text)| (path, text.to_owned())).collect();
    assert_eq!(tree(folder.path()), expected);
    let generated = server.post("/generate", json!({"text": "a", "lora_path": "new"})).await.json(200).await;
    assert_eq!(generated["meta_info"]["lora"], "new");

    // Again: a new version in its place, and only its files are left.
    let weights_first = form(&[("weights", "other"), ("config", "{}")]);
    let second = push(&server, "new?pinned=true", weights_first).await.json(200).await["adapter"].take();
    assert_ne!(first["version"], second["version"]);
    assert_eq!(second["pinned"], true);
    assert!(!own.exists());
    assert_eq!(tree(folder.path()).len(), 3);
    server.post("/unload_lora_adapter", json!({"lora_name": "new"})).await.json(200).await;
    assert!(tree(folder.path()).is_empty());
    // A folder takes the place of a pushed one, too.
    push(&server, "new", files()).await.json(200).await;
    let load = json!({"lora_name": "new", "lora_path": env!("CARGO_MANIFEST_DIR"), "replace": true});
    server.post("/load_lora_adapter", load).await.json(200).await;
    assert!(tree(folder.path()).is_empty());
}

#[tokio::test]
async fn what_is_refused_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let server = server_in(folder.path());
    let version = server.engine.adapter_info("sql").unwrap().version.unwrap();
    let (config, weights) = (("config", "{}"), ("weights", "w"));
    let long = "x".repeat(MAX_BYTES as usize + 1);
    let refused = [
        ("x", form(&[config]), 400, "no part `weights`"),
        ("x", form(&[weights]), 400, "no part `config`"),
        ("x", form(&[]), 400, "no part"),
        ("x", form(&[config, config, weights]), 400, "two parts `config`"),
        ("x", form(&[config, ("pickle", "p"), weights]), 400, "got \"pickle\""),
        ("x", form(&[config, ("weights", &long)]), 413, "1000 bytes"),
        ("x", form(&[("config", &"c".repeat((1 << 20) + 1)), weights]), 413, "1048576 bytes"),
        ("x", "no form at all".to_owned(), 400, "multipart"),
        ("sql?replace=false", files(), 400, "already loaded"),
        ("sql?expected_version=00", files(), 409, "has version"),
        ("x?expected_version=00", files(), 409, "has version none"),
        ("x?force=true", files(), 400, "unknown field `force`"),
        ("demo", files(), 400, "base model"),
        ("a:b", files(), 400, "contains ':'"),
        ("..%2Fx", files(), 400, "`..`"),
    ];
    for (target, body, status, what) in refused {
        let error = push(&server, target, body).await.error(status).await;
        assert!(error["message"].as_str().unwrap().contains(what), "{target}: {error}");
        assert!(tree(folder.path()).is_empty(), "{target}");
    }
    server.engine.fail_next_load(AdapterError::Incompatible { reason: "no".into() });
    assert_eq!(push(&server, "x", files()).await.error(400).await["code"], "adapter_incompatible");
    let json = server.post("/v1/adapters/x", json!({})).await.error(415).await;
    assert!(json["message"].as_str().unwrap().contains("multipart/form-data"));
    assert!(tree(folder.path()).is_empty());
    assert_eq!(server.get("/v1/adapters/x").await.error(404).await["code"], "model_not_found");
    assert_eq!(server.engine.adapter_info("sql").unwrap().version.unwrap(), version);
    push(&server, &format!("sql?expected_version={version}"), files()).await.json(200).await;
}

#[tokio::test]
async fn an_adapter_that_was_split_is_pushed_whole() {
    let folder = tempfile::tempdir().unwrap();
    let server = server_in(folder.path());
    let (one, two) = ("adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors");
    let good = split_form(&[one, two, one], &[(two, "second"), (one, "first")]);
    push(&server, "split", good).await.json(200).await;
    let files = tree(folder.path());
    let content = |name: &str| files.iter().find(|(path, _)| path.ends_with(name)).map(|(_, content)| content.as_str());
    assert_eq!((content(one), content(two)), (Some("first"), Some("second")));
    assert!(content("adapter_model.safetensors.index.json").unwrap().contains("weight_map"));
    assert_eq!(files.len(), 5, "{files:?}");
    server.post("/unload_lora_adapter", json!({"lora_name": "split"})).await.json(200).await;
    assert!(tree(folder.path()).is_empty());

    let half = "x".repeat(MAX_BYTES as usize / 2 + 1);
    let many: Vec<String> = (0..1025).map(|number| format!("{number}.safetensors")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|file| (file.as_str(), "")).collect();
    let refused = [
        (split_form(&[one, two], &[(one, "1")]), 400, "which the index names"),
        (split_form(&[one], &[(one, "1"), (two, "2")]), 400, "The index names no file"),
        (split_form(&[one], &[(one, "1"), (one, "1")]), 400, "two parts `shard`"),
        (split_form(&[one, two], &[(one, &half), (two, &half)]), 413, "1000 bytes"),
        (split_form(&["../../x.safetensors"], &[("../../x.safetensors", "1")]), 400, "`filename`"),
        (split_form(&[one], &[("config.json", "1")]), 400, "`filename`"),
        (split_form(&[one], &[("adapter_model.safetensors", "1")]), 400, "`filename`"),
        (
            split_form(&["../x.safetensors"], &[(one, "1")]),
            400,
            "expected the name of a safetensors file",
        ),
        (split_form(&[one], &many), 400, "1024 files"),
        (part("config", "{}") + &part("shard", "no name") + "--XX--\r\n", 400, "`filename`"),
        (part("config", "{}") + &shard(one, "1") + "--XX--\r\n", 400, "no part `index`"),
        (form(&[("config", "{}"), ("index", "{}")]), 400, "weight_map"),
        (form(&[("config", "{}"), ("index", "{}"), ("weights", "w")]), 400, "which are one file"),
    ];
    for (body, status, what) in refused {
        let error = push(&server, "x", body).await.error(status).await;
        assert!(error["message"].as_str().unwrap().contains(what), "{what}: {error}");
        assert_ne!(error["param"], "lora_path", "nothing of that name was sent: {error}");
        assert!(tree(folder.path()).is_empty(), "{what}");
    }
    assert_eq!(server.get("/v1/adapters/x").await.error(404).await["code"], "model_not_found");
}

/// A full disk leaves nothing half there, is told, and does no harm to what comes after it.
#[tokio::test]
async fn what_pushed_adapters_take_of_the_disk_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let body = || form(&[("config", "{}"), ("weights", &"w".repeat(900))]);
    let pushed = {
        let folder = folder.path().to_owned();
        Arc::new(PushedAdapters::in_folder(
            folder,
            PushLimits {
                max_total_bytes: 2000,
                ..LIMITS
            },
        ))
    };
    let server = Server::with(|engine| engine, |gateway| gateway.pushed = Arc::clone(&pushed));
    push(&server, "a", body()).await.json(200).await;
    push(&server, "b", body()).await.json(200).await;
    assert_eq!(pushed.used_bytes(), 1804);
    for name in ["c", "a"] {
        let before = (tree(folder.path()), server.engine.adapter_info(name));
        let error = push(&server, name, body()).await.error(507).await;
        assert_eq!(error["code"], "pushed_adapters_full");
        assert!(error["message"].as_str().unwrap().contains("2000 bytes"), "{error}");
        assert_eq!((tree(folder.path()), server.engine.adapter_info(name)), before, "{name}");
        assert_eq!(pushed.used_bytes(), 1804);
    }
    // With room again it is taken; what is there at a start counts.
    server.post("/unload_lora_adapter", json!({"lora_name": "b"})).await.json(200).await;
    push(&server, "c", body()).await.json(200).await;
    assert_eq!(pushed.used_bytes(), 1804);
    assert_eq!(PushedAdapters::in_folder(folder.path().to_owned(), LIMITS).used_bytes(), 1804);
}

#[tokio::test]
async fn a_body_that_is_refused_is_read_on_so_that_its_sender_hears_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let server = server_in(folder.path());
    for (first, status) in [(part("weights", &"w".repeat(1001)), 413), (part("pickle", "p"), 400)] {
        let read = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = Arc::clone(&read);
        let pieces = std::iter::once(first).chain(std::iter::repeat_n("x".repeat(1000), 2000));
        let pieces = pieces.map(move |piece| {
            counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            Ok::<_, std::io::Error>(piece)
        });
        push(&server, "x", Body::from_stream(futures::stream::iter(pieces)))
            .await
            .error(status)
            .await;
        assert_eq!(read.load(std::sync::atomic::Ordering::SeqCst), 2001);
    }
}

#[tokio::test]
async fn a_body_that_is_cut_off_anywhere_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let server = server_in(folder.path());
    let body = files();
    // Without its last line feed it is complete.
    let split = split_form(&["one.safetensors"], &[("one.safetensors", "content")]);
    for len in 0..split.len() - 2 {
        push(&server, "x", split[..len].to_owned()).await.error(400).await;
        assert!(tree(folder.path()).is_empty(), "{len}");
    }
    for len in 0..body.len() - 2 {
        push(&server, "x", body[..len].to_owned()).await.error(400).await;
        let pieces = [Ok(body[..len].to_owned()), Err(std::io::Error::other("the client is gone"))];
        push(&server, "x", Body::from_stream(futures::stream::iter(pieces)))
            .await
            .error(400)
            .await;
        assert!(tree(folder.path()).is_empty(), "{len}");
    }
    assert_eq!(server.engine.list_adapters().len(), 2);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_nothing_behind_and_only_so_many_are_received_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let server = server_in(folder.path());
    let endless = || {
        let begin = futures::stream::iter([Ok::<_, std::io::Error>(part("config", "{}"))]);
        Body::from_stream(futures::StreamExt::chain(begin, futures::stream::pending()))
    };
    let mut pushes: Vec<_> = (0..4)
        .map(|index| Box::pin(push(&server, ["a", "b", "c", "d"][index], endless())))
        .collect();
    while tree(folder.path()).len() < 8 {
        for push in &mut pushes {
            assert!(push.now_or_never().is_none());
        }
        tokio::task::yield_now().await;
    }
    let mut refused = push(&server, "e", files()).await;
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.error(503).await["code"], "too_many_pushes");
    drop(pushes);
    assert!(tree(folder.path()).is_empty());
    push(&server, "e", files()).await.json(200).await;
}

#[tokio::test]
async fn the_list_tells_all() {
    let server = Server::new();
    let put = Request::put("/v1/aliases/support").header("content-type", "application/json");
    server.send(put.body(Body::from(r#"{"adapter": "sql"}"#)).unwrap()).await.json(200).await;
    server
        .post("/pin_lora_adapter", json!({"lora_name": "sql", "pinned": true}))
        .await
        .json(200)
        .await;
    server
        .post("/generate", json!({"text": "a", "lora_path": "support"}))
        .await
        .json(200)
        .await;
    let list = server.get("/v1/adapters").await.json(200).await;
    let entry = list["data"][1].clone();
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    assert_eq!(entry, server.get("/v1/adapters/sql").await.json(200).await);
    let expected = json!({
        "object": "adapter", "name": "sql", "source": "mock:sql", "state": "host", "lora_rank": 8, "target_modules": ["q_proj", "v_proj"],
        "size_bytes": 4096, "tokenizer_bytes": 0, "pinned": true, "leases": 0, "requests_total": 1, "hits_total": 1, "aliases": ["support"],
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(entry[field], *value, "{field}");
    }
    assert_eq!(entry["version"].as_str().unwrap().len(), 64);
    assert!(entry["last_used"].as_f64().unwrap() > 1.7e9, "a time stamp");
    assert_eq!(list["data"][0]["last_used"], json!(null));
}

/// A server with a state folder, after what it has kept was read; the mock has nothing of it.
fn server_with_state(folder: &Path) -> Server {
    let (state, damage) = RuntimeState::open(folder).unwrap();
    assert_eq!(damage, None);
    Server::with(
        |engine| engine,
        |gateway| {
            gateway.pushed = Arc::new(PushedAdapters::in_folder(state.pushed_adapters().unwrap(), LIMITS));
            gateway.runtime = Arc::new(state);
        },
    )
}

fn kept(folder: &Path) -> Changes {
    RuntimeState::open(folder).unwrap().0.changes()
}

#[tokio::test]
async fn every_change_that_was_answered_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let here = env!("CARGO_MANIFEST_DIR");
    let server = server_with_state(folder.path());
    push(&server, "new?pinned=true", files()).await.json(200).await;
    server
        .post("/load_lora_adapter", json!({"lora_name": "path", "lora_path": here}))
        .await
        .json(200)
        .await;
    let body = json!({"lora_name": "gone", "lora_path": here, "pinned": true});
    server.post("/load_lora_adapter", body).await.json(200).await;
    server
        .post("/pin_lora_adapter", json!({"lora_name": "sql", "pinned": true}))
        .await
        .json(200)
        .await;
    server
        .post("/pin_lora_adapter", json!({"lora_name": "json", "pinned": false}))
        .await
        .json(200)
        .await;
    for (alias, adapter) in [("support", "new"), ("old", "sql")] {
        let put = Request::put(format!("/v1/aliases/{alias}")).header("content-type", "application/json");
        let body = Body::from(json!({"adapter": adapter}).to_string());
        server.send(put.body(body).unwrap()).await.json(200).await;
    }
    server
        .send(Request::delete("/v1/aliases/old").body(Body::empty()).unwrap())
        .await
        .json(200)
        .await;
    server.post("/unload_lora_adapter", json!({"lora_name": "gone"})).await.json(200).await;
    // What fails changes nothing.
    server.engine.fail_next_load(AdapterError::Incompatible { reason: "no".into() });
    push(&server, "path", files()).await.error(400).await;
    drop(server);

    let changes = kept(folder.path());
    assert_eq!(changes.adapters.keys().collect::<Vec<_>>(), ["new", "path"]);
    let pushed = changes.adapters["new"].pushed.clone().unwrap();
    let model = folder.path().join("adapters").join(pushed).join("adapter_model.safetensors");
    assert_eq!(fs::read_to_string(model).unwrap(), "bytes\r\n--X");
    let path = &changes.adapters["path"];
    assert_eq!((path.source.as_str(), path.directory.as_deref()), (here, Some(Path::new(here))));
    let pins: Vec<_> = changes.pins.iter().map(|(name, pinned)| (name.as_str(), *pinned)).collect();
    assert_eq!(pins, [("json", false), ("new", true), ("sql", true)]);
    assert_eq!(changes.aliases.keys().collect::<Vec<_>>(), ["support"]);
}

#[tokio::test]
async fn a_change_that_can_t_be_written_is_said_to_be_in_effect() {
    let folder = tempfile::tempdir().unwrap();
    let server = server_with_state(folder.path());
    let in_the_way = folder.path().join("state.new");
    fs::create_dir(&in_the_way).unwrap();
    let error = push(&server, "new", files()).await.error(500).await;
    assert_eq!(error["code"], "state_not_saved");
    server.post("/generate", json!({"text": "a", "lora_path": "new"})).await.json(200).await;
    fs::remove_dir(&in_the_way).unwrap();
    // The next one brings it along, files included.
    server
        .post("/pin_lora_adapter", json!({"lora_name": "sql", "pinned": true}))
        .await
        .json(200)
        .await;
    drop(server);
    let pushed = kept(folder.path()).adapters["new"].pushed.clone().unwrap();
    assert_eq!(tree(&folder.path().join("adapters").join(pushed)).len(), 2);
}

#[tokio::test]
async fn what_is_wrong_is_said_of_a_part_that_was_sent() {
    let server = Server::new();
    let bad_file = |file: &str| AdapterError::BadFile {
        file: file.into(),
        reason: "cut off".into(),
    };
    let unsupported = AdapterError::Unsupported {
        key: "use_x".into(),
        reason: "no".into(),
    };
    for (error, param) in [
        (bad_file("adapter_model.safetensors"), "weights"),
        (bad_file("adapter_config.json"), "config"),
        (unsupported, "config"),
    ] {
        server.engine.fail_next_load(error);
        assert_eq!(push(&server, "x", files()).await.error(400).await["param"], param);
    }
    assert_eq!(push(&server, "sql?replace=false", files()).await.error(400).await["param"], "name");
    assert_eq!(push(&server, "sql?expected_version=00", files()).await.error(409).await["param"], "name");
}
