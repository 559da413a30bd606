//! The OpenAPI document: made from the code, checked in as `openapi/openapi.json`, served at `/openapi.json` and, for people, at `/docs`.

use std::collections::BTreeMap;

use utoipa::{
    IntoResponses, Modify, OpenApi, PartialSchema, ToSchema,
    openapi::{
        Content, RefOr, ResponseBuilder,
        response::Response,
        security::{Http, HttpAuthScheme, SecurityScheme},
    },
};

use crate::error::{ErrorBody, NativeErrorBody, VllmErrorBody};

/// The head of the document; the routes add themselves.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "polylora",
        description = "One base model and thousands of LoRA adapters behind the OpenAI API.\n\n\
            Wherever a request names a `model`, that is the served base name, `base:adapter`, or an adapter's name; \
            an alias (`/v1/aliases`) can stand wherever an adapter's name can. \
            Streams are server-sent events: `data: {…}` lines, ended by `data: [DONE]`; an error after the first event is an event \
            with an `error` object, and the end. Answers carry `x-request-id`, and `x-polylora-adapter` if an adapter answered.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
        contact(),
    ),
    tags(
        (name = "OpenAI", description = "The OpenAI API, with extensions that are marked as such."),
        (name = "Native", description = "SGLang's native generation."),
        (name = "Adapters", description = "Load, unload and list adapters; for admins once keys are set."),
        (name = "Server", description = "Probes, and what routers ask."),
    ),
    components(schemas(ErrorBody, NativeErrorBody, VllmErrorBody)),
    security(("bearer" = []), ()),
    modifiers(&BearerScheme),
)]
pub struct Document;

struct BearerScheme;

impl Modify for BearerScheme {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        document.components.get_or_insert_default().add_security_scheme("bearer", scheme);
    }
}

/// The whole document, as it is checked in.
pub fn document_json() -> String {
    let (_, document) = crate::routes::router();
    let mut json = document.to_pretty_json().expect("the document has string keys");
    json.push('\n');
    json
}

fn what(status: &str) -> &'static str {
    match status {
        "400" => "The request is wrong; `param` says where.",
        "401" => "No key, or a wrong one.",
        "403" => "The key may not do this.",
        "404" => "No such model, adapter or alias.",
        "408" => "The body took too long.",
        "409" => "The adapter has another version, or an alias points at it.",
        "413" => "The body is too large.",
        "415" => "The body has another media type.",
        "429" => "A limit of the key is reached; `Retry-After` says when to try again.",
        "499" => "Ended by `/abort_request`.",
        "500" => "The server failed.",
        "502" => "The Hub can't be reached, or fails.",
        "503" => "The queue is full, the adapter is being loaded, the engine has failed, or the server is stopping; try again after `Retry-After`.",
        "507" => "There is no room on the disk.",
        _ => "An error.",
    }
}

fn errors<B: ToSchema + PartialSchema>(statuses: &[&str]) -> BTreeMap<String, RefOr<Response>> {
    let schema = || RefOr::Ref(utoipa::openapi::Ref::from_schema_name(B::name()));
    statuses
        .iter()
        .map(|&status| {
            let response = ResponseBuilder::new()
                .description(what(status))
                .content("application/json", Content::new(Some(schema())))
                .build();
            (status.to_owned(), RefOr::T(response))
        })
        .collect()
}

macro_rules! error_sets {
    ($($(#[$doc:meta])* $name:ident: $body:ty = [$($status:literal),*];)*) => {
        $(
            $(#[$doc])*
            pub struct $name;
            impl IntoResponses for $name {
                fn responses() -> BTreeMap<String, RefOr<Response>> {
                    errors::<$body>(&[$($status),*])
                }
            }
        )*
    };
}

error_sets! {
    /// Of routes that generate.
    GenerationErrors: ErrorBody = ["400", "401", "403", "404", "408", "413", "415", "429", "499", "500", "503"];
    /// The same in SGLang's form.
    NativeGenerationErrors: NativeErrorBody = ["400", "401", "403", "404", "408", "413", "415", "429", "500", "503"];
    /// Of routes that read a body and generate nothing.
    BodyErrors: ErrorBody = ["400", "401", "403", "404", "408", "413", "415", "500", "503"];
    /// The same in SGLang's form.
    NativeBodyErrors: NativeErrorBody = ["400", "401", "403", "408", "413", "415", "500"];
    /// Of routes that load adapters.
    LoadErrors: ErrorBody = ["400", "401", "403", "404", "408", "409", "413", "415", "500", "502", "503"];
    /// Of routes that load and unload adapters in vLLM's form.
    VllmLoadErrors: VllmErrorBody = ["400", "401", "403", "404", "408", "409", "413", "415", "500", "502", "503"];
    /// Of routes that receive adapters.
    PushErrors: ErrorBody = ["400", "401", "403", "408", "409", "413", "415", "500", "503", "507"];
    /// Of routes that unload adapters.
    UnloadErrors: ErrorBody = ["400", "401", "403", "404", "409", "500"];
    /// Of native routes for admins, beside what they say themselves.
    NativeAdminErrors: NativeErrorBody = ["401", "403", "408", "413", "415", "500"];
    /// Of routes that tell admins.
    AdminReadErrors: ErrorBody = ["401", "403", "500"];
    /// Of routes that tell admins of one thing.
    AdminReadOneErrors: ErrorBody = ["400", "401", "403", "404", "500"];
    /// Of routes that only tell.
    ReadErrors: ErrorBody = ["401", "500"];
    /// Of routes that tell of one thing.
    ReadOneErrors: ErrorBody = ["400", "401", "404", "500", "503"];
    /// Of probes.
    ProbeErrors: NativeErrorBody = ["500", "503"];
}
