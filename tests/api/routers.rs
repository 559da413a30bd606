//! Requests as routers send them on: parsed into structs of their own, written anew with every default. Recorded from sglang-router 0.3.2
//! and vllm-router 0.1.17; the routers themselves run in `tests/sdk/test_routers.py`.

use serde_json::{Value, json};

use crate::common::{BASE, Server};

/// `more` over `fields`.
fn with(mut fields: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    fields.as_object_mut().unwrap().extend(more);
    fields
}

fn chat() -> Value {
    json!({
        "messages": [{"role": "user", "content": "Hi"}], "model": "sql", "logprobs": false, "stream": false, "no_stop_trim": false,
        "ignore_eos": false, "continue_final_message": false, "skip_special_tokens": true, "separate_reasoning": true,
        "stream_reasoning": true, "return_hidden_states": false,
    })
}

fn completion() -> Value {
    json!({
        "model": "sql", "prompt": "Hi", "stream": false, "echo": false, "no_stop_trim": false, "ignore_eos": false,
        "skip_special_tokens": true, "return_hidden_states": false,
    })
}

fn generate() -> Value {
    json!({
        "text": "Hi", "model": null, "return_text_in_logprobs": false, "stream": false, "log_metrics": true, "return_hidden_states": false,
        "lora_path": "sql", "background": false, "no_logs": false, "return_bytes": false, "return_entropy": false,
    })
}

fn response() -> Value {
    json!({
        "input": "Hi", "model": "sql", "store": true, "stream": null, "temperature": 1.0, "top_p": 1.0, "priority": 0, "top_k": -1,
        "min_p": 0.0, "repetition_penalty": 1.0,
    })
}

#[tokio::test]
async fn what_routers_add_changes_nothing() {
    let server = Server::new();
    for (path, body) in [
        ("/v1/chat/completions", chat()),
        ("/v1/chat/completions", with(chat(), json!({"include_reasoning": true}))),
        ("/v1/completions", completion()),
        ("/generate", generate()),
        ("/generate", with(generate(), json!({"model": BASE}))),
        (
            "/generate",
            json!({"text": "Hi", "stream": false, "return_logprob": false, "lora_path": "sql", "return_hidden_states": false}),
        ),
        ("/v1/responses", response()),
    ] {
        let answer = server.post(path, body.clone()).await.json(200).await;
        assert!(answer.to_string().contains("Hello"), "{path} {body}: {answer}");
        if path == "/v1/responses" {
            assert_eq!(answer["store"], false, "nothing is stored, and the answer says so");
        }
    }
    for recorded in server.engine.recorded() {
        assert_eq!(recorded.adapter.as_ref().map(|(name, _)| &**name), Some("sql"));
        assert!(!recorded.sampling.ignore_eos);
    }
}

#[tokio::test]
async fn what_they_add_is_refused_where_it_would_change_something() {
    let server = Server::new();
    for (path, body, param) in [
        ("/v1/chat/completions", with(chat(), json!({"priority": 1})), "priority"),
        ("/v1/completions", with(completion(), json!({"priority": -1})), "priority"),
        (
            "/v1/chat/completions",
            with(chat(), json!({"return_hidden_states": true})),
            "return_hidden_states",
        ),
        (
            "/v1/completions",
            with(completion(), json!({"return_hidden_states": true})),
            "return_hidden_states",
        ),
        (
            "/generate",
            with(generate(), json!({"return_hidden_states": true})),
            "return_hidden_states",
        ),
        ("/generate", with(generate(), json!({"background": true})), "background"),
        ("/generate", with(generate(), json!({"return_bytes": true})), "return_bytes"),
        ("/generate", with(generate(), json!({"return_entropy": true})), "return_entropy"),
        ("/generate", with(generate(), json!({"model": "json"})), "model"),
        ("/v1/responses", with(response(), json!({"priority": 1})), "priority"),
    ] {
        let answer = server.post(path, body.clone()).await.json(400).await;
        assert_eq!(answer["error"]["param"], param, "{path} {body}: {answer}");
    }
    assert!(server.engine.recorded().is_empty());
}
