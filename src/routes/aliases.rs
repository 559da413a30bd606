//! `/v1/aliases`: names that stand for adapters.

use axum::{Json, extract::State};

use crate::{
    aliases::{Alias, AliasDefinition, AliasError, TargetDefinition},
    app::AppState,
    error::ApiError,
    extract::{ApiJson, ApiPath},
    protocol::aliases::{AliasCard, AliasDeleted, AliasList, AliasRequest, AliasTargetCard},
};

/// An alias as it is shown.
pub(super) fn card(alias: &Alias) -> AliasCard {
    let targets = alias.targets().iter().map(|target| AliasTargetCard {
        adapter: target.adapter().to_string(),
        weight: target.weight(),
        share: alias.share(target),
        requests_total: target.requests_total(),
    });
    AliasCard {
        object: "alias".to_owned(),
        name: alias.name().to_string(),
        targets: targets.collect(),
    }
}

/// `GET /v1/aliases`: every alias.
#[utoipa::path(
    get, path = "/v1/aliases", operation_id = "list_aliases", tag = "Adapters",
    responses((status = 200, description = "Every alias, by name.", body = AliasList), crate::openapi::AdminReadErrors),
)]
pub async fn list(State(state): State<AppState>) -> Json<AliasList> {
    Json(AliasList {
        object: "list".to_owned(),
        data: state.aliases.list().iter().map(|alias| card(alias)).collect(),
    })
}

/// `GET /v1/aliases/{name}`: one alias.
#[utoipa::path(
    get, path = "/v1/aliases/{name}", operation_id = "get_alias", tag = "Adapters",
    params(("name" = String, Path, description = "The alias's name.", example = "support")),
    responses((status = 200, description = "About it.", body = AliasCard), crate::openapi::AdminReadOneErrors),
)]
pub async fn get(State(state): State<AppState>, ApiPath(name): ApiPath<String>) -> Result<Json<AliasCard>, ApiError> {
    match state.aliases.get(&name) {
        Some(alias) => Ok(Json(card(&alias))),
        None => Err(AliasError::Unknown { name }.into()),
    }
}

/// `PUT /v1/aliases/{name}`: makes an alias, or points it elsewhere at once.
///
/// A `model` (or `lora_path`) that names the alias is answered by one of its adapters, in proportion to the weights. The choice is
/// the same for equal `user` (else the API key, else each request on its own); when a weight grows, users only move to that adapter.
/// `x-polylora-adapter` and `meta_info.lora` tell which one answered. An adapter can't be unloaded while an alias points at it.
#[utoipa::path(
    put, path = "/v1/aliases/{name}", operation_id = "set_alias", tag = "Adapters", request_body = AliasRequest,
    params(("name" = String, Path, description = "The alias's name: neither the base model's nor an adapter's.", example = "support")),
    responses((status = 200, description = "The alias as it is now.", body = AliasCard), crate::openapi::LoadErrors),
)]
pub async fn set(
    State(state): State<AppState>,
    ApiPath(name): ApiPath<String>,
    ApiJson(request): ApiJson<AliasRequest>,
) -> Result<Json<AliasCard>, ApiError> {
    let targets = match (request.adapter, request.targets) {
        (Some(adapter), None) => vec![TargetDefinition { adapter, weight: 1.0 }],
        (None, Some(targets)) => {
            let targets = targets.into_iter().map(|target| TargetDefinition {
                adapter: target.adapter,
                weight: target.weight.unwrap_or(1.0),
            });
            targets.collect()
        }
        _ => return Err(ApiError::invalid("targets", "Give exactly one of adapter and targets.")),
    };
    let alias = state.set_alias(AliasDefinition { name, targets }).await?;
    Ok(Json(card(&alias)))
}

/// `DELETE /v1/aliases/{name}`: forgets an alias; its adapters stay.
#[utoipa::path(
    delete, path = "/v1/aliases/{name}", operation_id = "delete_alias", tag = "Adapters",
    params(("name" = String, Path, description = "The alias's name.", example = "support")),
    responses((status = 200, description = "It is no more.", body = AliasDeleted), crate::openapi::AdminReadOneErrors),
)]
pub async fn delete(State(state): State<AppState>, ApiPath(name): ApiPath<String>) -> Result<Json<AliasDeleted>, ApiError> {
    state.remove_alias(&name).await?;
    Ok(Json(AliasDeleted { name, deleted: true }))
}
