//! `GET /v1/models`: the base model and every adapter that the caller may use.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use polylora_engine::{AdapterInfo, adapter::AdapterState};

use crate::{
    aliases::Alias,
    app::{AppState, Caller, Gateway},
    beside::beside_if,
    error::ApiError,
    extract::ApiPath,
    protocol::models::{AdapterCard, ModelCard, ModelList},
    routing::Target,
};

/// A longer list of adapters takes a millisecond to put together.
const LONG_LIST: usize = 500;

/// Looks at every adapter, beside the thread's other tasks if there are many.
pub(super) async fn with_all_adapters<T>(state: &Gateway, work: impl FnOnce() -> T) -> T {
    let are_many = state.engine.first_adapter_names(LONG_LIST + 1).len() > LONG_LIST;
    beside_if(are_many, work).await
}

fn base_card(state: &Gateway, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model".to_owned(),
        created: state.started_at(),
        owned_by: state.owned_by.clone(),
        root: state.served.path.clone(),
        parent: None,
        max_model_len: Some(state.engine.describe().context_length),
        adapter: None,
        alias: None,
    }
}

/// The wire's word for where an adapter is.
pub(super) fn state_name(state: AdapterState) -> &'static str {
    match state {
        AdapterState::Registered => "registered",
        AdapterState::Host => "host",
        AdapterState::Device => "device",
    }
}

/// Seconds since 1970, with their fraction.
pub(super) fn unix_time(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn adapter_card(state: &Gateway, info: AdapterInfo) -> ModelCard {
    ModelCard {
        id: info.name.to_string(),
        object: "model".to_owned(),
        created: state.started_at(),
        owned_by: state.owned_by.clone(),
        root: info.source,
        parent: Some(state.served.name().to_owned()),
        max_model_len: None,
        adapter: Some(AdapterCard {
            lora_rank: info.max_lora_rank,
            target_modules: info.target_modules,
            pinned: info.pinned,
            state: state_name(info.state).to_owned(),
            size_bytes: info.bytes,
            version: info.version,
            leases: info.leases,
            requests_total: info.requests_total,
            hits_total: info.hits_total,
            last_used: info.last_used.map(unix_time),
            last_error: info.last_error.clone(),
        }),
        alias: None,
    }
}

fn alias_card(state: &Gateway, alias: &Alias) -> ModelCard {
    let adapters: Vec<&str> = alias.targets().iter().map(|target| &**target.adapter()).collect();
    ModelCard {
        id: alias.name().to_string(),
        object: "model".to_owned(),
        created: state.started_at(),
        owned_by: state.owned_by.clone(),
        root: adapters.join(","),
        parent: Some(state.served.name().to_owned()),
        max_model_len: None,
        adapter: None,
        alias: Some(super::aliases::card(alias)),
    }
}

/// `GET /v1/models`. Base model first: routers read that one.
#[utoipa::path(
    get, path = "/v1/models", operation_id = "list_models", tag = "OpenAI",
    responses((status = 200, description = "The base model's names, then the adapters, last used last, then the aliases.", body = ModelList), crate::openapi::ReadErrors),
)]
pub async fn list(State(state): State<AppState>, caller: Caller) -> Response {
    with_all_adapters(&state, || {
        let mut adapters = state.engine.list_adapters();
        adapters.retain(|info| caller.identity.sees_adapter(&info.name));
        let mut aliases = state.aliases.list();
        aliases.retain(|alias| caller.identity.sees_adapter(alias.name()));
        let bases = state.served.names.iter().map(|name| base_card(&state, name));
        let adapters = adapters.into_iter().map(|info| adapter_card(&state, info));
        let aliases = aliases.iter().map(|alias| alias_card(&state, alias));
        let data = bases.chain(adapters).chain(aliases).collect();
        let object = "list".to_owned();
        Json(ModelList { object, data }).into_response()
    })
    .await
}

/// `GET /v1/models/{id}`: whatever `model` of a request may be.
#[utoipa::path(
    get, path = "/v1/models/{id}", operation_id = "retrieve_model", tag = "OpenAI",
    params(("id" = String, Path, description = "What `model` of a request may be.", example = "sql")),
    responses((status = 200, description = "About it.", body = ModelCard), crate::openapi::ReadOneErrors),
)]
pub async fn one(State(state): State<AppState>, caller: Caller, ApiPath(id): ApiPath<String>) -> Result<Json<ModelCard>, ApiError> {
    let router = state.router(&caller.identity);
    let card = match router.target(&id, None)? {
        Target::Base => base_card(&state, &id),
        Target::Adapter(name) => match (state.aliases.get(&name), state.engine.adapter_info(&name)) {
            (Some(alias), _) => alias_card(&state, &alias),
            (None, Some(info)) => adapter_card(&state, info),
            (None, None) => return Err(router.not_found(&id, None, "model")),
        },
    };
    Ok(Json(card))
}

/// `GET /v1/models/{org}/{name}`: the same for a name with a slash.
#[utoipa::path(
    get, path = "/v1/models/{org}/{name}", operation_id = "retrieve_model_of_org", tag = "OpenAI",
    params(
        ("org" = String, Path, description = "Before the slash."),
        ("name" = String, Path, description = "After it."),
    ),
    responses((status = 200, description = "About it.", body = ModelCard), crate::openapi::ReadOneErrors),
)]
pub async fn one_of_org(
    state: State<AppState>,
    caller: Caller,
    ApiPath((org, name)): ApiPath<(String, String)>,
) -> Result<Json<ModelCard>, ApiError> {
    one(state, caller, ApiPath(format!("{org}/{name}"))).await
}
