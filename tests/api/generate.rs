//! `/generate` over the mock engine.
//!
//! | outcome | status |
//! | --- | --- |
//! | answered: an object, or a list for a batch or `n` > 1; whole or as a stream | 200 |
//! | ended by `/abort_request` | 200, finish_reason `abort` |
//! | bad field, both or neither of text and input_ids, list lengths that differ | 400 |
//! | an adapter that is not there (any more) | 404 |
//! | the engine fails before the first token | 500 |
//! | the engine fails in mid-stream | 200, an error event, `[DONE]` |
//! | the queue is full | 503 + Retry-After |

use polylora_engine::{
    RequestError, SubmitError,
    mock::{Gate, Script, Step},
};
use serde_json::{Value, json};

use crate::common::{BOS, EOS, Server, says, tokens};

const PATH: &str = "/generate";

async fn refused(server: &Server, body: Value) -> Value {
    let mut answer = server.post(PATH, body.clone()).await;
    let error = answer.json(400).await["error"].take();
    assert_eq!((&error["code"], &error["type"]), (&json!(400), &json!("invalid_request_error")), "{body}");
    error
}

#[tokio::test]
async fn one_prompt_answers_with_an_object() {
    let server = Server::new();
    let body = json!({"text": "Hi", "sampling_params": {"max_new_tokens": 9, "temperature": 0}, "lora_path": "sql", "rid": "r"});
    let mut answer = server.post(PATH, body).await;
    assert_eq!(answer.header("x-polylora-adapter"), Some("sql"));
    let mut body = answer.json(200).await;
    assert!(body["meta_info"]["e2e_latency"].as_f64().unwrap() >= 0.0);
    body["meta_info"]["e2e_latency"] = json!(0);
    body["meta_info"]["weight_version"] = json!("w");
    let output: Vec<u32> = tokens("Hello").chain([EOS]).collect();
    let expected = json!({
        "text": "Hello", "output_ids": output,
        "meta_info": {
            "id": "r", "finish_reason": {"type": "stop", "matched": EOS}, "prompt_tokens": 3, "completion_tokens": 6, "cached_tokens": 0,
            "e2e_latency": 0, "lora": "sql", "weight_version": "w",
        },
    });
    assert_eq!(body, expected);
    let recorded = server.engine.recorded().remove(0);
    assert_eq!((recorded.prompt_tokens, recorded.sampling.max_tokens), (vec![BOS, 72, 105], 9));
}

#[tokio::test]
async fn a_batch_mixes_adapters_and_the_base_model() {
    let server = Server::with(
        |engine| engine.reply(|request| says(request.adapter.as_ref().map_or("base", |(name, _)| name))),
        |_| {},
    );
    let body = json!({
        "text": ["a", "b", "c"], "lora_path": ["sql", null, "json"],
        "sampling_params": [{"max_new_tokens": 8}, {"max_new_tokens": 9}, {"max_new_tokens": null}],
    });
    let mut answer = server.post(PATH, body).await;
    assert_eq!(answer.header("x-polylora-adapter"), None, "no one adapter answered");
    let body = answer.json(200).await;
    let parts = body.as_array().unwrap();
    let field = |name: &str| parts.iter().map(|part| part[name].clone()).collect::<Vec<_>>();
    assert_eq!(field("text"), ["sql", "base", "json"]);
    let lora: Vec<&Value> = parts.iter().map(|part| &part["meta_info"]["lora"]).collect();
    assert_eq!(lora, [&json!("sql"), &Value::Null, &json!("json")]);
    let max_tokens: Vec<u32> = server.engine.recorded().iter().map(|request| request.sampling.max_tokens).collect();
    assert_eq!(max_tokens, [8, 9, 510]);
    assert_eq!(server.engine.leases("sql"), 0);
}

#[tokio::test]
async fn a_list_of_one_answers_with_a_list_and_n_prompt_by_prompt() {
    let server = Server::new();
    let body = server.post(PATH, json!({"text": ["a"]})).await.json(200).await;
    assert_eq!(body.as_array().unwrap().len(), 1);
    for text in ["a0", "a1", "b0", "b1"] {
        server.engine.script_next(says(text));
    }
    let body = server
        .post(PATH, json!({"input_ids": [[97], [98]], "sampling_params": {"n": 2}}))
        .await
        .json(200)
        .await;
    let texts: Vec<&Value> = body.as_array().unwrap().iter().map(|part| &part["text"]).collect();
    assert_eq!(texts, ["a0", "a1", "b0", "b1"]);
    let ids: Vec<&Value> = body.as_array().unwrap().iter().map(|part| &part["meta_info"]["prompt_tokens"]).collect();
    assert_eq!(ids, [1, 1, 1, 1]);
}

#[tokio::test]
async fn put_is_post() {
    let server = Server::new();
    let request = axum::http::Request::put(PATH)
        .header("content-type", "application/json")
        .body(json!({"text": "Hi"}).to_string().into())
        .unwrap();
    assert_eq!(server.send(request).await.json(200).await["text"], "Hello");
}

#[tokio::test]
async fn wrong_requests_are_refused_by_the_field_s_name() {
    let server = Server::new();
    for (body, param) in [
        (json!({}), "text"),
        (json!({"text": "a", "input_ids": [97]}), "input_ids"),
        (json!({"text": []}), "text"),
        (json!({"input_ids": []}), "input_ids"),
        (json!({"input_ids": [[97], []]}), "input_ids"),
        (json!({"input_ids": ["a"]}), "input_ids"),
        (json!({"text": "a", "lora_path": ["sql"]}), "lora_path"),
        (json!({"text": ["a", "b"], "lora_path": ["sql"]}), "lora_path"),
        (json!({"text": ["a", "b"], "sampling_params": [{}]}), "sampling_params"),
        (json!({"text": ["a", "b"], "rid": ["x", "x"]}), "rid"),
        (json!({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}), "sampling_params.n"),
        (json!({"text": "a", "sampling_params": {"unheard_of": 1}}), "sampling_params.unheard_of"),
        (json!({"text": "a", "sampling_params": {"top_p": 2}}), "sampling_params.top_p"),
        (
            json!({"text": "a", "sampling_params": {"max_new_tokens": 5000}}),
            "sampling_params.max_new_tokens",
        ),
        (
            json!({"text": "a", "sampling_params": {"max_new_tokens": 1, "min_new_tokens": 2}}),
            "sampling_params.min_new_tokens",
        ),
        (json!({"text": "a", "return_logprob": true, "logprob_start_len": 5}), "logprob_start_len"),
        (json!({"text": "a", "return_logprob": true, "logprob_start_len": -2}), "logprob_start_len"),
        (json!({"text": "a", "return_logprob": true, "top_logprobs_num": 99}), "top_logprobs_num"),
        (json!({"text": "a", "image_data": "x"}), "image_data"),
    ] {
        let error = refused(&server, body.clone()).await;
        assert_eq!(error["param"], param, "{body}: {error}");
    }
    assert!(server.engine.recorded().is_empty());
}

#[tokio::test]
async fn an_unknown_adapter_is_refused_in_sglang_s_words() {
    let server = Server::new();
    let body = json!({"text": ["a", "b"], "lora_path": ["sql", "nope"]});
    let error = server.post(PATH, body).await.json(404).await["error"].take();
    assert_eq!((&error["code"], &error["param"]), (&json!(404), &json!("lora_path")));
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("has never been loaded: nope") && message.contains("json, sql"),
        "{message}"
    );
    assert_eq!(server.engine.leases("sql"), 0, "given back");
    let server = Server::with(|engine| engine.describe(|description| description.lora_enabled = false), |_| {});
    let error = refused(&server, json!({"text": "a", "lora_path": "sql"})).await;
    assert!(error["message"].as_str().unwrap().contains("LoRA is not enabled"));
}

#[tokio::test]
async fn a_stream_has_all_of_the_text_in_every_event() {
    let server = Server::new();
    let events = server.post(PATH, json!({"text": "Hi", "stream": true})).await.json_events().await;
    let texts: Vec<&Value> = events.iter().map(|event| &event["text"]).collect();
    assert_eq!(texts, ["H", "He", "Hel", "Hell", "Hello", "Hello", "Hello"]);
    let counts: Vec<&Value> = events.iter().map(|event| &event["meta_info"]["completion_tokens"]).collect();
    assert_eq!(counts, [1, 2, 3, 4, 5, 6, 6]);
    let reasons = events.iter().map(|event| &event["meta_info"]["finish_reason"]);
    assert_eq!(reasons.filter(|reason| reason.is_null()).count(), 6);
    assert_eq!(events.last().unwrap()["meta_info"]["finish_reason"]["type"], "stop");
    assert!(events.iter().all(|event| event.get("index").is_none()));
    assert_eq!(events.last().unwrap()["output_ids"].as_array().unwrap().len(), 6);
}

#[tokio::test]
async fn a_streamed_batch_says_which_output() {
    let server = Server::new();
    server.engine.script_next(says("ab"));
    server.engine.script_next(says("cd"));
    let events = server.post(PATH, json!({"text": ["a", "b"], "stream": true})).await.json_events().await;
    for (index, text) in [(0, "ab"), (1, "cd")] {
        let last = events.iter().rfind(|event| event["index"] == index).unwrap();
        assert_eq!(
            (&last["text"], &last["meta_info"]["finish_reason"]["type"]),
            (&json!(text), &json!("stop"))
        );
    }
}

#[tokio::test]
async fn logprobs_are_triples() {
    let server = Server::new();
    let body = json!({
        "input_ids": [72, 105, 33], "return_logprob": true, "logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": true,
        "return_prompt_token_ids": true, "sampling_params": {"max_new_tokens": 2},
    });
    let answer = server.post(PATH, body.clone()).await.json(200).await;
    let info = &answer["meta_info"];
    assert_eq!(info["input_token_logprobs"], json!([[null, 72, "H"], [-0.5, 105, "i"], [-0.5, 33, "!"]]));
    assert_eq!(info["output_token_logprobs"], json!([[-0.5, 72, "H"], [-0.5, 101, "e"]]));
    assert_eq!(info["input_top_logprobs"][0], Value::Null);
    assert_eq!(info["input_top_logprobs"][1][0], json!([-0.5, 105, "i"]));
    assert_eq!(info["output_top_logprobs"][1].as_array().unwrap().len(), 2);
    assert_eq!(info["finish_reason"], json!({"type": "length", "length": 2}));
    assert_eq!(answer["prompt_token_ids"], json!([72, 105, 33]));

    let mut later = body.clone();
    later["logprob_start_len"] = json!(2);
    later["return_text_in_logprobs"] = json!(false);
    let answer = server.post(PATH, later).await.json(200).await;
    assert_eq!(answer["meta_info"]["input_token_logprobs"], json!([[-0.5, 33, null]]));
    let answer = server.post(PATH, json!({"text": "a", "return_logprob": true})).await.json(200).await;
    assert_eq!(answer["meta_info"]["input_token_logprobs"], json!([]));
}

#[tokio::test]
async fn failures_before_and_after_the_first_token() {
    for stream in [false, true] {
        let server = Server::new();
        let body = json!({"text": "a", "stream": stream});
        server
            .engine
            .script_next(Script::default().then(Step::Fail(RequestError::Engine("boom".into()))));
        let error = server.post(PATH, body.clone()).await.json(500).await["error"].take();
        assert_eq!((&error["code"], &error["retryable"]), (&json!(500), &json!(false)));
        server.engine.fail_next_submit(SubmitError::QueueFull { waiting: 4, limit: 4 });
        let mut answer = server.post(PATH, body).await;
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert_eq!(answer.json(503).await["error"]["retryable"], true);
    }
    let server = Server::new();
    server
        .engine
        .script_next(Script::tokens(tokens("a")).then(Step::Fail(RequestError::Engine("boom".into()))));
    let events = server.post(PATH, json!({"text": "a", "stream": true})).await.json_events().await;
    assert_eq!(events.last().unwrap()["error"]["code"], 500);
    assert!(events.iter().all(|event| event["meta_info"]["finish_reason"].is_null()));
}

#[tokio::test]
async fn an_abort_is_a_finish_reason() {
    let server = Server::new();
    for (stream, abort) in [
        (false, json!({"rid": "r"})),
        (true, json!({"rid": "r"})),
        (false, json!({"abort_all": true})),
    ] {
        server.engine.script_next(Script::tokens(tokens("ab")).then(Step::Wait(Gate::new())));
        let request = server.post(PATH, json!({"text": "a", "rid": "r", "stream": stream}));
        tokio::pin!(request);
        let answer = futures::poll!(&mut request);
        assert_eq!(answer.is_ready(), stream);
        server.post("/abort_request", abort).await.json(200).await;
        let last = match answer {
            std::task::Poll::Ready(mut answer) => answer.json_events().await.pop().unwrap(),
            std::task::Poll::Pending => request.await.json(200).await,
        };
        // What was not taken by then is not sent any more.
        assert!("ab".starts_with(last["text"].as_str().unwrap()), "{last}");
        assert_eq!(last["meta_info"]["finish_reason"]["type"], "abort");
    }
    let before_the_first = says("x").held_by(&Gate::new());
    server.engine.script_next(before_the_first);
    let request = server.post(PATH, json!({"text": ["a"], "rid": "s", "stream": true}));
    tokio::pin!(request);
    assert!(futures::poll!(&mut request).is_pending());
    server.post("/abort_request", json!({"rid": "s"})).await.json(200).await;
    let events = request.await.json_events().await;
    assert_eq!(events[0]["meta_info"]["finish_reason"]["type"], "abort");
    assert_eq!(server.engine.live_requests(), 0);
}

#[tokio::test]
async fn no_tokens_at_all_is_possible() {
    let server = Server::new();
    let body = json!({"text": "Hi", "sampling_params": {"max_new_tokens": 0}, "return_logprob": true, "logprob_start_len": 1});
    let answer = server.post(PATH, body).await.json(200).await;
    assert_eq!((&answer["text"], &answer["output_ids"]), (&json!(""), &json!([])));
    assert_eq!(answer["meta_info"]["finish_reason"], json!({"type": "length", "length": 0}));
    assert_eq!(answer["meta_info"]["input_token_logprobs"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn an_empty_rid_is_none() {
    let answer = Server::new().post(PATH, json!({"text": "a", "rid": ""})).await.json(200).await;
    let id = answer["meta_info"]["id"].as_str().unwrap().to_owned();
    assert!(!id.is_empty(), "{answer}");
}

#[tokio::test]
async fn errors_of_a_prompt_name_the_field_that_it_came_in() {
    let server = Server::new();
    let long = "a".repeat(600);
    for (body, param) in [
        (json!({"input_ids": [5000]}), "input_ids"),
        (json!({"input_ids": [[1], [5000]]}), "input_ids"),
        (json!({"input_ids": vec![97; 600]}), "input_ids"),
        (json!({"text": long}), "text"),
        (
            json!({"text": "a", "sampling_params": {"json_schema": "{"}}),
            "sampling_params.json_schema",
        ),
        (json!({"text": "a", "sampling_params": {"regex": "("}}), "sampling_params.regex"),
    ] {
        let error = server.post(PATH, body).await.json(400).await["error"].take();
        assert_eq!(error["param"], param, "{error}");
    }
}

#[tokio::test]
async fn an_adapter_that_a_device_refuses_is_named_by_this_route_s_field() {
    let server = Server::new();
    for stream in [false, true] {
        let fault = RequestError::Adapter {
            adapter: "sql".into(),
            reason: "no room".into(),
        };
        server.engine.script_next(Script::default().then(Step::Fail(fault)));
        let body = json!({"text": "a", "lora_path": "sql", "stream": stream});
        let error = server.post(PATH, body).await.json(400).await["error"].take();
        assert_eq!(error["param"], "lora_path", "{error}");
    }
}

#[tokio::test]
async fn more_adapters_than_there_may_be_in_memory_are_the_client_s_mistake() {
    let server = Server::new();
    server
        .engine
        .fail_next_acquire(polylora_engine::AdapterError::TooManyAdapters { got: 3, limit: 2 });
    let mut answer = server.post(PATH, json!({"text": ["a", "b"], "lora_path": ["sql", "json"]})).await;
    assert_eq!(answer.header("retry-after"), None);
    let error = answer.json(400).await["error"].take();
    assert_eq!((&error["param"], &error["retryable"]), (&json!("lora_path"), &json!(false)));
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("at most 2") && message.contains("names 3"), "{message}");
}
