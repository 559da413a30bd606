//! The `async-openai` crate, unchanged, against the running server.

mod process;

use async_openai::{
    Client,
    config::OpenAIConfig,
    error::OpenAIError,
    types::{
        chat::{
            ChatCompletionMessageToolCalls, ChatCompletionNamedToolChoice, ChatCompletionRequestMessage, ChatCompletionRequestUserMessage,
            ChatCompletionTool, ChatCompletionToolChoiceOption, ChatCompletionTools, CreateChatCompletionRequest, CreateChatCompletionRequestArgs,
            FinishReason, FunctionName, FunctionObject, ResponseFormat, ResponseFormatJsonSchema,
        },
        completions::CreateCompletionRequestArgs,
    },
};
use futures::StreamExt;
use process::{LIST_3, Server, golden, golden_chat};
use serde_json::{Value, json};

fn client(server: &Server) -> Client<OpenAIConfig> {
    Client::with_config(OpenAIConfig::new().with_api_base(format!("{}/v1", server.url)).with_api_key("none"))
}

fn chat(model: &str) -> CreateChatCompletionRequestArgs {
    let message = ChatCompletionRequestMessage::from(ChatCompletionRequestUserMessage::from(LIST_3));
    let mut request = CreateChatCompletionRequestArgs::default();
    request.model(model).messages([message]).temperature(0.0);
    request
}

fn built(request: &CreateChatCompletionRequestArgs) -> CreateChatCompletionRequest {
    request.build().unwrap()
}

#[tokio::test]
async fn chat_and_completions_answer_as_the_golden_files_say() {
    let server = Server::start(&[]);
    let client = client(&server);
    for (model, adapter) in [("demo:json", Some("json")), ("table", Some("table")), ("demo", None)] {
        let answer = client.chat().create(built(&chat(model))).await.unwrap();
        let expected = golden_chat(adapter, LIST_3);
        assert_eq!(answer.choices[0].message.content.as_deref(), expected["output_text"].as_str());
        assert_eq!(answer.choices[0].finish_reason, Some(FinishReason::Stop));
        let usage = answer.usage.unwrap();
        assert_eq!(usage.prompt_tokens as usize, expected["prompt_ids"].as_array().unwrap().len());
        assert_eq!(usage.completion_tokens as usize, expected["output_ids"].as_array().unwrap().len());

        let mut request = CreateCompletionRequestArgs::default();
        let request = request.model(model).prompt(LIST_3).max_tokens(128u32).temperature(0.0).build().unwrap();
        let answer = client.completions().create(request).await.unwrap();
        assert_eq!(answer.choices[0].text, golden(adapter, LIST_3)["output_text"].as_str().unwrap());
    }
    server.stop();
}

#[tokio::test]
async fn streams_add_up_to_the_same_text() {
    let server = Server::start(&[]);
    let mut stream = client(&server).chat().create_stream(built(chat("demo:json").stream(true))).await.unwrap();
    let (mut text, mut reasons) = (String::new(), Vec::new());
    while let Some(chunk) = stream.next().await {
        for choice in chunk.unwrap().choices {
            text += choice.delta.content.as_deref().unwrap_or_default();
            reasons.extend(choice.finish_reason);
        }
    }
    assert_eq!(text, golden_chat(Some("json"), LIST_3)["output_text"].as_str().unwrap());
    assert_eq!(reasons, [FinishReason::Stop]);
    server.stop();
}

#[tokio::test]
async fn models_are_listed_and_unknown_ones_are_the_sdks_error() {
    let server = Server::start(&[]);
    let client = client(&server);
    let models = client.models().list().await.unwrap();
    let ids: Vec<_> = models.data.iter().map(|model| model.id.as_str()).collect();
    assert_eq!(ids[0], "demo");
    assert!(ids.contains(&"json"), "{ids:?}");
    assert_eq!(client.models().retrieve("json").await.unwrap().id, "json");

    let error = client.chat().create(built(&chat("demo:nope"))).await.unwrap_err();
    let OpenAIError::ApiError(error) = error else { panic!("{error}") };
    assert_eq!(error.status_code.as_u16(), 404);
    assert_eq!(error.api_error.code.as_deref(), Some("model_not_found"));
    assert_eq!(error.api_error.param.as_deref(), Some("model"));
    assert!(error.api_error.message.contains("demo:json"), "{}", error.api_error.message);
    server.stop();
}

fn capital_of() -> ChatCompletionTools {
    let parameters = json!({"type": "object", "properties": {"country": {"type": "string", "enum": ["France", "Peru"]}}, "required": ["country"]});
    ChatCompletionTools::Function(ChatCompletionTool {
        function: FunctionObject {
            name: "capital_of".into(),
            parameters: Some(parameters),
            ..FunctionObject::default()
        },
    })
}

fn by_name() -> ChatCompletionToolChoiceOption {
    let function = FunctionName { name: "capital_of".into() };
    ChatCompletionToolChoiceOption::Function(ChatCompletionNamedToolChoice { function })
}

#[tokio::test]
async fn functions_are_called_streamed_and_not() {
    let server = Server::start(&[]);
    let client = client(&server);
    let request = |stream: bool| {
        let mut request = chat("demo:json");
        built(request.tools(vec![capital_of()]).tool_choice(by_name()).stream(stream))
    };
    let answer = client.chat().create(request(false)).await.unwrap();
    assert_eq!(answer.choices[0].finish_reason, Some(FinishReason::ToolCalls));
    let calls = answer.choices[0].message.tool_calls.clone().unwrap();
    let [ChatCompletionMessageToolCalls::Function(call)] = &calls[..] else {
        panic!("{calls:?}")
    };
    assert_eq!(call.function.name, "capital_of");
    let arguments: Value = serde_json::from_str(&call.function.arguments).unwrap();
    assert!(["France", "Peru"].contains(&arguments["country"].as_str().unwrap()), "{arguments}");

    let mut stream = client.chat().create_stream(request(true)).await.unwrap();
    let mut streamed = String::new();
    while let Some(chunk) = stream.next().await {
        let calls = chunk.unwrap().choices.into_iter().filter_map(|choice| choice.delta.tool_calls).flatten();
        streamed.extend(calls.filter_map(|call| call.function?.arguments));
    }
    assert_eq!(streamed, call.function.arguments);
    server.stop();
}

#[tokio::test]
async fn schema_logprobs_n_and_stop() {
    let server = Server::start(&[]);
    let client = client(&server);
    let schema = json!({"type": "object", "properties": {"large": {"type": "boolean"}}, "required": ["large"], "additionalProperties": false});
    let json_schema = ResponseFormatJsonSchema {
        name: "capital".into(),
        schema,
        description: None,
        strict: Some(true),
    };
    let mut request = chat("table");
    let request = built(request.response_format(ResponseFormat::JsonSchema { json_schema }));
    let answer = client.chat().create(request).await.unwrap();
    let parsed: Value = serde_json::from_str(answer.choices[0].message.content.as_deref().unwrap()).unwrap();
    assert!(parsed["large"].is_boolean(), "{parsed}");

    let mut request = chat("demo:json");
    let answer = client
        .chat()
        .create(built(request.logprobs(true).top_logprobs(3).n(2).stop("France")))
        .await
        .unwrap();
    let whole = golden_chat(Some("json"), LIST_3)["output_text"].as_str().unwrap().to_owned();
    assert_eq!(answer.choices.len(), 2);
    for choice in &answer.choices {
        assert_eq!(choice.message.content.as_deref(), whole.split("France").next());
        let logprobs = choice.logprobs.as_ref().unwrap().content.as_ref().unwrap();
        assert!(
            logprobs
                .iter()
                .all(|position| position.top_logprobs.len() == 3 && position.logprob <= 0.0)
        );
    }
    server.stop();
}

#[tokio::test]
async fn a_dropped_stream_ends_its_sequence() {
    let server = Server::start(&[]);
    let mut request = chat("demo:yaml");
    let mut body = serde_json::to_value(built(request.stream(true).max_completion_tokens(1900u32))).unwrap();
    body["ignore_eos"] = true.into();
    let mut stream = client(&server).chat().create_stream_byot::<_, Value>(body).await.unwrap();
    stream.next().await.unwrap().unwrap();
    let running = || server.get("/v1/loads").1["aggregate"]["total_reqs"].as_u64().unwrap();
    assert_eq!(running(), 1);
    drop(stream);
    // Ends when the server has seen that the connection is closed; the test's own time limit is that of the whole run.
    while running() > 0 {
        tokio::task::yield_now().await;
    }
    assert!(server.get("/v1/models/yaml").1["adapter"]["leases"] == 0);
    server.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_crate_tries_again_after_429() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    let sha256 = polylora::auth::sha256_hex("one");
    let entry = format!("[[keys]]\nname = \"one\"\nsha256 = \"{sha256}\"\nconcurrent_requests = 1\n");
    std::fs::write(keys.path(), entry).unwrap();
    let server = Server::start(&["--api-keys-file", keys.path().to_str().unwrap()]);
    let config = OpenAIConfig::new().with_api_base(format!("{}/v1", server.url)).with_api_key("one");
    let client = Client::with_config(config);
    let mut request = chat("demo:yaml");
    let mut body = serde_json::to_value(built(request.stream(true).max_completion_tokens(1900u32))).unwrap();
    body["ignore_eos"] = true.into();
    let mut stream = client.chat().create_stream_byot::<_, Value>(body).await.unwrap();
    stream.next().await.unwrap().unwrap();

    // The stream has the key's only place until the second request has been refused once.
    let second = tokio::spawn(async move { client.chat().create(built(&chat("demo:json"))).await });
    while !server.get("/metrics").1.as_str().unwrap().contains(r#"status="429""#) {
        tokio::task::yield_now().await;
    }
    drop(stream);
    let answer = second.await.unwrap().unwrap();
    assert_eq!(
        answer.choices[0].message.content.as_deref(),
        golden_chat(Some("json"), LIST_3)["output_text"].as_str()
    );
    server.stop();
}
