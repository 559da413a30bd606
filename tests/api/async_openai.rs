//! The `async-openai` crate, unchanged, over a socket, against a mock engine whose outputs are scripted. (`tests/async_openai.rs` has it
//! against the real server.)

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use async_openai::{
    Client,
    config::OpenAIConfig,
    error::{ApiErrorResponse, OpenAIError},
    middleware::{HttpRequestFactory, retry::SimpleRetryPolicy},
    types::{
        chat::{ChatCompletionMessageToolCalls, CreateChatCompletionRequest, FinishReason},
        completions::CreateCompletionRequest,
    },
};
use futures::StreamExt;
use polylora::auth::{Auth, KeyEntry, Role};
use polylora_engine::{
    SubmitError,
    mock::{Gate, Script, Step},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::common::{BASE, Server, says, tokens};

async fn client(server: &Server) -> Client<OpenAIConfig> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let router = server.router.clone();
    tokio::spawn(async move { axum::serve(listener, router).await });
    Client::with_config(OpenAIConfig::new().with_api_base(url).with_api_key("ann-key"))
}

/// A request in the crate's own types: a field that they don't know would be lost, and the test with it.
fn chat(extra: Value) -> CreateChatCompletionRequest {
    let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    serde_json::from_value(body).unwrap()
}

fn completion(extra: Value) -> CreateCompletionRequest {
    let mut body = json!({"model": BASE, "prompt": "Hi"});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    serde_json::from_value(body).unwrap()
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "time", "description": "What time it is.", "strict": true, "parameters": {
        "type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"], "additionalProperties": false}}}])
}

fn refused(error: OpenAIError) -> ApiErrorResponse {
    match error {
        OpenAIError::ApiError(error) => error,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn adapters_are_models_by_name_and_below_the_base() {
    let server = Server::new();
    let client = client(&server).await;
    let ids: Vec<String> = client.models().list().await.unwrap().data.into_iter().map(|model| model.id).collect();
    assert!(ids.iter().any(|id| id == BASE) && ids.iter().any(|id| id == "sql"), "{ids:?}");
    for (model, adapter) in [("sql", Some("sql")), ("demo:sql", Some("sql")), (BASE, None)] {
        let answer = client.chat().create(chat(json!({"model": model}))).await.unwrap();
        assert_eq!(answer.choices[0].message.content.as_deref(), Some("Hello"));
        assert_eq!(answer.model, model);
        let answer = client.completions().create(completion(json!({"model": model}))).await.unwrap();
        assert_eq!(answer.choices[0].text, "Hello");
        for recorded in &server.engine.recorded()[server.engine.recorded().len() - 2..] {
            assert_eq!(recorded.adapter.as_ref().map(|(name, _)| &**name), adapter);
        }
    }
}

#[tokio::test]
async fn chat_and_completions_stream() {
    let server = Server::new();
    let client = client(&server).await;
    let mut stream = client
        .chat()
        .create_stream(chat(json!({"stream": true, "stream_options": {"include_usage": true}})))
        .await
        .unwrap();
    let (mut text, mut usage) = (String::new(), None);
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.unwrap();
        text.extend(chunk.choices.iter().filter_map(|choice| choice.delta.content.as_deref()));
        usage = chunk.usage.or(usage);
    }
    // The token that ends it is counted, too.
    assert_eq!((text.as_str(), usage.unwrap().completion_tokens), ("Hello", 6));

    let mut stream = client.completions().create_stream(completion(json!({"stream": true}))).await.unwrap();
    let mut text = String::new();
    while let Some(chunk) = stream.next().await {
        text.extend(chunk.unwrap().choices.into_iter().map(|choice| choice.text));
    }
    assert_eq!(text, "Hello");
}

#[tokio::test]
async fn tools_are_called_whole_and_streamed() {
    let server = Server::with(|engine| engine.describe(|description| description.context_length = 4096), |_| {});
    let client = client(&server).await;
    let script = || says("Sure. <tool_call>\n{\"name\": \"time\", \"arguments\": {\"zone\":\"CET\"}}\n</tool_call>");
    server.engine.script_next(script());
    let answer = client.chat().create(chat(json!({"tools": tools()}))).await.unwrap();
    let choice = &answer.choices[0];
    assert_eq!(choice.finish_reason, Some(FinishReason::ToolCalls));
    assert_eq!(choice.message.content.as_deref(), Some("Sure."));
    let calls = choice.message.tool_calls.as_ref().unwrap();
    let [ChatCompletionMessageToolCalls::Function(call)] = &calls[..] else {
        panic!("{calls:?}")
    };
    assert_eq!(
        (call.function.name.as_str(), call.function.arguments.as_str()),
        ("time", "{\"zone\":\"CET\"}")
    );

    server.engine.script_next(script());
    let mut stream = client
        .chat()
        .create_stream(chat(json!({"tools": tools(), "stream": true})))
        .await
        .unwrap();
    let (mut ids, mut names, mut arguments, mut reasons) = (vec![], vec![], String::new(), vec![]);
    while let Some(chunk) = stream.next().await {
        for choice in chunk.unwrap().choices {
            reasons.extend(choice.finish_reason);
            for call in choice.delta.tool_calls.into_iter().flatten() {
                assert_eq!(call.index, 0);
                ids.extend(call.id);
                let function = call.function.unwrap();
                names.extend(function.name);
                arguments.extend(function.arguments);
            }
        }
    }
    assert_eq!((ids.len(), names, arguments.as_str()), (1, vec!["time".to_owned()], "{\"zone\":\"CET\"}"));
    assert_eq!(reasons, [FinishReason::ToolCalls]);

    // The result goes back, in the crate's own messages.
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": call.id, "content": "noon"}]);
    server.engine.script_next(says("Noon."));
    let answer = client.chat().create(chat(json!({"tools": tools(), "messages": messages}))).await.unwrap();
    assert_eq!(answer.choices[0].message.content.as_deref(), Some("Noon."));

    server.engine.script_next(says("I would rather not."));
    let named = json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "time"}}, "max_completion_tokens": 200});
    let answer = client.chat().create(chat(named)).await.unwrap();
    assert_eq!(answer.choices[0].message.tool_calls.as_ref().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_schema_is_followed() {
    let server = Server::new();
    let client = client(&server).await;
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "t", "strict": true, "schema": schema}});
    server.engine.script_next(says("{\"n\": 21} and more"));
    let answer = client.chat().create(chat(json!({"response_format": format}))).await.unwrap();
    #[derive(serde::Deserialize)]
    struct Parsed {
        n: i64,
    }
    let parsed: Parsed = serde_json::from_str(answer.choices[0].message.content.as_deref().unwrap()).unwrap();
    assert_eq!(parsed.n, 21);
}

#[tokio::test]
async fn logprobs_n_and_stop() {
    let server = Server::new();
    let client = client(&server).await;
    let request = chat(json!({"logprobs": true, "top_logprobs": 2, "n": 2, "stop": ["lo"]}));
    let answer = client.chat().create(request).await.unwrap();
    assert_eq!(answer.choices.len(), 2);
    for choice in &answer.choices {
        assert_eq!(choice.message.content.as_deref(), Some("Hel"));
        assert_eq!(choice.finish_reason, Some(FinishReason::Stop));
        let logprobs = choice.logprobs.as_ref().unwrap().content.as_ref().unwrap();
        assert_eq!(logprobs[0].token, "H");
        assert!(logprobs.iter().all(|token| token.top_logprobs.len() == 2 && token.logprob <= 0.0));
    }
    let answer = client
        .completions()
        .create(completion(json!({"logprobs": 1, "echo": true})))
        .await
        .unwrap();
    assert_eq!(answer.choices[0].text, "HiHello");
    let logprobs = answer.choices[0].logprobs.as_ref().unwrap();
    assert_eq!(logprobs.tokens.len(), logprobs.token_logprobs.len());
}

#[tokio::test]
async fn errors_are_the_crate_s_own() {
    let server = Server::with(
        |engine| engine.reply(|_| says("Hello")),
        |gateway| gateway.auth = Auth::new(Some("ann-key"), None, Vec::new()),
    );
    let client = client(&server).await;
    for (request, status, code, param) in [
        (json!({"model": "nope"}), 404, Some("model_not_found"), Some("model")),
        (json!({"top_logprobs": 3}), 400, None, Some("top_logprobs")),
        (
            json!({"max_completion_tokens": 100_000}),
            400,
            Some("context_length_exceeded"),
            Some("max_completion_tokens"),
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": {"type": "nonsense"}}}}),
            400,
            Some("invalid_grammar"),
            Some("response_format"),
        ),
    ] {
        let error = refused(client.chat().create(chat(request.clone())).await.unwrap_err());
        assert_eq!(error.status_code.as_u16(), status, "{request}");
        assert_eq!(
            (error.api_error.code.as_deref(), error.api_error.param.as_deref()),
            (code, param),
            "{request}"
        );
        assert!(!error.api_error.message.is_empty());
    }
    // A full queue is a 503 with Retry-After, which the crate waits for by itself.
    server.engine.fail_next_submit(SubmitError::QueueFull { waiting: 3, limit: 3 });
    let answer = client.chat().create(chat(json!({}))).await.unwrap();
    assert_eq!(answer.choices[0].message.content.as_deref(), Some("Hello"));

    let stranger = Client::with_config(client.config().clone().with_api_key("eve"));
    let error = refused(stranger.models().list().await.unwrap_err());
    assert_eq!(
        (error.status_code.as_u16(), error.api_error.code.as_deref()),
        (401, Some("invalid_api_key"))
    );
}

/// A key that may ask one thing at a time is answered 429 with Retry-After; the crate waits so long and asks again.
#[tokio::test]
async fn a_limit_is_waited_for_and_asked_again() {
    let ann = KeyEntry {
        name: "ann".into(),
        sha256: Sha256::digest("ann-key").iter().map(|byte| format!("{byte:02x}")).collect(),
        role: Role::User,
        adapters: None,
        base_model: true,
        requests_per_minute: None,
        tokens_per_minute: None,
        concurrent_requests: Some(1),
    };
    let server = Server::with(
        |engine| engine.reply(|_| says("Hello")),
        |gateway| gateway.auth = Auth::new(None, None, vec![ann]),
    );
    let client = client(&server).await;
    server.engine.script_next(Script::tokens(tokens("a")).then(Step::Wait(Gate::new())));
    let held = client.chat().create_stream(chat(json!({"stream": true}))).await.unwrap();
    let held = Arc::new(Mutex::new(Some(held)));

    let refusals = Arc::new(AtomicUsize::new(0));
    let http = {
        let (refusals, held, engine) = (Arc::clone(&refusals), Arc::clone(&held), Arc::clone(&server.engine));
        tower::service_fn(move |request: HttpRequestFactory| {
            let (refusals, held, engine) = (Arc::clone(&refusals), Arc::clone(&held), Arc::clone(&engine));
            async move {
                let response = reqwest::Client::new().execute(request.build().await?).await?;
                if response.status() == 429 {
                    assert!(response.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
                    refusals.fetch_add(1, SeqCst);
                    // What was in the way goes away while the crate waits.
                    held.lock().unwrap().take();
                    while engine.live_requests() > 0 {
                        tokio::task::yield_now().await;
                    }
                }
                Ok::<_, OpenAIError>(response)
            }
        })
    };
    let patient = client
        .clone()
        .with_http_service(tower::ServiceBuilder::new().retry(SimpleRetryPolicy::default()).service(http));
    let answer = patient.chat().create(chat(json!({}))).await.unwrap();
    assert_eq!(answer.choices[0].message.content.as_deref(), Some("Hello"));
    assert_eq!(refusals.load(SeqCst), 1);
}

#[tokio::test]
async fn a_stream_that_is_dropped_frees_the_sequence_and_the_adapter() {
    let server = Server::new();
    let client = client(&server).await;
    server.engine.script_next(Script::tokens(tokens("Hel")).then(Step::Wait(Gate::new())));
    let mut stream = client.chat().create_stream(chat(json!({"model": "sql", "stream": true}))).await.unwrap();
    let mut text = String::new();
    while text != "Hel" {
        let chunk = stream.next().await.unwrap().unwrap();
        text.extend(chunk.choices.iter().filter_map(|choice| choice.delta.content.as_deref()));
    }
    assert_eq!((server.engine.live_requests(), server.engine.leases("sql")), (1, 1));
    drop(stream);
    while server.engine.live_requests() > 0 || server.engine.leases("sql") > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_engine_that_fails_in_mid_stream_is_an_error_of_the_stream() {
    let server = Server::new();
    let client = client(&server).await;
    let failed = Step::Fail(polylora_engine::RequestError::Engine("the device is gone".into()));
    server.engine.script_next(Script::tokens(tokens("Hel")).then(failed));
    let mut stream = client.chat().create_stream(chat(json!({"stream": true}))).await.unwrap();
    let mut outcomes = Vec::new();
    while let Some(chunk) = stream.next().await {
        outcomes.push(chunk.map(|chunk| chunk.choices[0].finish_reason));
    }
    let error = outcomes.pop().unwrap();
    assert!(error.is_err(), "{error:?}");
    assert!(
        outcomes.iter().all(|chunk| matches!(chunk, Ok(None))),
        "no finish_reason that did not happen: {outcomes:?}"
    );
}
