//! From the names in a request to the base model or an adapter; never the base model by accident.

use std::sync::Arc;

use polylora_engine::{AdapterError, AdapterInfo, AdapterLease, InferenceEngine, adapter::combine::parse_expression};

use crate::{
    aliases::{Aliases, Names},
    auth::Identity,
    error::{ApiError, shown},
    lifecycle::LoadingNames,
};

/// What a request runs on, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The base model.
    Base,
    /// An adapter, an alias, or a combination of them.
    Adapter(String),
}

/// The base model's names.
#[derive(Clone, Debug)]
pub struct ServedModel {
    /// Names that clients may use; the first is shown.
    pub names: Vec<String>,
    /// The path or Hub id that it was loaded from.
    pub path: String,
}

impl ServedModel {
    /// The name that is shown.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// What a `model` string means: a served name is the base model; `served:adapter` (or `served::adapter`) and a bare name that
    /// `is_adapter` knows are adapters. `None` for everything else.
    pub fn route(&self, model: &str, is_adapter: impl Fn(&str) -> bool) -> Option<Target> {
        match self.read(model) {
            Target::Adapter(name) if !is_adapter(&name) => None,
            target => Some(target),
        }
    }

    /// The same, whether there is such an adapter or not.
    fn read(&self, model: &str) -> Target {
        if self.names.iter().any(|name| name == model) {
            return Target::Base;
        }
        // Served names may have colons themselves, so the split is after the longest one that fits.
        let qualified = self
            .names
            .iter()
            .filter_map(|name| Some((name.len(), model.strip_prefix(name.as_str())?.strip_prefix(':')?)))
            .max_by_key(|(len, _)| *len);
        let adapter = match qualified {
            Some((_, adapter)) => adapter.strip_prefix(':').unwrap_or(adapter).trim(),
            None => model,
        };
        Target::Adapter(adapter.to_owned())
    }
}

/// What a caller finds under a name; of a combination, what is worst of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Found {
    /// An adapter or an alias.
    Served,
    /// An adapter that is being loaded for the first time.
    Loading,
    /// Nothing that it may use.
    Nothing,
}

/// Finds models and takes leases for one caller.
pub struct Router<'a> {
    /// The base model's names.
    pub served: &'a ServedModel,
    /// Knows the adapters.
    pub engine: &'a dyn InferenceEngine,
    /// Names that stand for adapters.
    pub aliases: &'a Aliases,
    /// Names that are about to be adapters.
    pub loading: &'a LoadingNames,
    /// Who asks: adapters that it may not use don't exist for it.
    pub identity: &'a Identity,
}

impl Router<'_> {
    /// What `model` and `lora_path` of an OpenAI request mean; an adapter in `model` wins.
    ///
    /// # Errors
    /// 404 naming what exists; 503 for an adapter that is being loaded; 400 for an ill-formed combination.
    pub fn target(&self, model: &str, lora_path: Option<&str>) -> Result<Target, ApiError> {
        match (self.served.read(model), lora_path) {
            (Target::Base, None) => Ok(Target::Base),
            (Target::Base, Some(name)) => self.adapter(name, "lora_path"),
            (Target::Adapter(name), _) => self.find_target(model, name, "model"),
        }
    }

    /// An adapter by its name alone.
    ///
    /// # Errors
    /// As `target`.
    pub fn adapter(&self, name: &str, param: &str) -> Result<Target, ApiError> {
        if !self.engine.describe().lora_enabled {
            return Err(ApiError::from(AdapterError::NotEnabled).for_param(param));
        }
        self.find_target(name, name.to_owned(), param)
    }

    fn find_target(&self, asked: &str, name: String, param: &str) -> Result<Target, ApiError> {
        match self.find(&name) {
            Found::Served => Ok(Target::Adapter(name)),
            Found::Loading => Err(ApiError::adapter_loading(&name, param)),
            Found::Nothing => Err(self.missing(asked, &name, param)),
        }
    }

    fn missing(&self, asked: &str, adapter: &str, param: &str) -> ApiError {
        match parse_expression(adapter, usize::MAX) {
            Err(error) => ApiError::from(error).for_param(param),
            Ok(_) => self.not_found(asked, self.missing_part(adapter), param),
        }
    }

    /// What a combination is not served for want of; `None` if it is no combination.
    pub fn missing_part<'n>(&self, name: &'n str) -> Option<&'n str> {
        let parts = parse_expression(name, usize::MAX).ok()??;
        parts.into_iter().map(|part| part.name).find(|part| self.find_one(part) == Found::Nothing)
    }

    /// A lease on a target whose aliases have been resolved: `None` is the base model.
    ///
    /// # Errors
    /// 403 for the base model, if the key may not use it; 404 when the adapter has gone; whatever failed when it had to be read.
    pub async fn lease(&self, target: &Target) -> Result<Option<AdapterLease>, ApiError> {
        match target {
            Target::Base => self.identity.require_base_model().map(|()| None).map_err(ApiError::from),
            Target::Adapter(name) => match self.engine.acquire_adapter(name).await {
                Ok(lease) => Ok(Some(lease)),
                Err(AdapterError::Unknown { .. }) => Err(self.gone(name)),
                Err(error) => Err(self.cannot_be_served(&[name], error)),
            },
        }
    }

    /// Leases on several targets, in their order: all of them, or none. A series of `lease` could wait for room that it has itself.
    ///
    /// # Errors
    /// As `lease`.
    pub async fn leases(&self, targets: &[Target]) -> Result<Vec<Option<AdapterLease>>, ApiError> {
        let mut names = Vec::with_capacity(targets.len());
        for target in targets {
            match target {
                Target::Base => self.identity.require_base_model()?,
                Target::Adapter(name) => names.push(name.as_str()),
            }
        }
        if names.is_empty() {
            // Nothing is asked of the adapters: a server without LoRA answers this, too.
            return Ok(vec![None; targets.len()]);
        }
        let leases = match self.engine.acquire_adapters(&names).await {
            Ok(leases) => leases,
            Err(AdapterError::Unknown { name, .. }) => return Err(self.gone(&name)),
            Err(error) => return Err(self.cannot_be_served(&names, error)),
        };
        let mut leases = leases.into_iter();
        let lease = |target: &Target| match target {
            Target::Base => None,
            Target::Adapter(_) => leases.next(),
        };
        Ok(targets.iter().map(lease).collect())
    }

    /// Says which adapter it is whose files are bad: the request named it, and perhaps others, and nothing of its files.
    fn cannot_be_served(&self, names: &[&str], error: AdapterError) -> ApiError {
        use AdapterError::{BadFile, BadName, Incompatible, Unsupported};
        if matches!(error, BadName { .. }) {
            // Of a combination that can't be.
            return ApiError::from(error).for_param("model");
        }
        if !matches!(error, BadFile { .. } | Incompatible { .. } | Unsupported { .. }) {
            return error.into();
        }
        let reason = error.to_string();
        let fails = |info: &AdapterInfo| info.last_error.as_ref() == Some(&reason);
        // A sum and, before it, its parts: one of these it is, if any.
        let with_parts = |name: &&str| {
            let sum = self.engine.adapter_info(name);
            let parts: Vec<AdapterInfo> = sum
                .iter()
                .flat_map(|sum| &sum.parts)
                .filter_map(|part| self.engine.adapter_info(part))
                .collect();
            parts.into_iter().chain(sum)
        };
        let failed = names.iter().flat_map(with_parts).find(fails).map(|info| info.name);
        let said = ApiError::from(error).for_param("model");
        let only = names.first().copied().filter(|_| names.len() == 1);
        match failed.as_deref().or(only) {
            Some(name) => said.with_message(|message| format!("adapter '{}': {message}", shown(name))),
            None => said,
        }
    }

    /// An adapter was unloaded since it was found; somebody may be loading it again, or have done so.
    fn gone(&self, name: &str) -> ApiError {
        match self.find(name) {
            Found::Nothing => self.not_found(name, self.missing_part(name), "model"),
            Found::Loading | Found::Served => ApiError::adapter_loading(name, "model"),
        }
    }

    /// 404, with names that a request may use, base model first; `part` is what of a combination there is not.
    pub fn not_found(&self, asked: &str, part: Option<&str>, param: &str) -> ApiError {
        let base = self.served.name();
        let (names, are_all) = self.some_adapters();
        let names = names.iter().map(|name| format!("{base}:{name}"));
        let available: Vec<String> = std::iter::once(base.to_owned()).chain(names).collect();
        ApiError::model_not_found(asked, part, param, &available, are_all)
    }

    /// Aliases and adapters for a message, by name, and whether these are all that the caller may use. Not all of thousands are looked at,
    /// however often somebody mistakes a name, and however few of them are his.
    pub fn some_adapters(&self) -> (Vec<Arc<str>>, bool) {
        const MOST: usize = 20;
        const LOOKED_AT: usize = 1000;
        let aliases = self.aliases.first(LOOKED_AT);
        let adapters = self.engine.first_adapter_names(LOOKED_AT);
        let mut are_all = aliases.len() < LOOKED_AT && adapters.len() < LOOKED_AT;
        let seen = aliases.into_iter().chain(adapters).filter(|name| self.identity.sees_adapter(name));
        let mut names: Vec<Arc<str>> = seen.take(MOST + 1).collect();
        are_all &= names.len() <= MOST;
        names.truncate(MOST);
        (names, are_all)
    }

    /// Looks a name up, or every name of a combination. Who may use an alias may use what it stands for.
    fn find(&self, name: &str) -> Found {
        let found = self.find_one(name);
        if found != Found::Nothing {
            return found;
        }
        match parse_expression(name, usize::MAX) {
            Ok(Some(parts)) => parts.iter().map(|part| self.find_one(part.name)).max().unwrap_or(Found::Nothing),
            Ok(None) | Err(_) => Found::Nothing,
        }
    }

    fn find_one(&self, name: &str) -> Found {
        // Looked at first: what is loaded before the next look is found there.
        let is_loading = self.loading.contains(name);
        if !self.identity.sees_adapter(name) {
            Found::Nothing
        } else if self.aliases.contains(name) || self.is_adapter(name) {
            Found::Served
        } else if is_loading {
            Found::Loading
        } else {
            Found::Nothing
        }
    }

    /// Whether a name is that of an adapter which this caller will be able to use, but not yet.
    pub fn is_loading(&self, name: &str) -> bool {
        self.find(name) == Found::Loading
    }
}

impl Names for Router<'_> {
    fn base_names(&self) -> &[String] {
        &self.served.names
    }

    fn is_adapter(&self, name: &str) -> bool {
        self.engine.adapter_info(name).is_some_and(|info| info.parts.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_route_as_documented() {
        let served = ServedModel {
            names: ["gpt-oss:120b", "gpt-oss", "base"].map(String::from).into(),
            path: "/models/x".into(),
        };
        let adapters = ["sql", "120b-chat", "a/b"];
        let route = |model: &str| served.route(model, |name| adapters.contains(&name));
        let adapter = |name: &str| Some(Target::Adapter(name.into()));
        for (model, expected) in [
            ("base", Some(Target::Base)),
            ("gpt-oss:120b", Some(Target::Base)),
            ("base:sql", adapter("sql")),
            ("base::sql", adapter("sql")),
            ("base: sql ", adapter("sql")),
            ("gpt-oss:120b:sql", adapter("sql")),
            ("gpt-oss:120b-chat", adapter("120b-chat")),
            ("sql", adapter("sql")),
            ("a/b", adapter("a/b")),
            // Never the base model by accident.
            ("base:", None),
            (":", None),
            (":sql", None),
            ("", None),
            ("other", None),
            ("other:sql", None),
            ("base:other", None),
            ("base:sql:2", None),
            ("Base", None),
            ("basesql", None),
            ("default", None),
        ] {
            assert_eq!(route(model), expected, "{model:?}");
        }
    }
}
