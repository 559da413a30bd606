//! What holds for every route, and what a server tells about itself.
//!
//! | outcome | status |
//! | --- | --- |
//! | no such route / method | 404 / 405 |
//! | no JSON / wrong content type / too large | 400 / 415 / 413 |
//! | a handler panics | 500 for that request alone |
//! | the engine is not healthy | 503 |

use std::sync::Arc;

use polylora::app::Limits;
use polylora_engine::{InferenceEngine, SubmitError};
use serde_json::json;

use crate::common::{Answer, BASE, Server, says};

#[tokio::test]
async fn unknown_routes_and_methods_have_openai_s_error() {
    let server = Server::new();
    assert_eq!(server.get("/v1/nope").await.error(404).await["code"], "unknown_url");
    assert_eq!(server.get("/v1/chat/completions").await.error(405).await["code"], "method_not_allowed");
    assert_eq!(server.post("/v1/models", json!({})).await.error(405).await["code"], "method_not_allowed");
}

#[tokio::test]
async fn bodies_that_are_no_json_are_refused() {
    let limits = |gateway: &mut polylora::app::Gateway| {
        gateway.limits = Limits {
            max_body_bytes: 1000,
            ..Limits::default()
        };
    };
    let server = Server::with(|engine| engine, limits);
    for path in ["/v1/chat/completions", "/v1/completions"] {
        server.post_raw(path, "{", &[]).await.error(400).await;
        server.post_raw(path, "", &[]).await.error(400).await;
        server.post_raw(path, vec![0xff, 0xfe], &[]).await.error(400).await;
        server.post_raw(path, " ".repeat(2000), &[]).await.error(413).await;
        let request = axum::http::Request::post(path)
            .header("content-type", "text/plain")
            .body("{}".into())
            .unwrap();
        server.send(request).await.error(415).await;
    }
    let error = server.post_raw("/generate", "{", &[]).await.json(400).await;
    assert_eq!(error["error"]["code"], 400);
}

#[tokio::test]
async fn a_panic_is_a_500_for_that_request_alone() {
    let server = Server::with(
        |engine| engine.reply(|request| if request.sampling.seed == 13 { panic!("a bug") } else { says("fine") }),
        |_| {},
    );
    let body = |seed: u64| json!({"model": BASE, "prompt": "a", "seed": seed});
    assert_eq!(server.post("/v1/completions", body(13)).await.error(500).await["code"], "internal_error");
    assert_eq!(
        server.post("/v1/completions", body(1)).await.json(200).await["choices"][0]["text"],
        "fine"
    );
}

#[tokio::test]
async fn request_ids_come_back() {
    let server = Server::new();
    let answer = server.post_raw("/generate", "{}", &[("x-request-id", "abc")]).await;
    assert_eq!(answer.header("x-request-id"), Some("abc"));
    let made = server.get("/health").await.header("x-request-id").unwrap().to_owned();
    assert_eq!(made.len(), 36, "{made}");
    let answer = server.post_raw("/generate", "{}", &[("x-request-id", &"x".repeat(300))]).await;
    assert_eq!(answer.header("x-request-id").unwrap().len(), 36, "replaced");
}

#[tokio::test]
async fn probes_tell_health() {
    let server = Server::new();
    for path in ["/health", "/health_generate", "/ping"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let recorded = server.engine.recorded().remove(0);
    assert_eq!((recorded.sampling.max_tokens, recorded.adapter), (1, None));
    server.engine.fail_next_submit(SubmitError::QueueFull { waiting: 1, limit: 1 });
    assert_eq!(server.get("/health_generate").await.status, 200, "busy is alive");
    server.engine.set_healthy(false);
    for path in ["/health", "/health_generate"] {
        server.get(path).await.json(503).await;
    }
    let mut answer = server.post("/v1/completions", json!({"model": BASE, "prompt": "a"})).await;
    assert_eq!(answer.error(503).await["code"], "unhealthy");
}

#[tokio::test]
async fn routers_find_what_they_ask_for() {
    let server = Server::new();
    assert_eq!(
        server.get("/version").await.json(200).await,
        json!({"version": env!("CARGO_PKG_VERSION")})
    );
    assert_eq!(server.get("/load").await.json(200).await, json!({"server_load": 0}));
    for path in ["/model_info", "/get_model_info"] {
        let info = server.get(path).await.json(200).await;
        assert_eq!((&info["model_path"], &info["is_generation"]), (&json!("mock"), &json!(true)));
    }
    for path in ["/server_info", "/get_server_info"] {
        let info = server.get(path).await.json(200).await;
        assert_eq!(
            (&info["served_model_name"], &info["context_length"], &info["num_loaded_loras"]),
            (&json!(BASE), &json!(512), &json!(2))
        );
        assert_eq!(info["internal_states"][0]["healthy"], true);
    }
    let loads = server.get("/v1/loads?include=core").await.json(200).await;
    assert_eq!(
        (&loads["loads"][0]["num_total_reqs"], &loads["aggregate"]["total_tokens"]),
        (&json!(0), &json!(0))
    );
    let lora = json!({"slots_used": 0, "slots_total": 8, "utilization": 0.0});
    assert_eq!((&loads["loads"][0]["lora"], &loads["loads"][0]["gen_throughput"]), (&lora, &json!(0.0)));
    let mut metrics = server.get("/metrics").await;
    assert!(metrics.text().await.contains("vllm:num_requests_waiting"));
    assert_eq!(server.post("/flush_cache", json!({})).await.status, 200);
    assert_eq!(server.get("/flush_cache").await.status, 200);
}

#[tokio::test]
async fn what_was_served_is_counted() {
    let server = Server::new();
    server
        .post("/v1/completions", json!({"model": "sql", "prompt": "a"}))
        .await
        .json(200)
        .await;
    server
        .post("/v1/completions", json!({"model": "nope", "prompt": "a"}))
        .await
        .error(404)
        .await;
    // An error after the model is known, the base model, and several adapters in one request.
    for (path, body, status) in [
        ("/v1/completions", json!({"model": "json", "prompt": "a", "n": 0}), 400),
        ("/v1/completions", json!({"model": BASE, "prompt": "a"}), 200),
        ("/generate", json!({"text": ["a", "b"], "lora_path": ["sql", null]}), 200),
        ("/generate", json!({"text": ["a", "b"], "lora_path": "sql"}), 200),
    ] {
        assert_eq!(server.post(path, body).await.status, status);
    }
    let metrics = server.get("/metrics").await.text().await;
    let line = |start: &str, has: &[&str]| {
        metrics
            .lines()
            .find(|line| line.starts_with(start) && has.iter().all(|part| line.contains(part)))
            .unwrap_or_else(|| panic!("{start} {has:?} in\n{metrics}"))
            .rsplit_once(' ')
            .unwrap()
            .1
            .to_owned()
    };
    for (route, model, adapter, status) in [
        ("/v1/completions", "", "", "404"),
        ("/v1/completions", BASE, "sql", "200"),
        ("/v1/completions", BASE, "json", "400"),
        ("/v1/completions", BASE, "(base)", "200"),
        ("/generate", BASE, "(several)", "200"),
        ("/generate", BASE, "sql", "200"),
    ] {
        let series = format!("{{route=\"{route}\",model=\"{model}\",adapter=\"{adapter}\",status=\"{status}\"}}");
        assert_eq!(line("polylora_http_requests_total", &[&series]), "1");
    }
}

#[tokio::test]
async fn a_stopping_server_says_so() {
    let server = Server::new();
    let engine: Arc<dyn InferenceEngine> = server.engine.clone();
    engine.shutdown(std::time::Duration::ZERO).await;
    let mut answer = server.post("/v1/completions", json!({"model": BASE, "prompt": "a"})).await;
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!(answer.error(503).await["code"], "shutting_down");
}

async fn ask(server: &Server) -> Answer {
    let request = axum::http::Request::get("/health").header("origin", "https://a.example");
    server.send(request.body(axum::body::Body::empty()).unwrap()).await
}

#[tokio::test]
async fn browsers_are_answered_only_where_configured() {
    assert_eq!(ask(&Server::new()).await.header("access-control-allow-origin"), None);
    let open = Server::with(|engine| engine, |gateway| gateway.cors_origins = vec!["https://a.example".into()]);
    let answer = ask(&open).await;
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://a.example"));
    let exposed = answer.header("access-control-expose-headers").unwrap();
    for name in ["x-request-id", "x-polylora-adapter", "retry-after", "x-ratelimit-remaining-tokens"] {
        assert!(exposed.split(',').any(|other| other == name), "{name}: {exposed}");
    }
    let closed = Server::with(|engine| engine, |gateway| gateway.cors_origins = vec!["https://b.example".into()]);
    assert_eq!(ask(&closed).await.header("access-control-allow-origin"), None);
}

#[tokio::test]
async fn gateways_in_front_say_for_whom_they_ask() {
    let server = Server::new();
    let body = json!({"model": BASE, "prompt": "a"}).to_string();
    for header in ["x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"] {
        server
            .post_raw("/v1/completions", body.clone(), &[(header, "team-a")])
            .await
            .json(200)
            .await;
        assert_eq!(&*server.engine.recorded().last().unwrap().fairness_key, "team-a");
    }
}

#[tokio::test]
async fn a_name_that_is_no_utf_8_is_an_error_of_the_api_s_form() {
    let server = Server::new();
    for path in ["/v1/models/%ff", "/v1/models/a/%ff"] {
        server.get(path).await.error(400).await;
    }
    let delete = |name: &str| {
        let request = axum::http::Request::delete(format!("/v1/loras/{name}"));
        server.send(request.body(axum::body::Body::empty()).unwrap())
    };
    delete("%ff").await.error(400).await;
    assert_eq!(delete("nobody").await.error(404).await["param"], "name");
}

#[tokio::test]
async fn a_body_that_drips_is_not_waited_for_longer_than_one_that_stops() {
    let limit = std::time::Duration::from_millis(200);
    let server = Server::with(|engine| engine, |gateway| gateway.limits.body_timeout = limit);
    for (path, drips) in [("/v1/completions", true), ("/generate", true), ("/v1/completions", false)] {
        // It never ends: whatever comes back is the limit's doing.
        let drops = futures::stream::unfold((), move |()| async move {
            if !drips {
                return std::future::pending().await;
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            Some((Ok::<_, std::io::Error>(" "), ()))
        });
        let mut answer = server.post_raw(path, axum::body::Body::from_stream(drops), &[]).await;
        let error = answer.json(408).await["error"].take();
        assert!(error["message"].as_str().unwrap().contains("within"), "{error}");
    }
}
