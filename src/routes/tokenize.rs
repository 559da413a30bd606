//! `POST /tokenize` and `POST /detokenize`, as vLLM and SGLang have them.

use axum::{Json, extract::State};

use super::chat_completions::template_text;
use crate::{
    app::{AppState, Caller},
    beside::beside_if,
    error::ApiError,
    extract::ApiJson,
    protocol::tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse},
    routing::Target,
    text_side::TextSide,
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
    let side = text_side(&state, &caller, request.model.as_deref()).await?;
    let (text, add_special_tokens) = match (request.prompt.or(request.text), request.messages) {
        (Some(prompt), None) => (prompt, request.add_special_tokens.unwrap_or(true)),
        (None, Some(messages)) => {
            let add_generation_prompt = request.add_generation_prompt.unwrap_or(true);
            let kwargs = request.chat_template_kwargs.as_ref();
            let render = || template_text(&side, &messages, add_generation_prompt, kwargs);
            let text = side.prompt.rendering(caller.is_large, render).await?;
            (text, request.add_special_tokens.unwrap_or(false))
        }
        _ => return Err(ApiError::invalid("prompt", "Give exactly one of prompt and messages.")),
    };
    let tokens = side.prompt.encode(text, add_special_tokens).await?;
    let tokenizer = side.tokenizer();
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

/// The way with text of a model or an adapter. One that was not read yet is read for it.
async fn text_side(state: &AppState, caller: &Caller, model: Option<&str>) -> Result<TextSide, ApiError> {
    let Some(model) = model else { return Ok(state.text.clone()) };
    match state.router(&caller.identity).target(model, None)? {
        Target::Base => Ok(state.text.clone()),
        target => {
            let target = state.resolve(caller, target, caller.sticky_key([None, None], &caller.request_id))?;
            Ok(state.text(state.lease(caller, &target).await?.as_ref()))
        }
    }
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
    let side = text_side(&state, &caller, request.model.as_deref()).await?;
    let tokenizer = side.tokenizer();
    if let Some(&bad) = request.tokens.iter().find(|&&token| token as usize >= tokenizer.vocab_size()) {
        let message = format!("token id {bad} is outside the vocabulary of {}", tokenizer.vocab_size());
        return Err(ApiError::invalid("tokens", message));
    }
    let decode = || tokenizer.decode(&request.tokens, request.skip_special_tokens.unwrap_or(false));
    let text = beside_if(caller.is_large, decode).await?;
    Ok(Json(DetokenizeResponse {
        text: text.clone(),
        prompt: text,
    }))
}
