//! `/v1/completions` over the mock engine.
//!
//! | outcome | status |
//! | --- | --- |
//! | answered, whole or as a stream | 200 |
//! | bad prompt, bad field, unsupported field | 400 |
//! | unknown model or adapter | 404 |
//! | the engine fails in mid-stream | 200, an error event, no finish reason, no `[DONE]` |

use polylora_engine::{
    RequestError,
    mock::{Script, Step},
};
use serde_json::{Value, json};

use crate::common::{BASE, BOS, EOS, Server, says, streamed_content, tokens};

const PATH: &str = "/v1/completions";

fn complete(extra: Value) -> Value {
    let mut body = json!({"model": BASE, "prompt": "Hi"});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn an_answer_has_openai_s_shape() {
    let server = Server::new();
    let body = server.post(PATH, complete(json!({}))).await.json(200).await;
    assert_eq!(body["object"], "text_completion");
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(
        body["choices"],
        json!([{"index": 0, "text": "Hello", "logprobs": null, "finish_reason": "stop", "matched_stop": EOS}])
    );
    assert_eq!(body["usage"]["prompt_tokens"], 3);
    let recorded = server.engine.recorded().remove(0);
    assert_eq!(recorded.prompt_tokens, [BOS, 72, 105], "as the tokenizer makes a prompt");
    assert_eq!(recorded.sampling.max_tokens, 16, "OpenAI's default");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn large_bodies_are_answered_as_small_ones_are() {
    let server = Server::with(
        |engine| {
            engine
                .describe(|description| (description.context_length, description.min_blocks) = (1 << 20, 1 << 16))
                .reply(|_| says("Hello"))
        },
        |_| {},
    );
    let sizes = [3000, 20, 90_000];
    let texts: Vec<String> = sizes.iter().map(|size| "ab".repeat(size / 2)).collect();
    let ids: Vec<Vec<u32>> = texts.iter().map(|text| tokens(text).collect()).collect();
    let usage = async |path, body| server.post(path, body).await.json(200).await["usage"]["prompt_tokens"].clone();
    let all: usize = sizes.iter().sum();
    assert_eq!(usage(PATH, complete(json!({"prompt": texts}))).await, all + 3, "one beginning token each");
    assert_eq!(usage(PATH, complete(json!({"prompt": ids}))).await, all);
    let echoed = server.post(PATH, complete(json!({"prompt": ids, "echo": true}))).await.json(200).await;
    for (choice, text) in echoed["choices"].as_array().unwrap().iter().zip(&texts) {
        assert_eq!(choice["text"].as_str().unwrap(), format!("{text}Hello"));
    }
    let text = server.post("/generate", json!({"text": texts})).await.json(200).await;
    let counted: Vec<&Value> = text
        .as_array()
        .unwrap()
        .iter()
        .map(|output| &output["meta_info"]["prompt_tokens"])
        .collect();
    assert_eq!(counted, [3001, 21, 90_001]);
    let chat = json!({"model": BASE, "messages": [{"role": "user", "content": texts[2]}]});
    assert_eq!(usage("/v1/chat/completions", chat).await, 1 + "<user>;<assistant>".len() + 90_000);
    let counted = server.post("/tokenize", json!({"prompt": texts[2]})).await.json(200).await;
    assert_eq!(counted["count"], 90_001);
    let text = server.post("/detokenize", json!({"tokens": ids[2]})).await.json(200).await;
    assert_eq!(text["text"], texts[2]);
    let responses = server
        .post("/v1/responses", json!({"model": BASE, "input": texts[2]}))
        .await
        .json(200)
        .await;
    assert_eq!(responses["usage"]["input_tokens"], 1 + "<user>;<assistant>".len() + 90_000);
}

#[tokio::test]
async fn every_form_of_prompt_is_taken() {
    let server = Server::new();
    for (prompt, expected) in [
        (json!("a"), vec![vec![BOS, 97]]),
        (json!(["a", "b"]), vec![vec![BOS, 97], vec![BOS, 98]]),
        (json!([97, 98]), vec![vec![97, 98]]),
        (json!([[97], [98, 99]]), vec![vec![97], vec![98, 99]]),
    ] {
        let before = server.engine.recorded().len();
        let body = server.post(PATH, complete(json!({"prompt": prompt}))).await.json(200).await;
        let recorded: Vec<Vec<u32>> = server.engine.recorded()[before..]
            .iter()
            .map(|request| request.prompt_tokens.clone())
            .collect();
        assert_eq!(recorded, expected);
        let indices: Vec<&Value> = body["choices"].as_array().unwrap().iter().map(|choice| &choice["index"]).collect();
        assert_eq!(indices, (0..expected.len()).collect::<Vec<_>>());
    }
    server.post(PATH, complete(json!({"add_special_tokens": false}))).await.json(200).await;
    assert_eq!(server.engine.recorded().last().unwrap().prompt_tokens, [72, 105]);
}

#[tokio::test]
async fn each_prompt_may_have_an_adapter() {
    let server = Server::new();
    let extra = json!({"prompt": ["a", "b", "c"], "lora_path": ["sql", null, "json"]});
    server.post(PATH, complete(extra)).await.json(200).await;
    let adapters: Vec<Option<String>> = server
        .engine
        .recorded()
        .iter()
        .map(|request| request.adapter.as_ref().map(|(name, _)| name.to_string()))
        .collect();
    assert_eq!(adapters, [Some("sql".into()), None, Some("json".into())]);
    let error = server
        .post(PATH, complete(json!({"prompt": ["a", "b"], "lora_path": ["sql"]})))
        .await
        .error(400)
        .await;
    assert_eq!(error["param"], "lora_path");
    let error = server.post(PATH, complete(json!({"lora_path": "nope"}))).await.error(404).await;
    assert_eq!(error["param"], "lora_path");
}

#[tokio::test]
async fn wrong_requests_are_refused_by_the_field_s_name() {
    let server = Server::new();
    for (extra, param) in [
        (json!({"prompt": ""}), Value::Null),
        (json!({"prompt": []}), json!("prompt")),
        (json!({"prompt": [[]]}), json!("prompt")),
        (json!({"prompt": [999]}), json!("prompt")),
        (json!({"prompt": ["a", 1]}), json!("prompt[1]")),
        (json!({"best_of": 2}), json!("best_of")),
        (json!({"suffix": "x"}), json!("suffix")),
        (json!({"max_tokens": 0}), json!("max_tokens")),
        (json!({"logprobs": 21}), json!("logprobs")),
        (json!({"messages": []}), json!("messages")),
    ] {
        let answer = server.post(PATH, complete(extra.clone())).await;
        if param.is_null() {
            // The beginning-of-sequence token alone is a prompt, as elsewhere.
            assert_eq!(answer.status, 200, "{extra}");
            continue;
        }
        let error = { answer }.error(400).await;
        assert_eq!(error["param"], param, "{extra}: {error}");
    }
}

#[tokio::test]
async fn echo_puts_the_prompt_before_the_answer() {
    let server = Server::new();
    for stream in [false, true] {
        let extra = json!({"prompt": ["Hi", "Yo"], "echo": true, "stream": stream, "n": 2});
        let mut answer = server.post(PATH, complete(extra)).await;
        let texts: Vec<String> = if stream {
            let chunks = answer.json_events().await;
            (0..4).map(|index| streamed_content(&chunks, index)).collect()
        } else {
            let body = answer.json(200).await;
            body["choices"]
                .as_array()
                .unwrap()
                .iter()
                .map(|choice| choice["text"].as_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(texts, ["HiHello", "HiHello", "YoHello", "YoHello"]);
    }
    let body = server
        .post(PATH, complete(json!({"echo": true, "max_tokens": 0, "logprobs": 1, "prompt": [72, 105]})))
        .await
        .json(200)
        .await;
    let choice = &body["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("Hi"), &json!("length")));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5]));
    assert_eq!(body["usage"]["completion_tokens"], 0);
    assert_eq!(server.engine.live_requests(), 0);
}

#[tokio::test]
async fn logprobs_have_offsets_and_the_likeliest() {
    let server = Server::new();
    let extra = json!({"prompt": [72, 105], "echo": true, "logprobs": 2});
    let body = server.post(PATH, complete(extra.clone())).await.json(200).await;
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["H", "i", "H", "e", "l", "l", "o"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 4, 5, 6]));
    assert_eq!(logprobs["token_logprobs"], json!([null, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5]));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][2].as_object().unwrap().len(), 2);

    let mut streamed = extra;
    streamed["stream"] = json!(true);
    let chunks = server.post(PATH, complete(streamed)).await.json_events().await;
    for field in ["tokens", "text_offset", "token_logprobs", "top_logprobs"] {
        let all: Vec<Value> = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["logprobs"][field].as_array().cloned())
            .flatten()
            .collect();
        assert_eq!(json!(all), logprobs[field], "{field}");
    }
}

#[tokio::test]
async fn a_stream_ends_with_reason_usage_and_done() {
    let server = Server::new();
    let extra = json!({"stream": true, "stream_options": {"include_usage": true}, "max_tokens": 3});
    let chunks = server.post(PATH, complete(extra)).await.json_events().await;
    assert_eq!(streamed_content(&chunks, 0), "Hel");
    let [.., last, usage] = &chunks[..] else { panic!("{chunks:?}") };
    assert_eq!(
        (&last["choices"][0]["finish_reason"], &last["choices"][0]["text"]),
        (&json!("length"), &json!(""))
    );
    assert_eq!((&usage["choices"], &usage["usage"]["total_tokens"]), (&json!([]), &json!(6)));
    assert!(chunks.iter().all(|chunk| chunk["object"] == "text_completion"));
}

#[tokio::test]
async fn a_failure_in_mid_stream_cancels_the_other_choices() {
    let server = Server::new();
    server
        .engine
        .script_next(Script::tokens(tokens("ab")).then(Step::Fail(RequestError::Engine("boom".into()))));
    server.engine.script_next(says("cd").then(Step::Wait(polylora_engine::mock::Gate::new())));
    let events = server.post(PATH, complete(json!({"stream": true, "n": 2}))).await.events().await;
    assert!(events.last().unwrap().contains("engine_error"), "{events:?}");
    assert_eq!(server.engine.live_requests(), 0);
}
