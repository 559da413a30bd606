//! `/v1/chat/completions` over the mock engine.
//!
//! | outcome | status |
//! | --- | --- |
//! | answered, whole or as a stream | 200 |
//! | bad JSON, bad field, unsupported field, prompt too long, template refuses | 400 |
//! | unknown model or adapter | 404 |
//! | aborted before the first token | 499 |
//! | the engine fails before the first token | 500 |
//! | the engine fails in mid-stream | 200, an error event, no finish reason, no `[DONE]` |
//! | the queue is full | 503 + Retry-After |

use crate::common::{BASE, BOS, EOS, SPECIAL, Server, says, streamed_content, tokens};
use polylora_engine::{
    RequestError, SubmitError,
    mock::{Gate, Script, Step},
};
use serde_json::{Value, json};

const PATH: &str = "/v1/chat/completions";

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn an_answer_has_openai_s_shape() {
    let server = Server::new();
    let mut answer = server.post(PATH, chat(json!({"seed": 7}))).await;
    assert_eq!(answer.header("x-polylora-adapter"), None);
    let body = answer.json(200).await;
    assert_eq!(body["object"], "chat.completion");
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["model"], BASE);
    assert_eq!(
        body["choices"],
        json!([{
            "index": 0, "message": {"role": "assistant", "content": "Hello", "refusal": null},
            "logprobs": null, "finish_reason": "stop", "matched_stop": EOS,
        }])
    );
    // <s><user>Hi;<assistant>
    let usage = json!({"prompt_tokens": 21, "completion_tokens": 6, "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0}});
    assert_eq!(body["usage"], usage);
    let recorded = server.engine.recorded();
    let expected: Vec<u32> = [BOS].into_iter().chain(tokens("<user>Hi;<assistant>")).collect();
    assert_eq!(recorded[0].prompt_tokens, expected, "one beginning token");
    assert_eq!(recorded[0].sampling.seed, 7);
    assert_eq!(recorded[0].sampling.max_tokens, 512 - 21, "as many as fit");
    assert!(recorded[0].adapter.is_none());
}

#[tokio::test]
async fn a_stream_begins_with_the_role_and_ends_with_reason_usage_and_done() {
    let server = Server::new();
    let chunks = server
        .post(PATH, chat(json!({"stream": true, "stream_options": {"include_usage": true}})))
        .await
        .json_events()
        .await;
    let first = &chunks[0];
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(first["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(streamed_content(&chunks, 0), "Hello");
    let [.., last, usage] = &chunks[..] else { panic!("{chunks:?}") };
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 6);
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["id"] == first["id"] && chunk["created"] == first["created"])
    );
    assert_eq!(chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"].is_string()).count(), 1);
}

#[tokio::test]
async fn adapters_are_named_by_model_or_lora_path() {
    for (model, lora_path, expected) in [
        (format!("{BASE}:sql"), Value::Null, Some("sql")),
        ("demo:sql".into(), Value::Null, Some("sql")),
        ("sql".into(), Value::Null, Some("sql")),
        (BASE.into(), json!("json"), Some("json")),
        ("sql".into(), json!("json"), Some("sql")),
        ("demo:sql".into(), json!("sql"), Some("sql")),
        ("demo".into(), Value::Null, None),
    ] {
        let server = Server::new();
        let mut answer = server.post(PATH, chat(json!({"model": model, "lora_path": lora_path}))).await;
        assert_eq!(answer.header("x-polylora-adapter"), expected, "{model} {lora_path}");
        assert_eq!(answer.json(200).await["model"], model);
        let used = server.engine.recorded()[0].adapter.as_ref().map(|(name, _)| name.to_string());
        assert_eq!(used.as_deref(), expected, "{model} {lora_path}");
        assert_eq!(server.engine.leases("sql") + server.engine.leases("json"), 0, "given back");
    }
}

#[tokio::test]
async fn an_unknown_name_is_never_the_base_model() {
    let server = Server::new();
    for (model, lora_path, param) in [
        ("nope", Value::Null, "model"),
        ("demo:nope", Value::Null, "model"),
        ("nope:sql", Value::Null, "model"),
        ("demo:", Value::Null, "model"),
        ("demo", json!("nope"), "lora_path"),
        ("demo:sql+nope*0.5", Value::Null, "model"),
    ] {
        let error = server
            .post(PATH, chat(json!({"model": model, "lora_path": lora_path})))
            .await
            .error(404)
            .await;
        assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!(param)), "{model}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("demo:1b:sql") && message.contains("demo:1b:json"), "{message}");
        // What a combination is not served for is one of its parts.
        assert_eq!(message.contains(": there is no adapter 'nope'. "), model.contains('+'), "{message}");
    }
    assert!(server.engine.recorded().is_empty());
}

#[tokio::test]
async fn wrong_requests_are_refused_by_the_field_s_name() {
    let server = Server::new();
    for (extra, param) in [
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
            "messages[0].content[0].type",
        ),
        (json!({"temperature": -1}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1000}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 5000}), "max_tokens"),
        (json!({"min_tokens": 5, "max_tokens": 4}), "min_tokens"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"999": 1}}), "logit_bias"),
        (json!({"stop_token_ids": [999]}), "stop_token_ids"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": vec!["a"; 33]}), "stop"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"functions": []}), "functions"),
        (json!({"store": true}), "store"),
        (json!({"unheard_of": 1}), "unheard_of"),
        (json!({"continue_final_message": true}), "continue_final_message"),
    ] {
        let error = server.post(PATH, chat(extra.clone())).await.error(400).await;
        assert_eq!(error["param"], param, "{extra}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    assert!(server.engine.recorded().is_empty(), "nothing reached the engine");
}

#[tokio::test]
async fn fields_that_change_nothing_are_accepted() {
    let server = Server::new();
    let extra = json!({
        "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto", "parallel_tool_calls": true, "modalities": ["text"],
        "prompt_cache_key": "k", "safety_identifier": "s", "response_format": {"type": "text"}, "n": null, "stop": null, "top_k": -1,
        "tools": null, "logit_bias": null, "verbosity": "medium",
    });
    server.post(PATH, chat(extra)).await.json(200).await;
}

#[tokio::test]
async fn settings_reach_the_engine() {
    let server = Server::new();
    let extra = json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "frequency_penalty": 0.25, "presence_penalty": -0.5, "repetition_penalty": 1.5,
        "max_completion_tokens": 9, "max_tokens": 3, "min_tokens": 2, "ignore_eos": true, "stop_token_ids": [65], "logit_bias": {"66": -100},
        "chat_template_kwargs": {"mood": "calm"},
    });
    server.post(PATH, chat(extra)).await.json(200).await;
    let recorded = server.engine.recorded().remove(0);
    let sampling = &recorded.sampling;
    assert_eq!(
        (
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p,
            sampling.max_tokens,
            sampling.min_tokens
        ),
        (0.5, 0.9, 40, 0.1, 9, 2)
    );
    assert_eq!(
        (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty),
        (0.25, -0.5, 1.5)
    );
    assert_eq!(
        (sampling.ignore_eos, &sampling.stop_token_ids[..], &sampling.logit_bias[..]),
        (true, &[65][..], &[(66, -100.0)][..])
    );
    let prompt: String = recorded.prompt_tokens[1..].iter().map(|&byte| byte as u8 as char).collect();
    assert_eq!(prompt, "<user>Hi;[calm]<assistant>");
}

#[tokio::test]
async fn n_choices_share_a_prompt_but_not_a_seed() {
    let server = Server::new();
    for text in ["one", "two", "three"] {
        server.engine.script_next(says(text));
    }
    let body = server.post(PATH, chat(json!({"n": 3, "seed": 5}))).await.json(200).await;
    let contents: Vec<&Value> = body["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| &choice["message"]["content"])
        .collect();
    assert_eq!(contents, ["one", "two", "three"]);
    assert_eq!(body["usage"]["prompt_tokens"], 21, "once");
    assert_eq!(body["usage"]["completion_tokens"], 4 + 4 + 6);
    let recorded = server.engine.recorded();
    assert_eq!(recorded[0].sampling.seed, 5, "as without n");
    assert_ne!(recorded[1].sampling.seed, recorded[2].sampling.seed);
    assert_ne!(recorded[0].sampling.seed, recorded[1].sampling.seed);

    for text in ["one", "two"] {
        server.engine.script_next(says(text));
    }
    let chunks = server.post(PATH, chat(json!({"n": 2, "stream": true}))).await.json_events().await;
    assert_eq!((streamed_content(&chunks, 0), streamed_content(&chunks, 1)), ("one".into(), "two".into()));
}

#[tokio::test]
async fn stop_texts_cut_and_cancel() {
    let server = Server::new();
    let held = Gate::new();
    for stream in [false, true] {
        // Nothing after the stop text is waited for.
        server.engine.script_next(says("abcSTOPxyz").then(Step::Wait(held.clone())));
        let mut answer = server.post(PATH, chat(json!({"stop": ["STOP", "zz"], "stream": stream}))).await;
        let (content, choice) = if stream {
            let chunks = answer.json_events().await;
            (streamed_content(&chunks, 0), chunks.last().unwrap()["choices"][0].clone())
        } else {
            let body = answer.json(200).await;
            (
                body["choices"][0]["message"]["content"].as_str().unwrap().to_owned(),
                body["choices"][0].clone(),
            )
        };
        assert_eq!(content, "abc");
        assert_eq!((&choice["finish_reason"], &choice["matched_stop"]), (&json!("stop"), &json!("STOP")));
        assert_eq!(server.engine.live_requests(), 0, "the engine was told");
    }
    server.engine.script_next(says("abcSTOPxyz"));
    let body = server
        .post(PATH, chat(json!({"stop": "STOP", "no_stop_trim": true})))
        .await
        .json(200)
        .await;
    assert_eq!(body["choices"][0]["message"]["content"], "abcSTOP");
    server.engine.script_next(says("abcSTO"));
    let body = server.post(PATH, chat(json!({"stop": "STOP"}))).await.json(200).await;
    assert_eq!(body["choices"][0]["message"]["content"], "abcSTO", "what was held back comes");
}

#[tokio::test]
async fn a_character_is_never_cut() {
    let server = Server::new();
    server.engine.script_next(says("é😀"));
    let chunks = server.post(PATH, chat(json!({"stream": true}))).await.json_events().await;
    let pieces: Vec<&str> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(pieces, ["", "é", "😀"]);
    server.engine.script_next(says("é"));
    let body = server.post(PATH, chat(json!({"max_tokens": 1}))).await.json(200).await;
    assert_eq!(body["choices"][0]["message"]["content"], "\u{fffd}");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn special_tokens_are_skipped_unless_asked_for() {
    let server = Server::new();
    for (extra, expected) in [
        (json!({}), "ab"),
        (json!({"skip_special_tokens": false}), "a<|x|>b"),
        (json!({"skip_special_tokens": false, "no_stop_trim": true}), "a<|x|>b</s>"),
    ] {
        server.engine.script_next(Script::tokens([97, SPECIAL, 98]));
        let body = server.post(PATH, chat(extra)).await.json(200).await;
        assert_eq!(body["choices"][0]["message"]["content"], expected);
    }
}

#[tokio::test]
async fn logprobs_go_with_the_text() {
    let server = Server::new();
    let extra = json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 8});
    server.engine.script_next(says("hé"));
    let body = server.post(PATH, chat(extra.clone())).await.json(200).await;
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    let bytes: Vec<u64> = content
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap())
        .collect();
    assert_eq!(
        bytes,
        "hé".bytes().map(u64::from).collect::<Vec<_>>(),
        "without the end-of-sequence token"
    );
    assert_eq!((&content[0]["token"], &content[0]["logprob"]), (&json!("h"), &json!(-0.5)));
    assert_eq!(content[0]["top_logprobs"][0]["token"], "h");
    assert_eq!(content[0]["top_logprobs"][1]["logprob"], -2.0);

    server.engine.script_next(says("hé"));
    let mut streamed = extra;
    streamed["stream"] = json!(true);
    let chunks = server.post(PATH, chat(streamed)).await.json_events().await;
    let tokens: Vec<Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(tokens, content);
    assert_eq!(streamed_content(&chunks, 0), "hé");
}

#[tokio::test]
async fn a_failure_before_the_first_token_is_a_status() {
    for stream in [false, true] {
        let server = Server::new();
        for (script, status, code) in [
            (
                Script::default().then(Step::Fail(RequestError::Engine("boom".into()))),
                500,
                "engine_error",
            ),
            (Script::default().then(Step::Fail(RequestError::ShuttingDown)), 503, "shutting_down"),
        ] {
            server.engine.script_next(script);
            let mut answer = server.post(PATH, chat(json!({"stream": stream}))).await;
            let error = answer.error(status).await;
            assert_eq!(error["code"], code);
            assert!(!error["message"].as_str().unwrap().contains("boom"), "the reason is for the log");
        }
        server.engine.fail_next_submit(SubmitError::QueueFull { waiting: 4, limit: 4 });
        let mut answer = server.post(PATH, chat(json!({"stream": stream}))).await;
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert_eq!(answer.error(503).await["code"], "queue_full");
        assert_eq!(server.engine.live_requests(), 0);
    }
}

#[tokio::test]
async fn a_request_that_found_no_room_is_no_sequence_that_was_aborted() {
    let server = Server::new();
    server.engine.fail_next_submit(SubmitError::QueueFull { waiting: 4, limit: 4 });
    server.post(PATH, chat(json!({"model": "sql"}))).await.error(503).await;
    let metrics = server.get("/metrics").await.text().await;
    let ended = |line: &&str| line.starts_with("polylora_requests_total{adapter=\"sql\"") && !line.ends_with(" 0");
    assert_eq!(metrics.lines().find(ended), None);
    let answered = |line: &&str| line.starts_with("polylora_http_requests_total{") && line.contains("\"sql\",status=\"503\"} 1");
    assert!(metrics.lines().any(|line| answered(&line)), "it counts as an HTTP request:\n{metrics}");
}

#[tokio::test]
async fn n_choices_start_together_or_not_at_all() {
    let server = Server::new();
    let gate = Gate::new();
    server.engine.script_next(says("x").held_by(&gate));
    server.engine.fail_after_submits(1, SubmitError::QueueFull { waiting: 4, limit: 4 });
    server.post(PATH, chat(json!({"n": 3, "model": "sql"}))).await.error(503).await;
    assert_eq!(server.engine.recorded().len(), 1);
    assert_eq!(
        (server.engine.live_requests(), server.engine.leases("sql")),
        (0, 0),
        "the first was cancelled"
    );
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_an_event_and_the_end() {
    let server = Server::new();
    server
        .engine
        .script_next(Script::tokens(tokens("ab")).then(Step::Fail(RequestError::Engine("boom".into()))));
    let events = server.post(PATH, chat(json!({"stream": true}))).await.events().await;
    let events: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let (error, chunks) = events.split_last().unwrap();
    assert_eq!(streamed_content(chunks, 0), "ab");
    assert_eq!(error["error"]["code"], "engine_error");
    assert!(
        chunks.iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()),
        "no end that did not happen"
    );
}

#[tokio::test]
async fn a_client_that_goes_away_frees_everything() {
    let server = Server::new();
    let gate = Gate::new();
    server.engine.script_next(Script::tokens(tokens("ab")).then(Step::Wait(gate.clone())));
    let mut answer = server.post(PATH, chat(json!({"model": "sql", "stream": true}))).await;
    answer.json_event().await;
    assert_eq!((server.engine.live_requests(), server.engine.leases("sql")), (1, 1));
    drop(answer);
    assert_eq!((server.engine.live_requests(), server.engine.leases("sql")), (0, 0));
}

#[tokio::test]
async fn a_stream_s_status_waits_for_the_first_token() {
    let server = Server::new();
    let gate = Gate::new();
    server
        .engine
        .script_next(Script::default().then(Step::Wait(gate.clone())).then_tokens(tokens("x")));
    let request = server.post(PATH, chat(json!({"stream": true})));
    tokio::pin!(request);
    assert!(futures::poll!(&mut request).is_pending(), "started, but no token");
    gate.open();
    assert_eq!(streamed_content(&request.await.json_events().await, 0), "x");
}

#[tokio::test]
async fn an_abort_ends_a_request_by_its_id() {
    let server = Server::new();
    let gate = Gate::new();
    // Before the first token.
    server.engine.script_next(says("x").held_by(&gate));
    let request = server.post(PATH, chat(json!({"rid": "r1", "stream": true})));
    tokio::pin!(request);
    assert!(futures::poll!(&mut request).is_pending());
    let aborted = server.post("/abort_request", json!({"rid": "r1"})).await.json(200).await;
    assert_eq!(aborted, json!({"aborted": 1}));
    assert_eq!(request.await.error(499).await["code"], "request_aborted");
    // In mid-stream.
    server.engine.script_next(Script::tokens(tokens("ab")).then(Step::Wait(gate.clone())));
    let mut answer = server.post(PATH, chat(json!({"rid": "r2", "stream": true}))).await;
    answer.json_event().await;
    server.post("/abort_request", json!({"rid": "r2"})).await.json(200).await;
    let events = answer.events().await;
    assert!(events.last().unwrap().contains("request_aborted"), "{events:?}");
    assert!(!events.iter().any(|event| event.contains("\"stop\"")));
    assert_eq!(server.engine.live_requests(), 0);
}

#[tokio::test]
async fn a_final_message_is_continued() {
    let server = Server::new();
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure,"}]);
    server
        .post(PATH, chat(json!({"messages": messages, "continue_final_message": true})))
        .await
        .json(200)
        .await;
    let prompt: String = server.engine.recorded()[0].prompt_tokens[1..]
        .iter()
        .map(|&byte| byte as u8 as char)
        .collect();
    assert_eq!(prompt, "<user>Hi;<assistant>Sure,");
}

#[tokio::test]
async fn a_long_prompt_is_refused_with_the_numbers() {
    let server = Server::new();
    let messages = json!([{"role": "user", "content": "x".repeat(600)}]);
    let error = server.post(PATH, chat(json!({"messages": messages}))).await.error(400).await;
    assert_eq!(error["code"], "context_length_exceeded");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("619 tokens") && message.contains("512 tokens"), "{message}");
}

#[tokio::test]
async fn an_error_about_the_number_of_tokens_names_the_field_that_was_sent() {
    let server = Server::new();
    for field in ["max_tokens", "max_completion_tokens"] {
        for tokens in [0, 100_000] {
            let body = json!({"model": BASE, "messages": [{"role": "user", "content": "a"}], field: tokens});
            assert_eq!(server.post("/v1/chat/completions", body).await.error(400).await["param"], field);
        }
    }
}
