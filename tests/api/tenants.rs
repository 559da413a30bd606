//! Keys, roles and limits.
//!
//! | outcome | status |
//! | --- | --- |
//! | no key, a wrong key | 401 |
//! | an admin's route with a user's key; the base model where the key may not use it | 403 |
//! | an adapter that the key may not use | 404, and not listed |
//! | a limit reached | 429 + Retry-After and `x-ratelimit-*` |

use axum::http::Request;
use polylora::auth::{Auth, KeyEntry, Role};
use polylora_engine::mock::{Gate, Script, Step};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::common::{Answer, BASE, Server, tokens};

fn key(name: &str, role: Role) -> KeyEntry {
    KeyEntry {
        name: name.into(),
        sha256: Sha256::digest(format!("{name}-key")).iter().map(|byte| format!("{byte:02x}")).collect(),
        role,
        adapters: None,
        base_model: true,
        requests_per_minute: None,
        tokens_per_minute: None,
        concurrent_requests: None,
    }
}

fn server(keys: Vec<KeyEntry>) -> Server {
    Server::with(|engine| engine, |gateway| gateway.auth = Auth::new(None, None, keys))
}

async fn post(server: &Server, name: &str, path: &str, body: Value) -> Answer {
    let bearer = format!("Bearer {name}-key");
    server.post_raw(path, body.to_string(), &[("authorization", &bearer)]).await
}

async fn get(server: &Server, name: &str, path: &str) -> Answer {
    let request = Request::get(path).header("authorization", format!("Bearer {name}-key"));
    server.send(request.body(axum::body::Body::empty()).unwrap()).await
}

#[tokio::test]
async fn a_key_is_needed_except_by_probes() {
    let server = server(vec![key("ann", Role::User)]);
    for path in ["/v1/models", "/server_info", "/v1/nope"] {
        let mut answer = server.get(path).await;
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert_eq!(answer.error(401).await["code"], "invalid_api_key");
    }
    get(&server, "eve", "/v1/models").await.error(401).await;
    // A native route's refusals have its own form, whoever refuses.
    let refused = server.post("/generate", json!({"text": "a"})).await.json(401).await;
    assert_eq!((&refused["error"]["code"], &refused["error"]["retryable"]), (&json!(401), &json!(false)));
    get(&server, "ann", "/v1/models").await.json(200).await;
    for path in ["/health", "/metrics", "/ping", "/version"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn what_changes_the_server_is_for_admins() {
    let server = server(vec![key("ann", Role::User), key("root", Role::Admin)]);
    for (path, body) in [
        ("/load_lora_adapter", json!({"lora_name": "x", "lora_path": "/tmp"})),
        ("/unload_lora_adapter", json!({"lora_name": "sql"})),
        ("/v1/load_lora_adapter", json!({"lora_name": "x", "lora_path": "/tmp"})),
        ("/v1/unload_lora_adapter", json!({"lora_name": "sql"})),
        ("/v1/loras", json!({"lora_name": "x", "source": {"uri": "/tmp"}})),
        ("/flush_cache", json!({})),
        ("/abort_request", json!({"abort_all": true})),
    ] {
        let status = post(&server, "ann", path, body.clone()).await.status;
        assert_eq!(status, 403, "{path}");
        let status = post(&server, "root", path, body).await.status;
        assert!(status != 401 && status != 403, "{path}: {status}");
    }
}

#[tokio::test]
async fn adapters_of_others_do_not_exist() {
    let mut ann = key("ann", Role::User);
    ann.adapters = Some(vec!["sq*".into()]);
    ann.base_model = false;
    let server = server(vec![ann]);
    let complete = |model: &str| post(&server, "ann", "/v1/completions", json!({"model": model, "prompt": "a"}));
    complete("sql").await.json(200).await;
    for model in ["json", "demo:json"] {
        let error = complete(model).await.error(404).await;
        assert!(!error["message"].as_str().unwrap().contains("demo:1b:json"), "{error}");
    }
    assert_eq!(complete(BASE).await.error(403).await["code"], "insufficient_permissions");
    let body = post(&server, "ann", "/generate", json!({"text": "a", "lora_path": "json"}))
        .await
        .json(404)
        .await;
    assert!(!body["error"]["message"].as_str().unwrap().contains("sql, json"), "{body}");
    let list = get(&server, "ann", "/v1/models").await.json(200).await;
    assert!(list["data"].as_array().unwrap().iter().all(|card| card["id"] != "json"), "{list}");
    get(&server, "ann", "/v1/models/json").await.error(404).await;
}

#[tokio::test]
async fn an_unknown_name_is_answered_with_a_few_of_thousands() {
    let mut ann = key("ann", Role::User);
    ann.adapters = Some(vec!["n-*".into()]);
    let server = server(vec![ann, key("bob", Role::User)]);
    for index in 0..3000 {
        server.engine.add_adapter(&format!("{}-{index:04}", ["m", "n"][index % 2]));
    }
    let message = async |name: &'static str, path: &'static str, body: Value| {
        let body = post(&server, name, path, body).await.text().await;
        let body: Value = serde_json::from_str(&body).unwrap();
        body["error"]["message"].as_str().unwrap().to_owned()
    };
    let completion = |model: &str| json!({"model": model, "prompt": "a"});
    let of_bob = message("bob", "/v1/completions", completion("x")).await;
    assert!(
        of_bob.contains("json, ") && of_bob.contains("m-0000, ") && of_bob.contains("and more"),
        "{of_bob}"
    );
    let native = message("bob", "/generate", json!({"text": "a", "lora_path": "x"})).await;
    assert!(native.contains("m-0000, ") && native.ends_with("and more"), "{native}");
    let of_ann = message("ann", "/v1/completions", completion("x")).await;
    assert!(!of_ann.contains("m-") && of_ann.contains("and more"), "{of_ann}");
    let long = message("bob", "/v1/completions", completion(&"ü".repeat(100_000))).await;
    for message in [of_bob, native, of_ann, long] {
        assert!(message.len() < 2000, "{message}");
    }
}

#[tokio::test]
async fn requests_a_minute_are_limited_and_told() {
    let mut ann = key("ann", Role::User);
    ann.requests_per_minute = Some(2);
    let server = server(vec![ann, key("bob", Role::User)]);
    let complete = |name: &'static str| post(&server, name, "/v1/completions", json!({"model": BASE, "prompt": "a"}));
    let answer = complete("ann").await;
    assert_eq!(
        (
            answer.header("x-ratelimit-limit-requests"),
            answer.header("x-ratelimit-remaining-requests")
        ),
        (Some("2"), Some("1"))
    );
    complete("ann").await.json(200).await;
    let mut answer = complete("ann").await;
    assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(answer.header("x-ratelimit-remaining-requests"), Some("0"));
    let error = answer.error(429).await;
    assert_eq!((&error["code"], &error["type"]), (&json!("rate_limit_exceeded"), &json!("requests")));
    complete("bob").await.json(200).await;
}

#[tokio::test]
async fn concurrent_requests_are_counted_until_their_streams_end() {
    let mut ann = key("ann", Role::User);
    ann.concurrent_requests = Some(1);
    let server = server(vec![ann]);
    server.engine.script_next(Script::tokens(tokens("a")).then(Step::Wait(Gate::new())));
    let body = json!({"model": BASE, "prompt": "a", "stream": true});
    let answer = post(&server, "ann", "/v1/completions", body.clone()).await;
    assert_eq!(answer.status, 200);
    post(&server, "ann", "/v1/completions", body.clone()).await.error(429).await;
    drop(answer);
    assert_eq!(post(&server, "ann", "/v1/completions", body).await.status, 200);
}

#[tokio::test]
async fn tokens_a_minute_are_reserved_and_given_back() {
    let mut ann = key("ann", Role::User);
    ann.tokens_per_minute = Some(100);
    let server = server(vec![ann]);
    let complete = |max_tokens: u32| {
        let body = json!({"model": BASE, "prompt": [97], "max_tokens": max_tokens});
        post(&server, "ann", "/v1/completions", body)
    };
    // One prompt token and two output tokens are used; the rest comes back.
    for _ in 0..3 {
        complete(90).await.json(200).await;
    }
    let error = complete(99).await.error(429).await;
    assert_eq!(error["type"], "tokens");
    assert_eq!(complete(100).await.error(429).await["code"], "rate_limit_exceeded");
}

#[tokio::test]
async fn a_user_s_key_is_its_fairness() {
    let server = server(vec![key("ann", Role::User), key("root", Role::Admin)]);
    let body = json!({"model": BASE, "prompt": "a"}).to_string();
    for (bearer, expected) in [("Bearer ann-key", "ann"), ("Bearer root-key", "team-a")] {
        let headers = [("authorization", bearer), ("x-llm-d-inference-fairness-id", "team-a")];
        server.post_raw("/v1/completions", body.clone(), &headers).await.json(200).await;
        assert_eq!(&*server.engine.recorded().last().unwrap().fairness_key, expected);
    }
}

#[tokio::test]
async fn a_key_ends_its_own_requests_and_an_admin_any() {
    let server = server(vec![key("ann", Role::User), key("eve", Role::User), key("root", Role::Admin)]);
    for (who, aborted) in [("eve", 0), ("ann", 1), ("root", 1)] {
        server.engine.script_next(Script::tokens(tokens("a")).then(Step::Wait(Gate::new())));
        let body = json!({"text": "a", "rid": "r", "stream": true});
        let mut answer = post(&server, "ann", "/generate", body).await;
        assert_eq!(answer.json_event().await["text"], "a");
        let report = post(&server, who, "/abort_request", json!({"rid": "r"})).await.json(200).await;
        assert_eq!(report["aborted"], aborted, "{who}");
    }
}
