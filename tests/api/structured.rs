//! Answers of a given form: JSON schemas, regular expressions, grammars, on every route that generates.
//!
//! The mock engine takes a scripted token if the grammar allows it, otherwise the lowest allowed one: what comes out follows the
//! grammar whatever the "model" wants.
//!
//! | outcome | status |
//! | --- | --- |
//! | the output follows the form, or is cut by max_tokens with finish_reason `length` | 200 |
//! | the form can't be compiled, or there are several | 400 `invalid_grammar` |

use serde_json::{Value, json};

use crate::common::{BASE, Server, says, streamed_content};

fn schema() -> Value {
    json!({"type": "object", "properties": {"n": {"type": "integer"}, "unit": {"enum": ["C", "F"]}}, "required": ["n", "unit"],
        "additionalProperties": false})
}

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_schema_is_followed_streamed_or_not_by_base_and_adapter() {
    let server = Server::new();
    for (model, stream) in [(BASE, false), (BASE, true), ("sql", false), ("sql", true)] {
        // It wants to say something else in the end.
        server.engine.script_next(says(r#"{"n": 21, "unit": "C"} and more"#));
        let format = json!({"type": "json_schema", "json_schema": {"name": "t", "strict": true, "schema": schema()}});
        let mut answer = server
            .post(
                "/v1/chat/completions",
                chat(json!({"model": model, "response_format": format, "stream": stream})),
            )
            .await;
        let (content, reason) = if stream {
            let chunks = answer.json_events().await;
            (
                streamed_content(&chunks, 0),
                chunks.last().unwrap()["choices"][0]["finish_reason"].clone(),
            )
        } else {
            let choice = answer.json(200).await["choices"][0].take();
            (choice["message"]["content"].as_str().unwrap().to_owned(), choice["finish_reason"].clone())
        };
        let value: Value = serde_json::from_str(&content).unwrap_or_else(|error| panic!("{error}: {content}"));
        assert_eq!((value, reason), (json!({"n": 21, "unit": "C"}), json!("stop")), "{model} {stream}");
        assert!(server.engine.recorded().last().unwrap().has_constraint);
    }
}

#[tokio::test]
async fn an_unwilling_model_is_held_to_the_form() {
    let server = Server::new();
    server.engine.script_next(says(
        "I would rather chat about something else, if you don't mind, and for as long as I can.",
    ));
    let body = server
        .post("/v1/chat/completions", chat(json!({"regex": "(yes|no), [0-9]{3}"})))
        .await
        .json(200)
        .await;
    let content = body["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(
        ["yes, ", "no, "].iter().any(|start| content.starts_with(start)) && content.len() <= 8,
        "{content}"
    );
}

#[tokio::test]
async fn what_max_tokens_cuts_says_so() {
    let server = Server::new();
    server.engine.script_next(says(r#"{"n": 21, "unit": "C"}"#));
    let format = json!({"type": "json_object"});
    let body = server
        .post("/v1/chat/completions", chat(json!({"response_format": format, "max_tokens": 6})))
        .await
        .json(200)
        .await;
    let choice = &body["choices"][0];
    assert_eq!(
        (&choice["message"]["content"], &choice["finish_reason"]),
        (&json!("{\"n\": "), &json!("length"))
    );
}

#[tokio::test]
async fn every_route_takes_forms() {
    let server = Server::new();
    let script = || says(r#"{"n": 1, "unit": "F"}!!!"#);
    for extra in [
        json!({"json_schema": schema()}),
        json!({"json_schema": schema().to_string()}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": schema()}}}),
    ] {
        server.engine.script_next(script());
        let mut body = json!({"model": BASE, "prompt": "x", "max_tokens": 64});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let body = server.post("/v1/completions", body).await.json(200).await;
        assert_eq!(body["choices"][0]["text"], r#"{"n": 1, "unit": "F"}"#);
    }
    for params in [
        json!({"json_schema": schema().to_string()}),
        json!({"ebnf": "root ::= \"{\" [^}]* \"}\""}),
        json!({"regex": "\\{[^}]*\\}"}),
    ] {
        server.engine.script_next(script());
        let body = server
            .post("/generate", json!({"text": "x", "sampling_params": params}))
            .await
            .json(200)
            .await;
        assert_eq!(body["text"], r#"{"n": 1, "unit": "F"}"#);
        assert_eq!(body["meta_info"]["finish_reason"], json!({"type": "stop", "matched": null}));
    }
}

#[tokio::test]
async fn forms_that_cannot_be_are_refused() {
    let server = Server::new();
    for (extra, param) in [
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": {"type": "nonsense"}}}}),
            "response_format",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "t"}}}),
            "response_format.json_schema.schema",
        ),
        (json!({"regex": "("}), "regex"),
        (json!({"ebnf": "root ::= missing"}), "ebnf"),
        (json!({"regex": "a", "ebnf": "root ::= \"a\""}), "ebnf"),
        (json!({"response_format": {"type": "json_object"}, "regex": "a"}), "regex"),
        (json!({"regex": "a".repeat(300_000)}), "regex"),
    ] {
        let error = server.post("/v1/chat/completions", chat(extra.clone())).await.error(400).await;
        assert_eq!(error["param"], param, "{extra}: {error}");
    }
    let error = server
        .post("/v1/chat/completions", chat(json!({"response_format": {"type": "yaml"}})))
        .await
        .error(400)
        .await;
    assert!(error["param"].as_str().unwrap().starts_with("response_format"), "{error}");
    let error = server
        .post("/generate", json!({"text": "x", "sampling_params": {"regex": "("}}))
        .await
        .json(400)
        .await;
    assert_eq!(error["error"]["param"], "sampling_params.regex");
    assert!(server.engine.recorded().is_empty());
}
