//! Loading and unloading adapters over the mock engine, in SGLang's, vLLM's and Dynamo's forms.
//!
//! | outcome | SGLang | vLLM | Dynamo |
//! | --- | --- | --- | --- |
//! | done | 200 | 200, text | 200 |
//! | the adapter or the request is wrong | 400, the same shape | 400 | 400 |
//! | no such path, no such adapter | 400 | 404 | 404 |
//! | a fault of the server's own | 500 | 500 | 500 |

use polylora_engine::{
    AdapterError, InferenceEngine, RequestError, SubmitError,
    mock::{Gate, Script, Step},
};
use serde_json::{Value, json};

use crate::common::{BASE, Server, tokens};

/// A folder that exists: the mock doesn't look into it.
fn folder() -> String {
    env!("CARGO_MANIFEST_DIR").to_owned()
}

#[tokio::test]
async fn load_use_unload() {
    let server = Server::new();
    let body = server
        .post("/load_lora_adapter", json!({"lora_name": "new", "lora_path": folder()}))
        .await
        .json(200)
        .await;
    let mut loaded = json!({"sql": "mock:sql", "json": "mock:json"});
    loaded["new"] = json!(folder());
    assert_eq!(
        body,
        json!({"rid": null, "success": true, "error_message": "", "loaded_adapters": loaded})
    );
    let generated = server.post("/generate", json!({"text": "a", "lora_path": "new"})).await.json(200).await;
    assert_eq!(generated["meta_info"]["lora"], "new");
    let body = server.post("/unload_lora_adapter", json!({"lora_name": "new"})).await.json(200).await;
    assert_eq!(body["success"], true);
    assert_eq!(body["loaded_adapters"], json!({"sql": "mock:sql", "json": "mock:json"}));
    let error = server.post("/generate", json!({"text": "a", "lora_path": "new"})).await.json(404).await;
    assert_eq!(error["error"]["code"], 404);
    assert!(error["error"]["message"].as_str().unwrap().contains("never been loaded"));
}

#[tokio::test]
async fn every_failure_has_the_words_that_clients_match_on() {
    let server = Server::new();
    let incompatible = AdapterError::Incompatible {
        reason: "lora_rank 64, at most 16 here".into(),
    };
    let starvation = AdapterError::TooManyPinned {
        name: "x".into(),
        pinned: 7,
        limit: 7,
    };
    for (path, body, error, what) in [
        (
            "/load_lora_adapter",
            json!({"lora_name": "sql", "lora_path": folder()}),
            None,
            "already loaded",
        ),
        (
            "/load_lora_adapter",
            json!({"lora_name": "x", "lora_path": folder()}),
            Some(incompatible),
            "incompatible",
        ),
        (
            "/load_lora_adapter",
            json!({"lora_name": "x", "lora_path": folder(), "pinned": true}),
            Some(starvation),
            "starvation",
        ),
        (
            "/load_lora_adapter",
            json!({"lora_name": "x", "lora_path": "/no/such/folder"}),
            None,
            "/no/such/folder",
        ),
        (
            "/load_lora_adapter",
            json!({"lora_name": BASE, "lora_path": folder()}),
            None,
            "base model",
        ),
        ("/unload_lora_adapter", json!({"lora_name": "x"}), None, "never been loaded"),
    ] {
        error.into_iter().for_each(|error| server.engine.fail_next_load(error));
        let answer = server.post(path, body.clone()).await.json(400).await;
        assert_eq!(answer["success"], false, "{body}");
        assert!(answer["error_message"].as_str().unwrap().contains(what), "{body}: {answer}");
        assert_eq!(answer["loaded_adapters"].as_object().unwrap().len(), 2, "nothing half registered");
    }
    let off = Server::with(|engine| engine.describe(|description| description.lora_enabled = false), |_| {});
    for path in ["/load_lora_adapter", "/unload_lora_adapter"] {
        let body = if path.starts_with("/load") {
            json!({"lora_name": "x", "lora_path": "y"})
        } else {
            json!({"lora_name": "x"})
        };
        let answer = off.post(path, body).await.json(400).await;
        assert!(answer["error_message"].as_str().unwrap().contains("not enabled"));
    }
}

#[tokio::test]
async fn a_bad_body_names_the_field() {
    let server = Server::new();
    for (body, param) in [
        (json!({"lora_path": "x"}), "lora_name"),
        (json!({"lora_name": "x", "lora_path": "y", "pined": true}), "pined"),
        (json!({"lora_name": 3, "lora_path": "y"}), "lora_name"),
    ] {
        let error = server.post("/load_lora_adapter", body).await.json(400).await;
        assert_eq!(error["error"]["param"], param);
    }
}

#[tokio::test]
async fn a_load_does_not_hold_up_others() {
    let server = Server::new();
    let gate = Gate::new();
    server.engine.hold_loads(&gate);
    let body = json!({"lora_name": "slow", "lora_path": folder()});
    let (mut load, generated) = tokio::join!(
        async {
            let load = server.post("/load_lora_adapter", body).await;
            (load, ())
        },
        async {
            let generated = server.post("/generate", json!({"text": "a"})).await.json(200).await;
            gate.open();
            generated
        }
    );
    assert_eq!(generated["text"], "Hello");
    assert_eq!(load.0.json(200).await["success"], true);
}

#[tokio::test]
async fn an_unloaded_adapter_finishes_what_it_began() {
    let server = Server::new();
    let gate = Gate::new();
    server
        .engine
        .script_next(Script::tokens(tokens("a")).then(Step::Wait(gate.clone())).then_tokens(tokens("b")));
    let mut answer = server.post("/generate", json!({"text": "a", "lora_path": "sql", "stream": true})).await;
    assert_eq!(answer.json_event().await["text"], "a");
    let unload = async { server.post("/unload_lora_adapter", json!({"lora_name": "sql"})).await.json(200).await };
    let meanwhile = async {
        while server.engine.adapter_info("sql").is_some() {
            tokio::task::yield_now().await;
        }
        server.post("/generate", json!({"text": "a", "lora_path": "sql"})).await.json(404).await;
        gate.open();
        answer.json_events().await
    };
    let (_, events) = tokio::join!(unload, meanwhile);
    let last = events.last().unwrap();
    assert_eq!((&last["text"], &last["meta_info"]["lora"]), (&json!("ab"), &json!("sql")));
}

#[tokio::test]
async fn every_end_of_an_answer_gives_its_lease_back() {
    let server = Server::new();
    let held = || server.engine.leases("sql") + server.engine.leases("json");
    let generate = |params: Value| {
        let body = json!({"text": "a", "lora_path": "sql", "sampling_params": params});
        server.post("/generate", body)
    };
    let chat = |extra: Value| {
        let mut body = json!({"model": "sql", "messages": [{"role": "user", "content": "x"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.post("/v1/chat/completions", body)
    };
    generate(json!({})).await.json(200).await;
    assert_eq!(held(), 0, "finished");

    server.engine.script_next(Script::tokens(tokens("abc")).then(Step::Wait(Gate::new())));
    generate(json!({"stop": ["c"]})).await.json(200).await;
    assert_eq!(held(), 0, "a stop string, before the engine has ended");

    generate(json!({"max_new_tokens": 1 << 30})).await.json(400).await;
    generate(json!({"top_p": 9})).await.json(400).await;
    chat(json!({"n": 10_000})).await.json(400).await;
    server
        .post("/generate", json!({"text": ["a", "b"], "lora_path": ["sql", "nobody"]}))
        .await
        .json(404)
        .await;
    assert_eq!(held(), 0, "refused after the adapter was found");

    server.engine.fail_next_submit(SubmitError::QueueFull { waiting: 1, limit: 1 });
    generate(json!({})).await.json(503).await;
    server.engine.fail_after_submits(2, SubmitError::QueueFull { waiting: 1, limit: 1 });
    chat(json!({"n": 4})).await.json(503).await;
    assert_eq!(held(), 0, "the queue was full for the first, or for the third of four");

    chat(json!({"n": 3})).await.json(200).await;
    let batch = json!({"text": ["a", "b", "c"], "lora_path": ["sql", "json", null]});
    server.post("/generate", batch).await.json(200).await;
    assert_eq!(held(), 0, "several outputs, several adapters");

    server
        .engine
        .script_next(Script::tokens(tokens("a")).then(Step::Fail(RequestError::Engine("it broke".into()))));
    chat(json!({})).await.json(500).await;
    server
        .engine
        .script_next(Script::tokens(tokens("a")).then(Step::Fail(RequestError::NotFinite)));
    let mut broken = chat(json!({"stream": true})).await;
    broken.events().await;
    assert_eq!(held(), 0, "the engine failed, before and after the answer began");

    server.engine.script_next(Script::tokens(tokens("a")).then(Step::Wait(Gate::new())));
    let mut streamed = chat(json!({"stream": true})).await;
    streamed.event().await;
    assert_eq!(held(), 1);
    drop(streamed);
    assert_eq!(held(), 0, "the client has gone");

    server.engine.script_next(Script::tokens(tokens("a")).then(Step::Wait(Gate::new())));
    let body = json!({"text": "a", "lora_path": "sql", "stream": true, "rid": "r"});
    let mut aborted = server.post("/generate", body).await;
    aborted.event().await;
    server.post("/abort_request", json!({"rid": "r"})).await.json(200).await;
    aborted.events().await;
    assert_eq!(held(), 0, "aborted");
}

#[tokio::test]
async fn vllm_s_form() {
    let server = Server::new();
    let load = |body: Value| server.post("/v1/load_lora_adapter", body);
    let mut answer = load(json!({"lora_name": "new", "lora_path": folder()})).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.text().await, "Success: LoRA adapter 'new' added successfully.");
    let error = load(json!({"lora_name": "new", "lora_path": folder()})).await.json(400).await["error"].take();
    assert_eq!(error["type"], "InvalidUserInput");
    let message = "The lora adapter 'new' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True.";
    assert_eq!(error["message"], message);
    assert_eq!(
        load(json!({"lora_name": "new", "lora_path": folder(), "load_inplace": true}))
            .await
            .status,
        200
    );
    let error = load(json!({"lora_name": "", "lora_path": "x"})).await.json(400).await["error"].take();
    assert_eq!(error["message"], "Both 'lora_name' and 'lora_path' must be provided.");
    let error = load(json!({"lora_name": "x", "lora_path": "/no/such"})).await.json(404).await["error"].take();
    assert_eq!(error["type"], "NotFoundError");

    let unload = |body: Value| server.post("/v1/unload_lora_adapter", body);
    let mut answer = unload(json!({"lora_name": "new", "lora_int_id": null})).await;
    assert_eq!(answer.text().await, "Success: LoRA adapter 'new' removed successfully.");
    let error = unload(json!({"lora_name": "new"})).await.json(404).await["error"].take();
    assert_eq!(
        (&error["type"], &error["message"]),
        (&json!("NotFoundError"), &json!("The lora adapter 'new' cannot be found."))
    );
    let error = unload(json!({})).await.json(400).await["error"].take();
    assert_eq!(error["message"], "'lora_name' needs to be provided to unload a LoRA adapter.");
}

#[tokio::test]
async fn dynamo_s_form() {
    let server = Server::new();
    let body = json!({"lora_name": "new", "source": {"uri": format!("file://{}", folder())}});
    let loaded = server.post("/v1/loras", body).await.json(200).await;
    assert_eq!((&loaded["status"], &loaded["lora_name"]), (&json!("success"), &json!("new")));
    let list = server.get("/v1/loras").await.json(200).await;
    assert_eq!((&list["count"], &list["loras"]["new"]), (&json!(3), &loaded["lora_id"]));
    let delete = |name: &str| {
        let request = axum::http::Request::delete(format!("/v1/loras/{name}"));
        server.send(request.body(axum::body::Body::empty()).unwrap())
    };
    assert_eq!(delete("new").await.json(200).await["lora_id"], loaded["lora_id"]);
    assert_eq!(delete("new").await.error(404).await["code"], "model_not_found");
}

#[tokio::test]
async fn models_list_what_a_request_may_name() {
    let server = Server::new();
    server.post("/generate", json!({"text": "a", "lora_path": "sql"})).await.json(200).await;
    let body = server.get("/v1/models").await.json(200).await;
    assert_eq!(body["object"], "list");
    let cards = body["data"].as_array().unwrap();
    let ids: Vec<&Value> = cards.iter().map(|card| &card["id"]).collect();
    assert_eq!(ids, [BASE, "demo", "json", "sql"], "base model first, then adapters, last used last");
    assert_eq!(
        (&cards[0]["parent"], &cards[0]["root"], &cards[0]["max_model_len"]),
        (&Value::Null, &json!("mock"), &json!(512))
    );
    assert_eq!((&cards[3]["parent"], &cards[3]["root"]), (&json!(BASE), &json!("mock:sql")));
    assert_eq!(
        (&cards[3]["adapter"]["state"], &cards[3]["adapter"]["requests_total"]),
        (&json!("host"), &json!(1))
    );
    for id in [BASE, "sql", "demo:sql", "demo:1b:json"] {
        let card = server.get(&format!("/v1/models/{id}")).await.json(200).await;
        assert!(id.ends_with(card["id"].as_str().unwrap()), "{id}: {card}");
        let mut answer = server.post("/v1/completions", json!({"model": card["id"], "prompt": "a"})).await;
        answer.json(200).await;
    }
    assert_eq!(server.get("/v1/models/nope").await.error(404).await["code"], "model_not_found");
    assert_eq!(server.get("/v1/models/a%2Fb").await.error(404).await["code"], "model_not_found");
}

#[tokio::test]
async fn an_unload_waits_as_long_as_it_is_told_or_aborts() {
    let server = Server::new();
    let gate = Gate::new();
    let held = || Script::tokens(tokens("a")).then(Step::Wait(gate.clone())).then_tokens(tokens("b"));
    let delete = |target: &str| {
        let request = axum::http::Request::delete(format!("/v1/adapters/{target}"));
        server.send(request.body(axum::body::Body::empty()).unwrap())
    };
    let begin = async |adapter: &str| {
        server.engine.script_next(held());
        let mut answer = server.post("/generate", json!({"text": "a", "lora_path": adapter, "stream": true})).await;
        assert_eq!(answer.json_event().await["text"], "a");
        answer
    };
    // The time is up at once: the name is gone, the request goes on.
    let mut running = begin("sql").await;
    let report = delete("sql?timeout_seconds=0").await.json(200).await;
    assert_eq!(
        (&report["waited_for"], &report["still_running"], &report["aborted"]),
        (&json!(1), &json!(1), &json!(false))
    );
    assert_eq!(delete("sql").await.error(404).await["code"], "model_not_found");
    // Aborted: it ends without the rest.
    let mut aborted = begin("json").await;
    let report = delete("json?force=true").await.json(200).await;
    assert_eq!(
        (&report["waited_for"], &report["still_running"], &report["aborted"]),
        (&json!(1), &json!(0), &json!(true))
    );
    let last = aborted.json_events().await.pop().unwrap();
    assert_eq!(
        (&last["text"], &last["meta_info"]["finish_reason"]),
        (&json!("a"), &json!({"type": "abort", "message": "The adapter was unloaded."}))
    );
    // OpenAI's routes have no word for it: an error says whose doing it was.
    server
        .post("/load_lora_adapter", json!({"lora_name": "y", "lora_path": folder()}))
        .await
        .json(200)
        .await;
    server.engine.script_next(held());
    let before = server.engine.recorded().len();
    let (mut answer, ()) = tokio::join!(server.post("/v1/completions", json!({"model": "y", "prompt": "a"})), async {
        while server.engine.recorded().len() == before {
            tokio::task::yield_now().await;
        }
        delete("y?force=true").await.json(200).await;
    });
    assert_eq!(answer.error(503).await["code"], "adapter_unloaded");
    gate.open();
    assert_eq!(running.json_events().await.last().unwrap()["text"], "ab");
    for model in ["sql", "demo:json"] {
        server
            .post("/v1/completions", json!({"model": model, "prompt": "a"}))
            .await
            .error(404)
            .await;
    }
    // Natively the same.
    server
        .post("/load_lora_adapter", json!({"lora_name": "x", "lora_path": folder()}))
        .await
        .json(200)
        .await;
    let body = json!({"lora_name": "x", "force": true, "timeout_seconds": 5});
    let answer = server.post("/unload_lora_adapter", body).await.json(200).await;
    assert_eq!((&answer["report"]["name"], &answer["report"]["waited_for"]), (&json!("x"), &json!(0)));
    for bad in ["-1", "soon"] {
        delete(&format!("x?timeout_seconds={bad}")).await.error(400).await;
    }
}

/// Until a load has come so far that requests are told of it.
async fn until_loading(server: &Server, name: &str) {
    while server.get(&format!("/v1/models/{name}")).await.status == 404 {
        tokio::task::yield_now().await;
    }
}

/// Whoever looks at waiting times and at first tokens wants to see what an adapter's absence costs.
#[tokio::test]
async fn waiting_for_an_adapter_is_time_until_the_first_token() {
    let server = Server::new();
    let gate = Gate::new();
    server.engine.hold_acquisitions(&gate);
    let (mut answer, waited) = tokio::join!(server.post("/generate", json!({"text": "a", "lora_path": "sql"})), async {
        while gate.num_held() == 0 {
            tokio::task::yield_now().await;
        }
        let since = std::time::Instant::now();
        for _ in 0..20 {
            server.post("/generate", json!({"text": "a"})).await.json(200).await;
        }
        let waited = since.elapsed().as_secs_f64();
        gate.open();
        waited
    });
    answer.json(200).await;
    let text = server.get("/metrics").await.text().await;
    for metric in [
        "polylora_adapter_waiting_seconds_total",
        "polylora_adapter_time_to_first_token_seconds_sum",
    ] {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(metric)?.strip_prefix("{adapter=\"sql\"} "));
        let seconds: f64 = line.unwrap_or_else(|| panic!("no {metric}")).parse().unwrap();
        assert!(seconds >= waited, "{metric} is {seconds}, it waited for {waited} s");
    }
}

#[tokio::test]
async fn an_adapter_that_is_being_loaded_is_a_503_that_says_so_and_no_404() {
    let server = Server::new();
    let gate = Gate::new();
    server.engine.hold_loads(&gate);
    let router = server.router.clone();
    let body = json!({"lora_name": "new", "lora_path": folder()}).to_string();
    let request = axum::http::Request::post("/load_lora_adapter").header("content-type", "application/json");
    let load = tokio::spawn(tower::ServiceExt::oneshot(router, request.body(axum::body::Body::from(body)).unwrap()));
    until_loading(&server, "new").await;

    let chat = |model: &str| json!({"model": model, "messages": [{"role": "user", "content": "a"}]});
    let requests = |model: &str| {
        [
            ("/v1/chat/completions", chat(model)),
            (
                "/v1/chat/completions",
                json!({"model": BASE, "lora_path": model, "messages": [{"role": "user", "content": "a"}]}),
            ),
            ("/v1/completions", json!({"model": model, "prompt": "a"})),
            ("/v1/responses", json!({"model": model, "input": "a"})),
            ("/tokenize", json!({"model": model, "prompt": "a"})),
            ("/detokenize", json!({"model": model, "tokens": [97]})),
        ]
    };
    let seen = server.get("/v1/adapters/new").await.json(200).await;
    assert_eq!((&seen["state"], &seen["source"]), (&json!("loading"), &json!(folder())), "{seen}");
    let states = async || {
        let list = server.get("/v1/adapters").await.json(200).await;
        let states = list["data"].as_array().unwrap().iter().filter(|entry| entry["name"] == "new");
        states.map(|entry| entry["state"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(states().await, ["loading"]);
    server.get("/v1/adapters/other").await.error(404).await;
    for model in ["new", "new*0.5", "sql+new"] {
        for (path, body) in requests(model) {
            let mut answer = server.post(path, body).await;
            assert_eq!(answer.header("retry-after"), Some("1"), "{path} {model}");
            let error = answer.error(503).await;
            assert_eq!(
                (&error["code"], &error["type"]),
                (&json!("adapter_loading"), &json!("server_error")),
                "{path} {model}"
            );
        }
    }
    let mut answer = server.post("/generate", json!({"text": ["a", "b"], "lora_path": ["sql", "new"]})).await;
    assert_eq!(answer.header("retry-after"), Some("1"));
    let error = answer.json(503).await["error"].take();
    assert_eq!((&error["param"], &error["retryable"]), (&json!("lora_path"), &json!(true)));
    let alias = axum::http::Request::put("/v1/aliases/soon").header("content-type", "application/json");
    let alias = alias.body(axum::body::Body::from(r#"{"adapter": "new"}"#)).unwrap();
    assert_eq!(server.send(alias).await.error(503).await["param"], "targets");
    // What is served goes on, and a name that nobody loads stays unknown, beside one that is being loaded, too.
    server
        .post("/v1/completions", json!({"model": "sql", "prompt": "a"}))
        .await
        .json(200)
        .await;
    for model in ["other", "new+other"] {
        server
            .post("/v1/completions", json!({"model": model, "prompt": "a"}))
            .await
            .error(404)
            .await;
    }
    gate.open();
    assert_eq!(load.await.unwrap().unwrap().status(), 200);
    assert_eq!(states().await, ["host"], "it is there once");
    assert_eq!(server.get("/v1/adapters/new").await.json(200).await["state"], "host");
    server
        .post("/v1/completions", json!({"model": "new", "prompt": "a"}))
        .await
        .json(200)
        .await;
}

#[tokio::test]
async fn a_load_that_fails_leaves_its_name_unknown() {
    let server = Server::new();
    server.engine.fail_next_load(AdapterError::Incompatible { reason: "no".into() });
    server
        .post("/load_lora_adapter", json!({"lora_name": "new", "lora_path": folder()}))
        .await
        .json(400)
        .await;
    server
        .post("/v1/completions", json!({"model": "new", "prompt": "a"}))
        .await
        .error(404)
        .await;
}

#[tokio::test]
async fn a_hub_that_can_t_be_reached_is_not_the_client_s_fault() {
    // Nobody listens there, and nobody gets it who asks for any free port.
    let port = 1;
    let cache = tempfile::tempdir().unwrap();
    let hub = polylora::hub::Hub::new(polylora::hub::HubConfig {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        cache_dir: cache.path().to_owned(),
        token: None,
        offline: false,
        progress: false,
    });
    let sources = polylora::auth::AdapterSources::new(hub, polylora::auth::SourcePolicy::Any);
    let server = Server::with(|engine| engine, |gateway| gateway.sources = std::sync::Arc::new(sources));
    let body = json!({"lora_name": "x", "lora_path": "org/adapter"});
    let answer = server.post("/load_lora_adapter", body.clone()).await.json(502).await;
    assert!(
        answer["error_message"].as_str().unwrap().contains("org/adapter from http://127.0.0.1:"),
        "{answer}"
    );
    let error = server.post("/v1/load_lora_adapter", body).await.error(502).await;
    assert_eq!(error["type"], "InternalServerError");
    let body = json!({"lora_name": "x", "source": {"uri": "org/adapter"}});
    let error = server.post("/v1/loras", body).await.error(502).await;
    assert_eq!((&error["code"], &error["param"]), (&json!("hub_unreachable"), &json!("source.uri")));
}

#[tokio::test]
async fn vllm_s_errors_have_the_status_as_a_number_and_say_when_to_try_again() {
    let server = Server::new();
    let load = json!({"lora_name": "x", "lora_path": folder()});
    let full = || AdapterError::NothingToEvict { loaded: 2, limit: 2 };
    server.engine.fail_next_load(full());
    let mut answer = server.post("/v1/load_lora_adapter", load.clone()).await;
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!(answer.error(503).await["code"], 503);
    server.engine.fail_next_load(full());
    let mut answer = server.post("/load_lora_adapter", load).await;
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!(answer.json(503).await["success"], false);
    let error = server.post("/v1/unload_lora_adapter", json!({"lora_name": "x"})).await.error(404).await;
    assert_eq!((&error["code"], &error["type"]), (&json!(404), &json!("NotFoundError")));
}
