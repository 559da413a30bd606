//! The `async-openai` crate, unchanged, against the running server.

mod process;

use async_openai::{
    Client,
    config::OpenAIConfig,
    error::OpenAIError,
    types::{
        chat::{
            ChatCompletionRequestMessage, ChatCompletionRequestUserMessage, CreateChatCompletionRequest, CreateChatCompletionRequestArgs,
            FinishReason,
        },
        completions::CreateCompletionRequestArgs,
    },
};
use futures::StreamExt;
use process::{LIST_3, Server, golden, golden_chat};

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
