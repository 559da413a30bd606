//! The `async-openai` crate, unchanged, against the running server: what takes a real model to see. Its answers are the golden ones, whole and
//! streamed, under each adapter; and it is bound to functions and schemas that it would not keep to of itself. (`tests/api/async_openai.rs` has
//! the crate's whole use, over a scripted engine.)

mod process;

use async_openai::{
    Client,
    config::OpenAIConfig,
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
async fn functions_bind_the_model_streamed_and_not() {
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
async fn a_schema_binds_the_model() {
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
    server.stop();
}
