//! Dashboards, rules and scrape config name only metrics that the server has, with the labels that they have.

use std::{collections::BTreeSet, fs, path::Path};

use polylora::metrics::{ALL, Definition, Kind};
use serde_json::Value;

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn dashboard(name: &str) -> Value {
    serde_json::from_str(&read(&format!("dashboards/{name}"))).unwrap()
}

/// Labels that Prometheus itself adds.
const SCRAPE_LABELS: [&str; 3] = ["instance", "job", "le"];

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// The metrics of a PromQL text, each with the labels of its `{…}`.
fn metrics(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(begin) = rest.find(is_name) {
        let end = rest[begin..].find(|c| !is_name(c)).map_or(rest.len(), |length| begin + length);
        let name = &rest[begin..end];
        rest = &rest[end..];
        if !["polylora_", "vllm:", "sglang:", "process_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
        {
            continue;
        }
        let mut labels = Vec::new();
        if let Some(matchers) = rest.strip_prefix('{') {
            let end = matchers.find('}').expect("a closing brace");
            for matcher in matchers[..end].split(',').filter(|matcher| !matcher.is_empty()) {
                labels.push(matcher.split(['=', '!']).next().unwrap().trim().to_owned());
            }
            rest = &matchers[end..];
        }
        found.push((name.to_owned(), labels));
    }
    found
}

fn definition(name: &str) -> Option<&'static Definition> {
    ALL.iter().find(|definition| {
        let series_of_histogram = ["_bucket", "_sum", "_count"]
            .iter()
            .any(|suffix| name.strip_suffix(suffix) == Some(definition.name));
        match definition.kind {
            Kind::Histogram(_) => series_of_histogram,
            Kind::Counter | Kind::Gauge => definition.name == name,
        }
    })
}

/// Checks a text, and gives the metrics that it names.
fn check(place: &str, text: &str) -> BTreeSet<String> {
    let found = metrics(text);
    for (name, labels) in &found {
        let definition = definition(name).unwrap_or_else(|| panic!("{place}: no metric is called {name}"));
        for label in labels {
            let known = SCRAPE_LABELS.contains(&label.as_str()) || definition.labels.contains(&label.as_str());
            assert!(known, "{place}: {name} has no label {label}");
        }
    }
    found.into_iter().map(|(name, _)| name).collect()
}

fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row")
}

#[test]
fn every_panel_asks_for_metrics_that_exist() {
    for name in ["overview.json", "adapters.json"] {
        let dashboard = dashboard(name);
        let mut count = 0;
        for panel in panels(&dashboard) {
            let title = panel["title"].as_str().unwrap();
            for target in panel["targets"].as_array().unwrap() {
                let used = check(&format!("{name}, {title}"), target["expr"].as_str().unwrap());
                assert!(!used.is_empty(), "{name}, {title}: a query without a metric");
                count += 1;
            }
        }
        assert!(count >= 10, "{name} has {count} queries");
        for variable in dashboard["templating"]["list"].as_array().unwrap() {
            if let Some(query) = variable["query"]["query"].as_str() {
                assert_eq!(check(&format!("{name}, ${}", variable["name"]), query).len(), 1);
            }
        }
    }
}

/// Panels overlap nowhere and have identities of their own: Grafana would lose one silently.
#[test]
fn panels_are_laid_out() {
    for name in ["overview.json", "adapters.json"] {
        let dashboard = dashboard(name);
        let mut ids = BTreeSet::new();
        let mut places = BTreeSet::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{name}: {}", panel["title"]);
            let place = &panel["gridPos"];
            assert!(places.insert((place["y"].as_u64(), place["x"].as_u64())), "{name}: {}", panel["title"]);
        }
    }
}

#[test]
fn rules_and_their_tests_name_metrics_that_exist() {
    for name in ["rules.yml", "rules_test.yml"] {
        let text: String = read(name)
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'))
            .fold(String::new(), |all, line| all + line + "\n");
        assert!(check(name, &text).len() >= 3);
    }
}

/// What an operator must see is on a dashboard.
#[test]
fn dashboards_show_what_matters() {
    let all: BTreeSet<String> = ["overview.json", "adapters.json"]
        .iter()
        .flat_map(|name| check(name, &read(&format!("dashboards/{name}")).replace("\\\"", "\"")))
        .collect();
    for name in [
        "polylora_adapter_cache_hits_total",
        "polylora_adapter_cache_misses_total",
        "vllm:lora_adapter_loaded",
        "polylora_adapter_resident_bytes",
        "polylora_adapter_load_seconds_bucket",
        "polylora_device_adapter_evictions_total",
        "polylora_adapter_loads_total",
        "polylora_adapter_uploads_total",
        "polylora_adapter_evictions_total",
        "polylora_http_requests_total",
        "polylora_alias_requests_total",
        "polylora_alias_share",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:num_requests_waiting",
        "polylora_kv_blocks",
    ] {
        assert!(all.contains(name), "{name} is on no dashboard");
    }
}

/// The rates and increases of a PromQL text: what stands in their parentheses.
fn rates(text: &str) -> Vec<&str> {
    let begins = ["rate(", "increase("]
        .into_iter()
        .flat_map(|call| text.match_indices(call).map(move |(begin, _)| begin + call.len()));
    begins.map(|begin| text[begin..].split('[').next().unwrap()).collect()
}

#[test]
fn what_lost_labels_had_counted_is_in_no_rate() {
    let mut texts = vec![read("rules.yml")];
    for dashboard in ["overview.json", "adapters.json"].map(dashboard) {
        let targets = panels(&dashboard).flat_map(|panel| panel["targets"].as_array().unwrap());
        texts.extend(targets.map(|target| target["expr"].as_str().unwrap().to_owned()));
    }
    let mut checked = 0;
    for inner in texts.iter().flat_map(|text| rates(text)) {
        let (name, _) = metrics(inner).remove(0);
        if definition(&name).is_some_and(|definition| definition.labels.contains(&"adapter")) {
            assert!(inner.contains("adapter!=\"(former)\""), "{inner}");
            checked += 1;
        }
    }
    assert!(checked > 15, "{checked}");
}

#[test]
fn a_wrong_name_or_label_is_found() {
    assert_eq!(
        metrics("rate(vllm:x_total{a=\"1\", b=~\".*\"}[5m]) / polylora_y")[0],
        ("vllm:x_total".into(), vec!["a".into(), "b".into()])
    );
    for wrong in [
        "sum(polylora_no_such_metric)",
        "polylora_kv_blocks{nothing=\"x\"}",
        "vllm:time_to_first_token_seconds",
    ] {
        assert!(std::panic::catch_unwind(|| check("here", wrong)).is_err(), "{wrong}");
    }
}
