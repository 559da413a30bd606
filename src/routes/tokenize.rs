//! `POST /tokenize` and `POST /detokenize`, as vLLM and SGLang have them.

use axum::{Json, extract::State};

use super::chat_completions::template_text;
use crate::{
    app::{AppState, Caller},
    error::ApiError,
    extract::ApiJson,
    protocol::tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse},
};

/// `POST /tokenize`: the token ids of a text, or of a conversation as the chat template writes it.
#[utoipa::path(
    post, path = "/tokenize", tag = "Native", request_body = TokenizeRequest,
    responses((status = 200, description = "The token ids.", body = TokenizeResponse), crate::openapi::BodyErrors),
)]
pub async fn tokenize(
    State(state): State<AppState>,
    caller: Caller,
    ApiJson(request): ApiJson<TokenizeRequest>,
) -> Result<Json<TokenizeResponse>, ApiError> {
    if let Some(model) = &request.model {
        state.router(&caller.identity).target(model, None)?;
    }
    let (text, add_special_tokens) = match (request.prompt.or(request.text), request.messages) {
        (Some(prompt), None) => (prompt, request.add_special_tokens.unwrap_or(true)),
        (None, Some(messages)) => {
            let text = template_text(
                &state,
                &messages,
                request.add_generation_prompt.unwrap_or(true),
                request.chat_template_kwargs.as_ref(),
            )?;
            (text, request.add_special_tokens.unwrap_or(false))
        }
        _ => return Err(ApiError::invalid("prompt", "Give exactly one of prompt and messages.")),
    };
    let tokens = state.prompt.encode(text, add_special_tokens).await?;
    let tokenizer = state.prompt.tokenizer();
    let token_strs = request.return_token_strs.unwrap_or(false).then(|| {
        let spelled = tokens.iter().map(|&id| tokenizer.id_to_token(id).unwrap_or_default());
        spelled.collect()
    });
    Ok(Json(TokenizeResponse {
        count: tokens.len(),
        max_model_len: state.engine.describe().context_length,
        tokens,
        token_strs,
    }))
}

/// `POST /detokenize`: the text of token ids.
#[utoipa::path(
    post, path = "/detokenize", tag = "Native", request_body = DetokenizeRequest,
    responses((status = 200, description = "The text.", body = DetokenizeResponse), crate::openapi::BodyErrors),
)]
pub async fn detokenize(
    State(state): State<AppState>,
    caller: Caller,
    ApiJson(request): ApiJson<DetokenizeRequest>,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    if let Some(model) = &request.model {
        state.router(&caller.identity).target(model, None)?;
    }
    let tokenizer = state.prompt.tokenizer();
    if let Some(&bad) = request.tokens.iter().find(|&&token| token as usize >= tokenizer.vocab_size()) {
        let message = format!("token id {bad} is outside the vocabulary of {}", tokenizer.vocab_size());
        return Err(ApiError::invalid("tokens", message));
    }
    let text = tokenizer.decode(&request.tokens, request.skip_special_tokens.unwrap_or(false))?;
    Ok(Json(DetokenizeResponse {
        text: text.clone(),
        prompt: text,
    }))
}
