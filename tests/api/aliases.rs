//! Aliases over the mock engine: names that stand for adapters.
//!
//! | outcome | status |
//! | --- | --- |
//! | set, shown, deleted | 200 |
//! | a name or targets that can't be | 400, `alias_bad_name` or `alias_bad_target` |
//! | an adapter is loaded under an alias's name | 400, `adapter_bad_name` |
//! | no such alias | 404, `alias_not_found` |
//! | an adapter is unloaded that an alias points at | 409, `adapter_in_use` |

use std::collections::{BTreeMap, BTreeSet};

use axum::{body::Body, http::Request};
use polylora::auth::{Auth, KeyEntry, Role, sha256_hex};
use serde_json::{Value, json};

use crate::common::{Answer, Server, says};

async fn send(server: &Server, method: &str, path: &str, body: Option<Value>, headers: &[(&str, &str)]) -> Answer {
    let mut request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
    server.send(request.body(body).unwrap()).await
}

async fn put(server: &Server, name: &str, body: Value) -> Answer {
    send(server, "PUT", &format!("/v1/aliases/{name}"), Some(body), &[]).await
}

fn canary() -> Value {
    json!({"targets": [{"adapter": "sql", "weight": 90}, {"adapter": "json", "weight": 10}]})
}

/// Which adapter answers a completion.
async fn completed_by(server: &Server, model: &str, user: Option<&str>, headers: &[(&str, &str)]) -> String {
    let mut body = json!({"model": model, "prompt": "a"});
    if let Some(user) = user {
        body["user"] = json!(user);
    }
    let mut answer = server.post_raw("/v1/completions", body.to_string(), headers).await;
    let adapter = answer.header("x-polylora-adapter").map(str::to_owned);
    assert_eq!(answer.json(200).await["model"], model, "the name that was asked for comes back");
    adapter.expect("an adapter answered")
}

#[tokio::test]
async fn an_alias_is_set_used_changed_and_deleted() {
    let server = Server::new();
    let card = put(&server, "support", json!({"adapter": "sql"})).await.json(200).await;
    let target = json!({"adapter": "sql", "weight": 1.0, "share": 1.0, "requests_total": 0});
    assert_eq!(card, json!({"object": "alias", "name": "support", "targets": [target]}));
    for model in ["support", "demo:support", "demo:1b:support"] {
        assert_eq!(completed_by(&server, model, None, &[]).await, "sql");
    }
    let answer = server
        .post("/generate", json!({"text": "a", "lora_path": "support"}))
        .await
        .json(200)
        .await;
    assert_eq!(answer["meta_info"]["lora"], "sql");
    let chat = json!({"model": "support", "messages": [{"role": "user", "content": "a"}]});
    assert_eq!(server.post("/v1/chat/completions", chat).await.header("x-polylora-adapter"), Some("sql"));
    let card = send(&server, "GET", "/v1/aliases/support", None, &[]).await.json(200).await;
    assert_eq!(card["targets"][0]["requests_total"], 5);

    put(&server, "support", json!({"adapter": "json"})).await.json(200).await;
    assert_eq!(completed_by(&server, "support", None, &[]).await, "json");
    let list = server.get("/v1/aliases").await.json(200).await;
    assert_eq!((&list["data"][0]["name"], &list["data"][1]), (&json!("support"), &Value::Null));

    let deleted = send(&server, "DELETE", "/v1/aliases/support", None, &[]).await.json(200).await;
    assert_eq!(deleted, json!({"name": "support", "deleted": true}));
    for method in ["GET", "DELETE"] {
        let error = send(&server, method, "/v1/aliases/support", None, &[]).await.error(404).await;
        assert_eq!(error["code"], "alias_not_found");
    }
    let error = server
        .post("/v1/completions", json!({"model": "support", "prompt": "a"}))
        .await
        .error(404)
        .await;
    assert_eq!(error["code"], "model_not_found");
}

#[tokio::test]
async fn models_and_metrics_show_aliases() {
    let server = Server::new();
    put(&server, "support", canary()).await.json(200).await;
    completed_by(&server, "support", Some("ann"), &[]).await;
    let models = server.get("/v1/models").await.json(200).await;
    let card = models["data"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&card["id"], &card["root"], &card["parent"]),
        (&json!("support"), &json!("sql,json"), &json!("demo:1b"))
    );
    assert_eq!(card["alias"]["targets"][1]["share"], 0.1);
    assert_eq!(*card, server.get("/v1/models/demo:support").await.json(200).await);
    let error = server
        .post("/v1/completions", json!({"model": "x", "prompt": "a"}))
        .await
        .error(404)
        .await;
    assert!(error["message"].as_str().unwrap().contains("demo:1b:support"), "{error}");

    let metrics = server.get("/metrics").await.text().await;
    let value = |series: &str| -> f64 {
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(series))
            .unwrap_or_else(|| panic!("{series}"));
        line.trim().parse().unwrap()
    };
    assert_eq!(value("polylora_alias_share{alias=\"support\",adapter=\"sql\"}"), 0.9);
    let counts = ["sql", "json"].map(|adapter| value(&format!("polylora_alias_requests_total{{alias=\"support\",adapter=\"{adapter}\"}}")));
    assert_eq!(counts.iter().sum::<f64>(), 1.0);
}

#[tokio::test]
async fn a_user_gets_the_same_adapter_on_every_route_and_users_share_them_by_weight() {
    let server = Server::with(|engine| engine.reply(|_| says("x")), |_| {});
    put(&server, "support", canary()).await.json(200).await;
    let mut users: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for user in 0..200 {
        let user = format!("user-{user}");
        let adapter = completed_by(&server, "support", Some(&user), &[]).await;
        users.entry(adapter).or_default().insert(user);
    }
    // Binomial with n = 200 and p = 0.1; the names are fixed, so this does not vary.
    assert!((8..=34).contains(&users["json"].len()), "{}", users["json"].len());
    for (adapter, users) in &users {
        let user = users.first().unwrap();
        let input = json!([{"role": "user", "content": "a"}]);
        for (path, body) in [
            ("/v1/completions", json!({"model": "demo:support", "prompt": ["a", "b"], "user": user})),
            (
                "/v1/completions",
                json!({"model": "demo", "lora_path": "support", "prompt": "a", "user": user}),
            ),
            ("/v1/chat/completions", json!({"model": "support", "messages": input, "user": user})),
            (
                "/v1/chat/completions",
                json!({"model": "support", "messages": input, "safety_identifier": user}),
            ),
            ("/v1/responses", json!({"model": "support", "input": "a", "user": user})),
        ] {
            let mut answer = server.post(path, body.clone()).await;
            assert_eq!(answer.header("x-polylora-adapter"), Some(&**adapter), "{path} {body}");
            answer.json(200).await;
        }
    }
}

#[tokio::test]
async fn without_a_user_the_key_decides_and_without_a_key_each_request() {
    let key = |name: &str| KeyEntry {
        name: name.into(),
        sha256: sha256_hex(name),
        role: Role::Admin,
        adapters: None,
        base_model: true,
        requests_per_minute: None,
        tokens_per_minute: None,
        concurrent_requests: None,
    };
    let even = json!({"targets": [{"adapter": "sql"}, {"adapter": "json"}]});
    let keys: Vec<KeyEntry> = (0..20).map(|index| key(&format!("k{index}"))).collect();
    let server = Server::with(|engine| engine, |gateway| gateway.auth = Auth::new(None, None, keys));
    let bearer = |index: usize| format!("Bearer k{index}");
    let admin = bearer(0);
    send(&server, "PUT", "/v1/aliases/even", Some(even.clone()), &[("authorization", &admin)])
        .await
        .json(200)
        .await;
    let mut seen = BTreeSet::new();
    for index in 0..20 {
        let key = bearer(index);
        let first = completed_by(&server, "even", None, &[("authorization", &key)]).await;
        let body = json!({"text": ["a", "b"], "lora_path": "even"}).to_string();
        let answers = server.post_raw("/generate", body, &[("authorization", &key)]).await.json(200).await;
        assert_eq!(
            [&answers[0]["meta_info"]["lora"], &answers[1]["meta_info"]["lora"]],
            [&json!(first), &json!(first)]
        );
        seen.insert(first);
    }
    assert_eq!(seen.len(), 2);

    let open = Server::new();
    put(&open, "even", even).await.json(200).await;
    let prompts = vec!["a"; 40];
    let answers = open
        .post("/generate", json!({"text": prompts, "lora_path": "even", "rid": "r"}))
        .await
        .json(200)
        .await;
    let of_rid: Vec<Value> = answers
        .as_array()
        .unwrap()
        .iter()
        .map(|answer| answer["meta_info"]["lora"].clone())
        .collect();
    assert!(of_rid.contains(&json!("sql")) && of_rid.contains(&json!("json")));
    let again = open
        .post("/generate", json!({"text": "a", "lora_path": "even", "rid": "r_7"}))
        .await
        .json(200)
        .await;
    assert_eq!(again["meta_info"]["lora"], of_rid[7]);
}

#[tokio::test]
async fn what_can_t_be_is_a_named_400() {
    let server = Server::new();
    put(&server, "support", json!({"adapter": "sql"})).await.json(200).await;
    let one = json!({"adapter": "sql"});
    let weight = |weight: Value| json!({"targets": [{"adapter": "sql", "weight": weight}]});
    for (name, body, code, what) in [
        ("demo", one.clone(), json!("alias_bad_name"), "the base model's"),
        ("json", one.clone(), json!("alias_bad_name"), "an adapter's"),
        ("sql", json!({"adapter": "json"}), json!("alias_bad_name"), "an adapter's"),
        ("a%2Bb", one.clone(), json!("alias_bad_name"), "combine"),
        ("a:b", one, json!("alias_bad_name"), "contains ':'"),
        ("x", json!({"adapter": "nope"}), json!("alias_bad_target"), "no adapter 'nope'"),
        ("x", json!({"adapter": "x"}), json!("alias_bad_target"), "itself"),
        ("x", json!({"adapter": "support"}), json!("alias_bad_target"), "is an alias, too"),
        ("support", json!({"adapter": "support"}), json!("alias_bad_target"), "itself"),
        ("x", json!({"adapter": "demo:1b"}), json!("alias_bad_target"), "the base model"),
        ("x", weight(json!(0)), json!("alias_bad_target"), "got 0"),
        ("x", weight(json!(-3)), json!("alias_bad_target"), "got -3"),
        ("x", weight(json!(2e6)), json!("alias_bad_target"), "must be between"),
        ("x", json!({"targets": []}), json!("alias_bad_target"), "got 0"),
        ("x", weight(json!("much")), Value::Null, "targets[0].weight"),
        ("x", json!({}), Value::Null, "exactly one"),
        ("x", json!({"adapter": "sql", "targets": []}), Value::Null, "exactly one"),
    ] {
        let error = put(&server, name, body.clone()).await.error(400).await;
        assert_eq!(error["code"], code, "{name} {body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(what), "{name} {body}: {error}");
    }
    for path in ["/v1/aliases/%FF", "/v1/adapters/%FF"] {
        server.get(path).await.error(400).await;
    }
    let list = server.get("/v1/aliases").await.json(200).await;
    assert_eq!(list["data"].as_array().unwrap().len(), 1, "nothing was changed");
    assert_eq!(list["data"][0]["targets"][0]["adapter"], "sql");
    let error = server
        .post("/v1/completions", json!({"model": "demo:support*x", "prompt": "a"}))
        .await
        .error(400)
        .await;
    assert_eq!(error["param"], "model");
    let off = Server::with(|engine| engine.describe(|description| description.lora_enabled = false), |_| {});
    assert_eq!(
        put(&off, "x", json!({"adapter": "sql"})).await.error(400).await["code"],
        "adapter_not_enabled"
    );
}

#[tokio::test]
async fn an_adapter_behind_an_alias_stays_and_its_name_is_taken() {
    let server = Server::new();
    put(&server, "support", canary()).await.json(200).await;
    let native = server.post("/unload_lora_adapter", json!({"lora_name": "json"})).await.json(409).await;
    assert!(
        native["error_message"].as_str().unwrap().contains("the alias 'support' points at it"),
        "{native}"
    );
    let vllm = server.post("/v1/unload_lora_adapter", json!({"lora_name": "json"})).await.json(409).await;
    assert!(vllm["error"]["message"].as_str().unwrap().contains("'support'"));
    let dynamo = send(&server, "DELETE", "/v1/loras/json", None, &[]).await.error(409).await;
    assert_eq!(dynamo["code"], "adapter_in_use");
    let folder = env!("CARGO_MANIFEST_DIR");
    for replace in [false, true] {
        let load = json!({"lora_name": "support", "lora_path": folder, "replace": replace});
        let refused = server.post("/load_lora_adapter", load).await.json(400).await;
        assert!(refused["error_message"].as_str().unwrap().contains("is an alias's"), "{refused}");
    }
    // Another version of an adapter behind it is no other adapter.
    let load = json!({"lora_name": "json", "lora_path": folder, "replace": true});
    server.post("/load_lora_adapter", load).await.json(200).await;
    put(&server, "support", json!({"adapter": "sql"})).await.json(200).await;
    server.post("/unload_lora_adapter", json!({"lora_name": "json"})).await.json(200).await;
}

#[tokio::test]
async fn aliases_are_for_admins_and_a_key_needs_only_the_aliass_name() {
    let key = |name: &str, role, adapters: &[&str]| KeyEntry {
        name: name.into(),
        sha256: sha256_hex(name),
        role,
        adapters: Some(adapters.iter().map(|&name| name.to_owned()).collect()),
        base_model: true,
        requests_per_minute: None,
        tokens_per_minute: None,
        concurrent_requests: None,
    };
    let keys = vec![
        key("root", Role::Admin, &["*"]),
        key("ann", Role::User, &["support"]),
        key("bob", Role::User, &["sql"]),
    ];
    let server = Server::with(|engine| engine, |gateway| gateway.auth = Auth::new(None, None, keys));
    let root = [("authorization", "Bearer root")];
    let (ann, bob) = ([("authorization", "Bearer ann")], [("authorization", "Bearer bob")]);
    send(&server, "PUT", "/v1/aliases/support", Some(json!({"adapter": "sql"})), &root)
        .await
        .json(200)
        .await;
    for (method, path) in [
        ("GET", "/v1/aliases"),
        ("GET", "/v1/aliases/support"),
        ("PUT", "/v1/aliases/support"),
        ("DELETE", "/v1/aliases/support"),
    ] {
        let body = (method == "PUT").then(|| json!({"adapter": "sql"}));
        send(&server, method, path, body, &ann).await.error(403).await;
    }
    assert_eq!(completed_by(&server, "support", None, &ann).await, "sql");
    let ask = |model: &str| json!({"model": model, "prompt": "a"}).to_string();
    server.post_raw("/v1/completions", ask("sql"), &ann).await.error(404).await;
    server.post_raw("/v1/completions", ask("support"), &bob).await.error(404).await;
    let models = send(&server, "GET", "/v1/models", None, &bob).await.json(200).await;
    let ids: Vec<&Value> = models["data"].as_array().unwrap().iter().map(|card| &card["id"]).collect();
    assert_eq!(ids, ["demo:1b", "demo", "sql"]);
}
