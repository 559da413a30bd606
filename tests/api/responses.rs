//! `/v1/responses`, `/tokenize` and `/detokenize` over the mock engine.
//!
//! | outcome | status |
//! | --- | --- |
//! | answered, whole or as a stream | 200 |
//! | a field that can't be honoured | 400 |
//! | unknown model or adapter | 404 |
//! | the engine fails in mid-stream | 200, `response.failed` |

use polylora_engine::{
    RequestError,
    mock::{Script, Step},
};
use serde_json::{Value, json};

use crate::common::{Answer, BASE, BOS, Server, says, tokens};

async fn respond(server: &Server, extra: Value) -> Answer {
    let mut body = json!({"model": BASE, "input": "Hi"});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    server.post("/v1/responses", body).await
}

fn prompt(server: &Server) -> String {
    let recorded = server.engine.recorded();
    recorded.last().unwrap().prompt_tokens[1..]
        .iter()
        .map(|&byte| byte as u8 as char)
        .collect()
}

#[tokio::test]
async fn an_answer_has_openai_s_shape() {
    let server = Server::new();
    let mut answer = respond(
        &server,
        json!({"model": "sql", "instructions": "Be brief.", "metadata": {"a": "b"}, "store": false}),
    )
    .await;
    assert_eq!(answer.header("x-polylora-adapter"), Some("sql"));
    let body = answer.json(200).await;
    assert_eq!(
        (&body["object"], &body["status"], &body["store"]),
        (&json!("response"), &json!("completed"), &json!(false))
    );
    assert_eq!(body["output"].as_array().unwrap().len(), 1);
    let item = &body["output"][0];
    assert_eq!(
        (&item["type"], &item["role"], &item["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    assert_eq!(
        item["content"],
        json!([{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}])
    );
    assert_eq!((&body["usage"]["output_tokens"], &body["metadata"]), (&json!(6), &json!({"a": "b"})));
    assert_eq!(prompt(&server), "<system>Be brief.;<user>Hi;<assistant>");
}

#[tokio::test]
async fn a_conversation_comes_as_items() {
    let server = Server::new();
    let input = json!([
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}], "id": "m", "status": "completed"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "fc"},
        {"type": "function_call_output", "call_id": "c", "output": "d"},
    ]);
    respond(&server, json!({"input": input})).await.json(200).await;
    let prompt = prompt(&server);
    assert!(prompt.starts_with("<user>a;<assistant>b[{") && prompt.contains("<tool>d;"), "{prompt}");
}

#[tokio::test]
async fn a_stream_tells_every_step() {
    let server = Server::new();
    let events = respond(&server, json!({"stream": true})).await.events().await;
    let events: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let mut expected = vec![
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ];
    expected.extend(["response.output_text.delta"; 5]);
    expected.extend([
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]);
    assert_eq!(kinds, expected);
    assert!(events.iter().enumerate().all(|(index, event)| event["sequence_number"] == index));
    let text: String = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .filter_map(|event| event["delta"].as_str())
        .collect();
    let last = &events.last().unwrap()["response"];
    assert_eq!(json!(text), last["output"][0]["content"][0]["text"]);
    assert_eq!((&last["status"], &last["usage"]["total_tokens"]), (&json!("completed"), &json!(27)));
    let id = &events[0]["response"]["id"];
    assert_eq!(&last["id"], id);
}

#[tokio::test]
async fn functions_are_called() {
    let server = Server::new();
    let tools = json!([{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
        "additionalProperties": false}}]);
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>";
    server.engine.script_next(says(call));
    let body = respond(&server, json!({"tools": tools, "tool_choice": "required"})).await.json(200).await;
    let item = &body["output"][0];
    assert_eq!(
        (&item["type"], &item["name"], &item["arguments"]),
        (&json!("function_call"), &json!("f"), &json!("{\"x\": 1}"))
    );
    assert!(item["call_id"].as_str().unwrap().starts_with("call_"));
    server.engine.script_next(says(call));
    let events = respond(
        &server,
        json!({"tools": tools, "tool_choice": {"type": "function", "name": "f"}, "stream": true}),
    )
    .await
    .events()
    .await;
    let events: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let deltas: String = events
        .iter()
        .filter(|event| event["type"] == "response.function_call_arguments.delta")
        .filter_map(|event| event["delta"].as_str())
        .collect();
    assert_eq!(deltas, "{\"x\": 1}");
    assert!(
        events
            .iter()
            .any(|event| event["type"] == "response.function_call_arguments.done" && event["arguments"] == "{\"x\": 1}")
    );
}

#[tokio::test]
async fn a_schema_is_followed_and_a_cut_is_told() {
    let server = Server::new();
    let format = json!({"format": {"type": "json_schema", "name": "t", "schema": {"type": "object", "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"], "additionalProperties": false}}});
    server.engine.script_next(says("{\"ok\": true} and"));
    let body = respond(&server, json!({"text": format})).await.json(200).await;
    assert_eq!(body["output"][0]["content"][0]["text"], "{\"ok\": true}");
    let body = respond(&server, json!({"max_output_tokens": 2})).await.json(200).await;
    assert_eq!(
        (&body["status"], &body["incomplete_details"]),
        (&json!("incomplete"), &json!({"reason": "max_output_tokens"}))
    );
    assert_eq!(body["output"][0]["status"], "incomplete");
}

#[tokio::test]
async fn what_cannot_be_honoured_is_refused() {
    let server = Server::new();
    for (extra, param) in [
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"background": true}), "background"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"include": ["web_search_call.results"]}), "include"),
        (json!({"tools": [{"type": "web_search", "name": "x"}]}), "tools[0].type"),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0].type"),
        (json!({"input": [{"type": "function_call_output", "output": "x"}]}), "input[0].call_id"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
            "input[0].content[0].type",
        ),
        (json!({"unheard_of": 1}), "unheard_of"),
    ] {
        let error = respond(&server, extra.clone()).await.error(400).await;
        assert_eq!(error["param"], param, "{extra}: {error}");
    }
    respond(&server, json!({"model": "nope"})).await.error(404).await;
    assert!(server.engine.recorded().is_empty());
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_told() {
    let server = Server::new();
    let script = || Script::tokens(tokens("ab")).then(Step::Fail(RequestError::Engine("boom".into())));
    server.engine.script_next(script());
    let events = respond(&server, json!({"stream": true})).await.events().await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(
        (&last["type"], &last["response"]["error"]["code"]),
        (&json!("response.failed"), &json!("engine_error"))
    );
    server.engine.script_next(script());
    respond(&server, json!({})).await.error(500).await;
}

#[tokio::test]
async fn texts_and_tokens_are_turned_into_each_other() {
    let server = Server::new();
    let body = server
        .post("/tokenize", json!({"prompt": "Hi", "model": "demo:sql", "return_token_strs": true}))
        .await
        .json(200)
        .await;
    assert_eq!(
        body,
        json!({"count": 3, "max_model_len": 512, "tokens": [BOS, 72, 105], "token_strs": ["<s>", "H", "i"]})
    );
    let body = server
        .post("/tokenize", json!({"messages": [{"role": "user", "content": "Hi"}]}))
        .await
        .json(200)
        .await;
    assert_eq!(body["count"], 21, "as a chat has it");
    let body = server.post("/detokenize", json!({"tokens": [BOS, 72, 105]})).await.json(200).await;
    assert_eq!(body, json!({"prompt": "<s>Hi", "text": "<s>Hi"}));
    for (path, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "messages": []}), "prompt"),
        ("/detokenize", json!({"tokens": [99999]}), "tokens"),
    ] {
        assert_eq!(server.post(path, body).await.error(400).await["param"], param);
    }
    server.post("/tokenize", json!({"prompt": "a", "model": "nope"})).await.error(404).await;
}

#[tokio::test]
async fn errors_name_fields_as_this_api_has_them() {
    let server = Server::new();
    let tool = json!({"type": "function", "name": "no name", "parameters": {}});
    for (body, param) in [
        (json!({"model": BASE, "input": "a".repeat(600)}), "input"),
        (json!({"model": BASE, "input": "a", "max_output_tokens": 5000}), "max_output_tokens"),
        (json!({"model": BASE, "input": "a", "max_output_tokens": 0}), "max_output_tokens"),
        (json!({"model": BASE, "input": []}), "input"),
        (json!({"model": BASE, "input": 5}), "input"),
        (json!({"model": BASE, "input": "a", "tool_choice": "x"}), "tool_choice"),
        (
            json!({"model": BASE, "instructions": "x", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
            "input[0].content[0].type",
        ),
        (json!({"model": BASE, "input": "a", "tools": [tool]}), "tools[0].name"),
    ] {
        let error = server.post("/v1/responses", body).await.error(400).await;
        assert_eq!(error["param"], param, "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(
            !message.contains("messages") && !message.contains("enum") && !message.contains("completion_tokens"),
            "{message}"
        );
    }
    let chat = json!({"model": BASE, "messages": [{"role": "user", "content": "a".repeat(600)}]});
    assert_eq!(server.post("/v1/chat/completions", chat).await.error(400).await["param"], "messages");
}
