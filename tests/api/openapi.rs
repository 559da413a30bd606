//! The OpenAPI document: checked in, complete, served, and true.
//!
//! `POLYLORA_REGENERATE=1 cargo test openapi` writes `openapi/openapi.json` anew.

use std::{collections::BTreeSet, path::Path};

use serde_json::Value;

use crate::common::Server;

fn document() -> Value {
    serde_json::from_str(&polylora::openapi::document_json()).unwrap()
}

#[test]
fn the_document_is_the_one_that_is_checked_in() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/openapi.json");
    let made = polylora::openapi::document_json();
    if std::env::var_os("POLYLORA_REGENERATE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &made).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(made == checked_in, "openapi/openapi.json differs from the code: see this file's head");
}

#[test]
fn every_field_is_described_and_every_reference_resolves() {
    let document = document();
    assert_eq!(document["openapi"], "3.1.0");
    let schemas = document["components"]["schemas"].as_object().unwrap();
    for (name, schema) in schemas {
        for (field, schema) in schema["properties"].as_object().into_iter().flatten() {
            let described = schema["description"].is_string() || schema["$ref"].is_string() || schema["oneOf"].is_array();
            assert!(described, "{name}.{field} has no description");
        }
    }
    let text = document.to_string();
    let references: BTreeSet<&str> = text
        .split("\"#/components/schemas/")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .collect();
    for reference in references {
        assert!(schemas.contains_key(reference), "{reference} is nowhere");
    }
}

#[test]
fn every_operation_tells_its_errors_and_has_a_summary() {
    let document = document();
    let mut ids = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            assert!(
                ids.insert(operation["operationId"].as_str().unwrap()),
                "{method} {path}: another operation has this id"
            );
            assert!(operation["summary"].is_string(), "{method} {path}");
            let responses = operation["responses"].as_object().unwrap();
            assert!(responses.contains_key("200") && responses.contains_key("500"), "{method} {path}");
            if operation["requestBody"].is_object() {
                assert!(
                    ["400", "401", "413", "415"].iter().all(|status| responses.contains_key(*status)),
                    "{method} {path}"
                );
            }
        }
    }
    assert!(ids.len() > 25, "{ids:?}");
}

#[tokio::test]
async fn the_document_and_its_page_are_served_without_the_network() {
    let server = Server::new();
    assert_eq!(server.get("/openapi.json").await.json(200).await, document());
    let mut page = server.get("/docs/").await;
    assert_eq!(page.status, 200);
    let html = page.text().await;
    assert!(html.contains("swagger-ui") && !html.contains("https://"), "{html}");
    assert_eq!(server.get("/docs/swagger-ui-bundle.js").await.status, 200);
}
