//! Functions that the model may, must or must not call.

use std::sync::Arc;

use polylora::tool_calls::ToolFormat;
use polylora_engine::mock::MockEngineBuilder;
use serde_json::{Value, json};

use crate::common::{BASE, Server, prompt_processor, says, streamed_content};

fn tools() -> Value {
    let function =
        |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}});
    json!([
        function(
            "weather",
            json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": false})
        ),
        function(
            "time",
            json!({"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"], "additionalProperties": false})
        ),
    ])
}

/// Tools make long prompts.
fn roomy(engine: MockEngineBuilder) -> MockEngineBuilder {
    engine.describe(|description| description.context_length = 4096)
}

fn server() -> Server {
    Server::with(|engine| roomy(engine).reply(|_| says("Hello")), |_| {})
}

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "tools": tools()});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

const CALLS: &str = "Sure.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n\
    <tool_call>\n{\"name\": \"time\", \"arguments\": {\"zone\": \"CET\"}}\n</tool_call>";

fn expected() -> Value {
    json!([["weather", "{\"city\": \"Paris\"}"], ["time", "{\"zone\": \"CET\"}"]])
}

/// Names and arguments of a message's calls, after checking the rest of each.
fn calls(message: &Value) -> Value {
    let Some(calls) = message["tool_calls"].as_array() else {
        return Value::Null;
    };
    calls
        .iter()
        .map(|call| {
            assert_eq!(call["type"], "function");
            assert!(call["id"].as_str().unwrap().starts_with("call_"));
            json!([call["function"]["name"], call["function"]["arguments"]])
        })
        .collect()
}

/// The message that chunks add up to, as an SDK adds them.
fn added_up(chunks: &[Value]) -> Value {
    let mut calls: Vec<Value> = Vec::new();
    for delta in chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].as_array())
        .flatten()
    {
        let index = delta["index"].as_u64().unwrap() as usize;
        if index == calls.len() {
            calls.push(json!({"id": delta["id"], "type": delta["type"], "function": {"name": delta["function"]["name"], "arguments": ""}}));
        }
        let arguments = calls[index]["function"]["arguments"].as_str().unwrap().to_owned();
        calls[index]["function"]["arguments"] = json!(arguments + delta["function"]["arguments"].as_str().unwrap_or_default());
    }
    json!({"tool_calls": calls})
}

#[tokio::test]
async fn calls_are_read_whole_and_streamed() {
    let server = server();
    server.engine.script_next(says(CALLS));
    let body = server.post("/v1/chat/completions", chat(json!({}))).await.json(200).await;
    let choice = &body["choices"][0];
    assert_eq!(calls(&choice["message"]), expected());
    assert_eq!(
        (&choice["message"]["content"], &choice["finish_reason"]),
        (&json!("Sure."), &json!("tool_calls"))
    );

    server.engine.script_next(says(CALLS));
    let chunks = server
        .post("/v1/chat/completions", chat(json!({"stream": true})))
        .await
        .json_events()
        .await;
    assert_eq!(calls(&added_up(&chunks)), expected());
    assert_eq!(streamed_content(&chunks, 0), "Sure.");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    let deltas = chunks
        .iter()
        .filter(|chunk| chunk["choices"][0]["delta"]["tool_calls"].is_array())
        .count();
    assert!(deltas > 10, "arguments come as they are made, in {deltas} deltas");
}

#[tokio::test]
async fn the_model_is_told_of_the_tools() {
    let server = server();
    server.post("/v1/chat/completions", chat(json!({}))).await.json(200).await;
    server
        .post("/v1/chat/completions", chat(json!({"tool_choice": "none"})))
        .await
        .json(200)
        .await;
    let prompts: Vec<String> = server
        .engine
        .recorded()
        .iter()
        .map(|request| request.prompt_tokens[1..].iter().map(|&byte| byte as u8 as char).collect())
        .collect();
    assert!(prompts[0].contains("[tools [{\"type\": \"function\""), "{}", prompts[0]);
    assert!(!prompts[1].contains("weather"), "{}", prompts[1]);
}

#[tokio::test]
async fn a_required_call_is_enforced() {
    for (format, wanted) in [
        (
            ToolFormat::Hermes,
            "<tool_call>\n{\"name\": \"time\", \"arguments\": {\"zone\":\"CET\"}}\n</tool_call>",
        ),
        (ToolFormat::Llama3, "{\"name\": \"time\", \"parameters\": {\"zone\":\"CET\"}}"),
        (
            ToolFormat::Mistral,
            "[TOOL_CALLS][{\"name\": \"time\", \"arguments\": {\"zone\":\"CET\"}}]",
        ),
    ] {
        let server = Server::with(
            |engine| roomy(engine).reply(move |_| says(wanted)),
            |gateway| gateway.text.tool_format = format,
        );
        for choice in [json!("required"), json!({"type": "function", "function": {"name": "time"}})] {
            for stream in [false, true] {
                let body = chat(json!({"tool_choice": choice, "stream": stream}));
                let mut answer = server.post("/v1/chat/completions", body).await;
                let message = if stream {
                    added_up(&answer.json_events().await)
                } else {
                    answer.json(200).await["choices"][0]["message"].take()
                };
                assert_eq!(calls(&message), json!([["time", "{\"zone\":\"CET\"}"]]), "{format:?} {choice}");
                if !stream {
                    assert_eq!(message["content"], Value::Null);
                }
            }
        }
        // A model that wants something else can't have it.
        let server = Server::with(
            |engine| roomy(engine).reply(|_| says("No, I would rather talk about the weather and other things in a long sentence.")),
            |gateway| gateway.text.tool_format = format,
        );
        let named = json!({"tool_choice": {"type": "function", "function": {"name": "time"}}, "max_tokens": 300});
        let body = server.post("/v1/chat/completions", chat(named)).await.json(200).await;
        let called = calls(&body["choices"][0]["message"]);
        assert_eq!(called[0][0], "time", "{format:?} {body}");
        let arguments: Value = serde_json::from_str(called[0][1].as_str().unwrap()).unwrap();
        assert!(["UTC", "CET"].contains(&arguments["zone"].as_str().unwrap()), "{arguments}");
    }
}

/// The tools of [`tools`], strict.
fn strict_tools() -> Value {
    let mut tools = tools();
    tools
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .for_each(|tool| tool["function"]["strict"] = json!(true));
    tools
}

#[tokio::test]
async fn strict_functions_bind_the_arguments_and_leave_text_free() {
    for (format, text, call, plain) in [
        (
            ToolFormat::Hermes,
            "Sure. ",
            "<tool_call>\n{\"name\": \"time\", \"arguments\": {\"zone\": \"Mars\"}}\n</tool_call>",
            "No <tool, no {\"name\": \"time\"} call.",
        ),
        (
            ToolFormat::Mistral,
            "Sure. ",
            "[TOOL_CALLS][{\"name\": \"time\", \"arguments\": {\"zone\": \"Mars\"}}]",
            "No [TOOL, no call.",
        ),
        (
            ToolFormat::Mistral,
            "Sure. ",
            "[TOOL_CALLS]time[ARGS]{\"zone\": \"Mars\"}",
            "[1] is no call.",
        ),
        (
            ToolFormat::Llama3,
            "",
            "{\"name\": \"time\", \"parameters\": {\"zone\": \"Mars\"}}",
            "{\"name\": \"Ada\", \"is\": \"an answer\"}",
        ),
    ] {
        for stream in [false, true] {
            let wanted = format!("{text}{call}");
            let server = Server::with(
                |engine| roomy(engine).reply(move |_| says(&wanted)),
                |gateway| gateway.text.tool_format = format,
            );
            let ask = || {
                server.post(
                    "/v1/chat/completions",
                    chat(json!({"tools": strict_tools(), "stream": stream, "max_tokens": 200})),
                )
            };
            let (content, called) = if stream {
                let chunks = ask().await.json_events().await;
                (streamed_content(&chunks, 0), calls(&added_up(&chunks)))
            } else {
                let message = ask().await.json(200).await["choices"][0]["message"].take();
                (message["content"].as_str().unwrap_or_default().to_owned(), calls(&message))
            };
            assert_eq!(content, text.trim_end(), "{format:?}");
            assert_eq!(called[0][0], "time", "{format:?}: {called}");
            let arguments: Value = serde_json::from_str(called[0][1].as_str().unwrap()).unwrap();
            assert!(["UTC", "CET"].contains(&arguments["zone"].as_str().unwrap()), "{format:?}: {arguments}");

            server.engine.script_next(says(plain));
            let answer = if stream {
                streamed_content(&ask().await.json_events().await, 0)
            } else {
                let body = ask().await.json(200).await;
                assert_eq!(body["choices"][0]["finish_reason"], "stop");
                body["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
            };
            assert_eq!(answer, plain, "{format:?}");
        }
    }
}

#[tokio::test]
async fn functions_that_are_not_strict_keep_their_freedom_beside_strict_ones() {
    let server = server();
    let mut tools = tools();
    tools[0]["function"]["strict"] = json!(true);
    server.engine.script_next(says(
        "<tool_call>\n{\"name\": \"time\", \"arguments\": {\"zone\": \"Mars\"}}\n</tool_call>",
    ));
    let body = server.post("/v1/chat/completions", chat(json!({"tools": tools}))).await.json(200).await;
    assert_eq!(calls(&body["choices"][0]["message"]), json!([["time", "{\"zone\": \"Mars\"}"]]));
}

#[tokio::test]
async fn one_call_at_most_if_so_asked() {
    let server = server();
    for choice in ["auto", "required"] {
        server.engine.script_next(says(CALLS.strip_prefix("Sure.\n").unwrap()));
        let body = chat(json!({"parallel_tool_calls": false, "tool_choice": choice}));
        let body = server.post("/v1/chat/completions", body).await.json(200).await;
        assert_eq!(calls(&body["choices"][0]["message"]).as_array().unwrap().len(), 1, "{choice}");
    }
}

#[tokio::test]
async fn a_function_chosen_by_name_is_called_once_even_if_it_is_the_only_one() {
    let server = server();
    let call = "<tool_call>\n{\"name\": \"time\", \"arguments\": {\"zone\":\"CET\"}}\n</tool_call>";
    server.engine.script_next(says(&format!("{call}\n{call}")));
    let mut body = chat(json!({"tool_choice": {"type": "function", "function": {"name": "time"}}}));
    body["tools"].as_array_mut().unwrap().retain(|tool| tool["function"]["name"] == "time");
    assert_eq!(body["tools"].as_array().unwrap().len(), 1);
    let body = server.post("/v1/chat/completions", body).await.json(200).await;
    assert_eq!(calls(&body["choices"][0]["message"]).as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn calls_and_results_go_back_to_the_model() {
    let server = server();
    let messages = json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "time", "arguments": "{\"zone\": \"UTC\"}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]);
    server
        .post("/v1/chat/completions", chat(json!({"messages": messages})))
        .await
        .json(200)
        .await;
    let prompt: String = server.engine.recorded()[0].prompt_tokens[1..]
        .iter()
        .map(|&byte| byte as u8 as char)
        .collect();
    assert!(
        prompt.contains("\"arguments\": {\"zone\": \"UTC\"}") && prompt.contains("<tool>noon;"),
        "{prompt}"
    );
}

#[tokio::test]
async fn a_schema_and_tools_leave_the_model_the_choice() {
    let server = server();
    let format = json!({"type": "json_schema", "json_schema": {"name": "t", "schema": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}}});
    server.engine.script_next(says("{\"ok\": true}"));
    let body = server
        .post("/v1/chat/completions", chat(json!({"response_format": format})))
        .await
        .json(200)
        .await;
    assert_eq!(body["choices"][0]["message"]["content"], "{\"ok\": true}");
    server.engine.script_next(says(CALLS.strip_prefix("Sure.\n").unwrap()));
    let body = server
        .post("/v1/chat/completions", chat(json!({"response_format": format})))
        .await
        .json(200)
        .await;
    assert_eq!(calls(&body["choices"][0]["message"]), expected());
}

#[tokio::test]
async fn wrong_tools_are_refused_by_the_field_s_name() {
    let server = server();
    let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
    for (extra, param) in [
        (json!({"tools": [tool("a b")]}), "tools[0].function.name"),
        (json!({"tools": [tool("a"), tool("a")]}), "tools[1].function.name"),
        (json!({"tools": [{"type": "custom", "function": {"name": "a"}}]}), "tools[0].type"),
        (json!({"tools": null, "tool_choice": "required"}), "tool_choice"),
        (
            json!({"tools": null, "tool_choice": {"type": "function", "function": {"name": "a"}}}),
            "tool_choice",
        ),
        (json!({"tool_choice": {"type": "function", "function": {"name": "nope"}}}), "tool_choice"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "nonsense"}}}], "tool_choice": "required"}),
            "tools",
        ),
    ] {
        let error = server.post("/v1/chat/completions", chat(extra.clone())).await.error(400).await;
        assert_eq!(error["param"], param, "{extra}: {error}");
    }
    server
        .post("/v1/chat/completions", chat(json!({"tools": [], "tool_choice": "auto"})))
        .await
        .json(200)
        .await;
}

#[tokio::test]
async fn thoughts_are_split_off() {
    let server = Server::with(
        |engine| engine.reply(|_| says("<think>\nWell…\n</think>\n\nYes.")),
        |gateway| {
            gateway.text.prompt = Arc::new(prompt_processor("{# <think> #}{{ messages[0].content }}"));
        },
    );
    let ask = |extra: Value| {
        let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.post("/v1/chat/completions", body)
    };
    let body = ask(json!({})).await.json(200).await;
    let message = &body["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("Well…"), &json!("Yes.")));
    assert!(
        body["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 5,
        "{body}"
    );
    let chunks = ask(json!({"stream": true})).await.json_events().await;
    let thoughts: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["reasoning_content"].as_str())
        .collect();
    assert_eq!((thoughts.as_str(), streamed_content(&chunks, 0).as_str()), ("Well…", "Yes."));
    // In one piece, although the thoughts come token by token.
    let chunks = ask(json!({"stream": true, "stream_reasoning": false})).await.json_events().await;
    let pieces: Vec<&Value> = chunks
        .iter()
        .flat_map(|chunk| ["reasoning_content", "content"].map(|key| &chunk["choices"][0]["delta"][key]))
        .filter(|piece| piece.as_str().is_some_and(|piece| !piece.is_empty()))
        .collect();
    assert_eq!((pieces[0], pieces.len() > 2), (&json!("Well…"), true), "{pieces:?}");
    assert_eq!(streamed_content(&chunks, 0), "Yes.");
    // Not at all; what it cost is said.
    for separate in [true, false] {
        let left_out = json!({"include_reasoning": false, "separate_reasoning": separate});
        let body = ask(left_out).await.json(200).await;
        let message = &body["choices"][0]["message"];
        assert_eq!(
            (&message["content"], message.get("reasoning_content").and_then(Value::as_str)),
            (&json!("Yes."), None),
            "{body}"
        );
        assert!(
            body["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 5,
            "{body}"
        );
    }
    let text = ask(json!({"stream": true, "include_reasoning": false})).await.text().await;
    assert!(
        text.contains("Y") && !text.contains("reasoning_content\":\"") && !text.contains("Well"),
        "{text}"
    );
    let refused = ask(json!({"include_reasoning": false, "logprobs": true})).await.error(400).await;
    assert_eq!(refused["param"], "include_reasoning");
    let body = ask(json!({"separate_reasoning": false})).await.json(200).await;
    assert_eq!(body["choices"][0]["message"]["content"], "<think>\nWell…\n</think>\n\nYes.");
}

#[tokio::test]
async fn a_form_binds_what_follows_the_thoughts() {
    let format = json!({"type": "json_schema", "json_schema": {"name": "t", "schema": {"type": "object",
        "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false}}});
    let unwilling = "<think>\nWell, {no} form here…\n</think>\n\n{\"ok\": maybe}";
    for (template, output) in [
        ("{# <think> #}{{ messages[0].content }}", unwilling),
        // The template opens the thoughts.
        ("{{ messages[0].content }}<think>\n", unwilling.strip_prefix("<think>\n").unwrap()),
    ] {
        for (extra, reasons) in [
            (json!({"response_format": format}), true),
            (json!({"regex": "\\{\"ok\": (true|false)\\}"}), true),
            (json!({"ebnf": "root ::= \"{\\\"ok\\\": \" (\"true\" | \"false\") \"}\""}), true),
            (json!({"response_format": format, "separate_reasoning": false}), false),
        ] {
            for stream in [false, true] {
                let server = Server::with(
                    |engine| roomy(engine).reply(move |_| says(output)),
                    |gateway| gateway.text.prompt = Arc::new(prompt_processor(template)),
                );
                let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "stream": stream, "max_tokens": 300});
                body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
                let mut answer = server.post("/v1/chat/completions", body).await;
                let (thoughts, content) = if stream {
                    let chunks = answer.json_events().await;
                    let thoughts = chunks
                        .iter()
                        .filter_map(|chunk| chunk["choices"][0]["delta"]["reasoning_content"].as_str());
                    (thoughts.collect(), streamed_content(&chunks, 0))
                } else {
                    let message = answer.json(200).await["choices"][0]["message"].take();
                    let text = |key: &str| message[key].as_str().unwrap_or_default().to_owned();
                    (text("reasoning_content"), text("content"))
                };
                let expected = if reasons { "Well, {no} form here…" } else { "" };
                assert_eq!(thoughts, expected, "{template} {extra} {content}");
                let content: Value = serde_json::from_str(&content).unwrap_or_else(|error| panic!("{error}: {content} {extra}"));
                assert!(content["ok"].is_boolean(), "{content}");
            }
        }
    }
}

#[tokio::test]
async fn a_required_call_may_follow_thoughts() {
    let output = "<think>\nWhich?\n</think>\n\nNone.";
    let server = Server::with(
        |engine| roomy(engine).reply(move |_| says(output)),
        |gateway| gateway.text.prompt = Arc::new(prompt_processor("{# <think> #}{{ tools | tojson }}{{ messages[0].content }}")),
    );
    let named = json!({"tool_choice": {"type": "function", "function": {"name": "time"}}, "max_tokens": 300});
    let message = server.post("/v1/chat/completions", chat(named)).await.json(200).await["choices"][0]["message"].take();
    assert_eq!(message["reasoning_content"], "Which?");
    assert_eq!(calls(&message)[0][0], "time", "{message}");
}
