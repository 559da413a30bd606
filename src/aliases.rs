//! Names that stand for adapters: `support` → `support-v1`, or 90 % of its callers to `support-v1` and 10 % to `support-v2`.
//!
//! A caller sticks to what it got: which target answers is a function of the alias, its targets and the caller's key alone, by
//! *weighted rendezvous hashing*. Each target has `h`, the first 53 bits of SHA-256 over alias, adapter and key, and
//! `u = (h + ½) / 2⁵³`; the target with the least `-ln(u) / weight` answers. A target then answers its weight's share of all keys.
//! When a weight grows or a target is added, keys only move to that target; when one shrinks or goes, only its own keys move.
//! Sources: Thaler and Ravishankar, 1998 (rendezvous); Schindelhauer and Schomaker, 2005 (the logarithmic weights).
//!
//! An alias points at adapters, never at aliases: there are no cycles. It hides nothing: names of adapters and of the base model are
//! refused for it, and its name for adapters. An adapter that an alias points at can't be unloaded.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use parking_lot::RwLock;
use polylora_engine::{
    AdapterError,
    adapter::{combine::parse_expression, registry::check_adapter_name},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Most aliases: each has metrics of its own.
pub const MAX_ALIASES: usize = 1024;
/// What of a caller's key counts.
const MAX_KEY_BYTES: usize = 1024;
/// Most adapters of one alias.
pub const MAX_TARGETS: usize = 16;

/// What an alias shall be, as it is asked for and kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AliasDefinition {
    /// Its name.
    pub name: String,
    /// The adapters behind it.
    pub targets: Vec<TargetDefinition>,
}

/// One adapter behind an alias.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetDefinition {
    /// Its name.
    pub adapter: String,
    /// Its part of the callers, relative to the others'.
    pub weight: f64,
}

/// Why an alias can't be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AliasError {
    /// The name can't be an alias's: it is ill-formed, the base model's, or an adapter's.
    #[error("alias name {name:?} {reason}")]
    BadName {
        /// Asked for.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The targets can't be.
    #[error("alias '{alias}': {reason}")]
    BadTarget {
        /// The alias.
        alias: String,
        /// What was expected and what came.
        reason: String,
    },
    /// No such alias.
    #[error("The alias '{name}' does not exist.")]
    Unknown {
        /// Asked for.
        name: String,
    },
    /// An adapter shall go that an alias points at.
    #[error("adapter '{adapter}' can't be unloaded: the alias '{alias}' points at it; change or delete the alias first")]
    InUse {
        /// The adapter.
        adapter: String,
        /// One of the aliases.
        alias: String,
    },
    /// Too many aliases.
    #[error("there are {MAX_ALIASES} aliases, more are not possible")]
    TooMany,
}

/// A name that stands for adapters.
#[derive(Debug)]
pub struct Alias {
    name: Arc<str>,
    targets: Vec<AliasTarget>,
}

/// One adapter behind an alias, and how often it was chosen.
#[derive(Debug)]
pub struct AliasTarget {
    adapter: Arc<str>,
    weight: f64,
    requests: Arc<AtomicU64>,
    /// How many of them have been taken.
    taken: Arc<AtomicU64>,
}

impl AliasTarget {
    /// The adapter's name.
    pub fn adapter(&self) -> &Arc<str> {
        &self.adapter
    }

    /// Its weight as it was given.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Requests that got it by this alias.
    pub fn requests_total(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// Those since this was asked last: for one asker.
    pub fn take_new_requests(&self) -> u64 {
        let requests = self.requests_total();
        requests.saturating_sub(self.taken.fetch_max(requests, Relaxed))
    }
}

impl Alias {
    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The adapters behind it, as they were given.
    pub fn targets(&self) -> &[AliasTarget] {
        &self.targets
    }

    /// A target's part of all callers, in (0, 1].
    pub fn share(&self, target: &AliasTarget) -> f64 {
        target.weight / self.targets.iter().map(|target| target.weight).sum::<f64>()
    }

    /// As it was asked for.
    pub fn definition(&self) -> AliasDefinition {
        let targets = self.targets.iter().map(|target| TargetDefinition {
            adapter: target.adapter.to_string(),
            weight: target.weight,
        });
        AliasDefinition {
            name: self.name.to_string(),
            targets: targets.collect(),
        }
    }

    /// The target that answers this caller; see the module's description.
    pub fn choose(&self, key: &str) -> &AliasTarget {
        let race = |target: &AliasTarget| -uniform(&self.name, &target.adapter, key).ln() / target.weight;
        let first = self.targets.iter().min_by(|a, b| race(a).total_cmp(&race(b)));
        first.expect("an alias has at least one target")
    }
}

/// In (0, 1), the same everywhere and always.
fn uniform(alias: &str, adapter: &str, key: &str) -> f64 {
    let mut hash = Sha256::new();
    // Names hold no control characters, so the parts can't run into each other.
    for part in ["polylora alias", alias, adapter] {
        hash.update(part);
        hash.update([0]);
    }
    // Whoever sends a megabyte is as different from others in its beginning.
    hash.update(&key.as_bytes()[..key.len().min(MAX_KEY_BYTES)]);
    let digest = hash.finalize();
    let first = u64::from_be_bytes(std::array::from_fn(|index| digest[index]));
    ((first >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Every alias of a server.
#[derive(Debug, Default)]
pub struct Aliases {
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    by_name: BTreeMap<Arc<str>, Arc<Alias>>,
    /// Names that adapters are being loaded under: no alias may have them.
    arriving: Vec<Arc<str>>,
    /// Adapters that are being unloaded: no alias may point at them any more.
    leaving: Vec<Arc<str>>,
}

/// What aliases must not collide with, and must point at.
pub trait Names {
    /// The names of the base model.
    fn base_names(&self) -> &[String];
    /// Whether an adapter has this name.
    fn is_adapter(&self, name: &str) -> bool;
}

/// A name of an adapter that comes or goes: as long as this lives no alias can take it, or point at it.
pub struct Moving<'a> {
    aliases: &'a Aliases,
    list: fn(&mut State) -> &mut Vec<Arc<str>>,
    name: Arc<str>,
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        let mut state = self.aliases.state.write();
        let list = (self.list)(&mut state);
        if let Some(index) = list.iter().position(|name| *name == self.name) {
            list.swap_remove(index);
        }
    }
}

impl Aliases {
    /// One alias.
    pub fn get(&self, name: &str) -> Option<Arc<Alias>> {
        self.state.read().by_name.get(name).cloned()
    }

    /// Whether a name is an alias's.
    pub fn contains(&self, name: &str) -> bool {
        self.state.read().by_name.contains_key(name)
    }

    /// Every alias, by name.
    pub fn list(&self) -> Vec<Arc<Alias>> {
        self.state.read().by_name.values().cloned().collect()
    }

    /// The first names, at most so many.
    pub fn first(&self, most: usize) -> Vec<Arc<str>> {
        self.state.read().by_name.keys().take(most).cloned().collect()
    }

    /// Checks whether [`Self::set`] would work now.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self, definition: &AliasDefinition, names: &dyn Names) -> Result<(), AliasError> {
        self.state.read().check(definition, names)
    }

    /// Makes an alias, or gives one other targets: requests from now on go by them. Targets that stay keep their counts.
    ///
    /// # Errors
    /// `BadName`, `BadTarget`, `TooMany`; nothing was changed.
    pub fn set(&self, definition: &AliasDefinition, names: &dyn Names) -> Result<Arc<Alias>, AliasError> {
        let mut state = self.state.write();
        state.check(definition, names)?;
        let old = state.by_name.get(definition.name.as_str()).cloned();
        let counts = |adapter: &str| {
            let kept = old.iter().flat_map(|old| &old.targets).find(|target| *target.adapter == *adapter);
            kept.map(|target| (Arc::clone(&target.requests), Arc::clone(&target.taken)))
                .unwrap_or_default()
        };
        let targets = definition.targets.iter().map(|target| {
            let (requests, taken) = counts(&target.adapter);
            AliasTarget {
                adapter: target.adapter.as_str().into(),
                weight: target.weight,
                requests,
                taken,
            }
        });
        let alias = Arc::new(Alias {
            name: definition.name.as_str().into(),
            targets: targets.collect(),
        });
        state.by_name.insert(Arc::clone(&alias.name), Arc::clone(&alias));
        Ok(alias)
    }

    /// Forgets an alias; the adapters behind it stay.
    ///
    /// # Errors
    /// `Unknown`.
    pub fn remove(&self, name: &str) -> Result<Arc<Alias>, AliasError> {
        let removed = self.state.write().by_name.remove(name);
        removed.ok_or_else(|| AliasError::Unknown { name: name.to_owned() })
    }

    /// Announces that an adapter will be loaded: as long as the value lives no alias can take its name.
    ///
    /// # Errors
    /// `BadName` if an alias has it.
    pub fn arrive(&self, adapter: &str) -> Result<Moving<'_>, AdapterError> {
        let mut state = self.state.write();
        if state.by_name.contains_key(adapter) {
            return Err(AdapterError::BadName {
                name: adapter.to_owned(),
                reason: "is an alias's".to_owned(),
            });
        }
        Ok(self.moving(&mut state, adapter, |state| &mut state.arriving))
    }

    /// Announces that an adapter will be unloaded: as long as the value lives no alias can be pointed at it.
    ///
    /// # Errors
    /// `InUse`.
    pub fn leave(&self, adapter: &str) -> Result<Moving<'_>, AliasError> {
        let mut state = self.state.write();
        let points_at = |alias: &&Arc<Alias>| alias.targets.iter().any(|target| *target.adapter == *adapter);
        if let Some(alias) = state.by_name.values().find(points_at) {
            return Err(AliasError::InUse {
                adapter: adapter.to_owned(),
                alias: alias.name.to_string(),
            });
        }
        Ok(self.moving(&mut state, adapter, |state| &mut state.leaving))
    }

    fn moving(&self, state: &mut State, name: &str, list: fn(&mut State) -> &mut Vec<Arc<str>>) -> Moving<'_> {
        let name: Arc<str> = name.into();
        list(state).push(Arc::clone(&name));
        Moving { aliases: self, list, name }
    }

    /// The adapter that a name stands for, for this caller; every other name stands for itself. In a combination each alias is
    /// replaced. Counts the request.
    ///
    /// # Errors
    /// `BadName`: an adapter that an alias in a combination stands for has a name that can't be written in one.
    pub fn resolve<'n>(&self, name: &'n str, key: &str, names: &dyn Names) -> Result<Cow<'n, str>, AdapterError> {
        if let Some(adapter) = self.choose(name, key) {
            return Ok(Cow::Owned(adapter.to_string()));
        }
        // What is ill-formed is the engine's to refuse.
        let Ok(Some(parts)) = parse_expression(name, usize::MAX) else {
            return Ok(Cow::Borrowed(name));
        };
        if names.is_adapter(name) || !parts.iter().any(|part| self.contains(part.name)) {
            return Ok(Cow::Borrowed(name));
        }
        let mut resolved = String::new();
        for part in &parts {
            let adapter = self.choose(part.name, key);
            let adapter = adapter.as_deref().unwrap_or(part.name);
            if adapter.contains(['+', '*']) {
                return Err(AdapterError::BadName {
                    name: name.chars().take(256).collect(),
                    reason: format!("has '{}' in it, which stands for '{adapter}': that can't be combined", part.name),
                });
            }
            let plus = if resolved.is_empty() { "" } else { "+" };
            let weight = if part.weight == 1.0 {
                String::new()
            } else {
                format!("*{}", part.weight)
            };
            resolved.push_str(&format!("{plus}{adapter}{weight}"));
        }
        Ok(Cow::Owned(resolved))
    }

    fn choose(&self, name: &str, key: &str) -> Option<Arc<str>> {
        let alias = self.get(name)?;
        let target = alias.choose(key);
        target.requests.fetch_add(1, Relaxed);
        Some(Arc::clone(&target.adapter))
    }
}

impl State {
    fn check(&self, definition: &AliasDefinition, names: &dyn Names) -> Result<(), AliasError> {
        self.check_name(&definition.name, names)?;
        let bad = |reason: String| {
            Err(AliasError::BadTarget {
                alias: definition.name.clone(),
                reason,
            })
        };
        if !(1..=MAX_TARGETS).contains(&definition.targets.len()) {
            return bad(format!("points at 1 to {MAX_TARGETS} adapters, got {}", definition.targets.len()));
        }
        for (index, TargetDefinition { adapter, weight }) in definition.targets.iter().enumerate() {
            if *adapter == definition.name {
                return bad("points at itself".to_owned());
            }
            if self.by_name.contains_key(adapter.as_str()) {
                return bad(format!("'{adapter}' is an alias, too; an alias points at adapters"));
            }
            if names.base_names().contains(adapter) {
                return bad(format!("'{adapter}' is the base model; an alias points at adapters"));
            }
            if definition.targets[..index].iter().any(|earlier| earlier.adapter == *adapter) {
                return bad(format!("'{adapter}' is named twice"));
            }
            // Large and small ones would be lost in the sum, and nobody means them.
            if !(1e-6..=1e6).contains(weight) {
                return bad(format!("the weight of '{adapter}' must be between 0.000001 and 1000000, got {weight}"));
            }
            if self.leaving.iter().any(|leaving| **leaving == **adapter) || !names.is_adapter(adapter) {
                return bad(format!("there is no adapter '{adapter}'"));
            }
        }
        Ok(())
    }

    fn check_name(&self, name: &str, names: &dyn Names) -> Result<(), AliasError> {
        let bad = |reason: &str| {
            Err(AliasError::BadName {
                name: name.chars().take(256).collect(),
                reason: reason.to_owned(),
            })
        };
        if let Err(AdapterError::BadName { name, reason }) = check_adapter_name(name, names.base_names()) {
            return Err(AliasError::BadName { name, reason });
        }
        if name.contains(['+', '*']) {
            return bad("contains + or *, which combine adapters");
        }
        if self.arriving.iter().any(|arriving| **arriving == *name) || names.is_adapter(name) {
            return bad("is an adapter's");
        }
        if self.by_name.len() >= MAX_ALIASES && !self.by_name.contains_key(name) {
            return Err(AliasError::TooMany);
        }
        // It would be an alias of an alias.
        let points_at = |alias: &&Arc<Alias>| alias.targets.iter().any(|target| *target.adapter == *name);
        if let Some(alias) = self.by_name.values().find(points_at) {
            return bad(&format!("is what the alias '{}' points at", alias.name));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(Vec<String>);

    impl Names for Fixed {
        fn base_names(&self) -> &[String] {
            &self.0
        }
        fn is_adapter(&self, name: &str) -> bool {
            matches!(name, "v1" | "v2" | "v3")
        }
    }

    fn names() -> Fixed {
        Fixed(vec!["base".into()])
    }

    fn definition(name: &str, targets: &[(&str, f64)]) -> AliasDefinition {
        let targets = targets.iter().map(|&(adapter, weight)| TargetDefinition {
            adapter: adapter.into(),
            weight,
        });
        AliasDefinition {
            name: name.into(),
            targets: targets.collect(),
        }
    }

    fn set(aliases: &Aliases, targets: &[(&str, f64)]) -> Arc<Alias> {
        aliases.set(&definition("support", targets), &names()).unwrap()
    }

    /// What each of many users gets.
    fn choices(alias: &Alias) -> Vec<String> {
        (0..10_000)
            .map(|user| alias.choose(&format!("user-{user}")).adapter.to_string())
            .collect()
    }

    #[test]
    fn shares_are_the_weights_and_each_user_sticks() {
        let aliases = Aliases::default();
        let alias = set(&aliases, &[("v1", 90.0), ("v2", 10.0)]);
        let first = choices(&alias);
        assert_eq!(first, choices(&alias));
        let on_v2 = first.iter().filter(|adapter| *adapter == "v2").count();
        // Binomial with n = 10,000 and p = 0.1: a deviation of 30. The keys are fixed, so this does not vary.
        assert!((910..1090).contains(&on_v2), "{on_v2}");
        // The order and the unit of the weights mean nothing.
        assert_eq!(first, choices(&set(&aliases, &[("v2", 0.1), ("v1", 0.9)])));
        // Another alias over the same adapters tests others.
        let other = aliases.set(&definition("other", &[("v1", 90.0), ("v2", 10.0)]), &names()).unwrap();
        assert_ne!(first, choices(&other));
    }

    #[test]
    fn a_weight_that_grows_only_draws_users_to_its_target() {
        let aliases = Aliases::default();
        let before = choices(&set(&aliases, &[("v1", 90.0), ("v2", 10.0)]));
        let after = choices(&set(&aliases, &[("v1", 70.0), ("v2", 30.0)]));
        let moved: Vec<_> = before.iter().zip(&after).filter(|(before, after)| before != after).collect();
        assert!((1800..2200).contains(&moved.len()), "{}", moved.len());
        assert!(moved.iter().all(|(_, after)| *after == "v2"));
        // One more draws users from both; gone again, it gives them back.
        let third = choices(&set(&aliases, &[("v1", 70.0), ("v2", 30.0), ("v3", 20.0)]));
        assert!(after.iter().zip(&third).all(|(after, third)| third == after || third == "v3"));
        assert!(third.iter().any(|adapter| adapter == "v3"));
        assert_eq!(after, choices(&set(&aliases, &[("v1", 70.0), ("v2", 30.0)])));
    }

    #[test]
    fn counts_stay_with_their_target() {
        let aliases = Aliases::default();
        set(&aliases, &[("v1", 1.0)]);
        let resolve = |name: &'static str| aliases.resolve(name, "ann", &names()).unwrap();
        assert_eq!(resolve("support"), "v1");
        for itself in ["v2", "support*x", "v1+v2", "v1*0.5", "unknown"] {
            assert_eq!(resolve(itself), itself);
        }
        let alias = set(&aliases, &[("v2", 1.0), ("v1", 3.0)]);
        let counts: Vec<u64> = alias.targets().iter().map(AliasTarget::requests_total).collect();
        assert_eq!(counts, [0, 1]);
        assert_eq!(alias.share(&alias.targets()[1]), 0.75);
        assert_eq!(alias.definition(), definition("support", &[("v2", 1.0), ("v1", 3.0)]));
    }

    #[test]
    fn aliases_in_combinations_are_replaced() {
        struct Odd;
        impl Names for Odd {
            fn base_names(&self) -> &[String] {
                &[]
            }
            fn is_adapter(&self, name: &str) -> bool {
                matches!(name, "v1" | "v+2")
            }
        }
        let aliases = Aliases::default();
        set(&aliases, &[("v1", 1.0)]);
        assert_eq!(aliases.resolve("support*0.3+v2", "ann", &names()).unwrap(), "v1*0.3+v2");
        assert_eq!(aliases.resolve("support+v1", "ann", &names()).unwrap(), "v1+v1");
        aliases.set(&definition("odd", &[("v+2", 1.0)]), &Odd).unwrap();
        assert_eq!(aliases.resolve("odd", "ann", &Odd).unwrap(), "v+2");
        let error = aliases.resolve("odd+v1", "ann", &Odd).unwrap_err();
        assert!(error.to_string().contains("which stands for 'v+2'"), "{error}");
    }

    #[test]
    fn what_can_t_be_is_refused_by_name() {
        let aliases = Aliases::default();
        set(&aliases, &[("v1", 1.0)]);
        let one = [("v1", 1.0)];
        let many: Vec<(&str, f64)> = vec![("v1", 1.0); MAX_TARGETS + 1];
        for (name, targets, reason) in [
            ("", &one[..], "is empty"),
            ("a:b", &one, "contains ':'"),
            ("a+b", &one, "combine adapters"),
            ("base", &one, "is the base model's"),
            ("v2", &one, "is an adapter's"),
            ("x", &[], "got 0"),
            ("x", &many, "got 17"),
            ("x", &[("x", 1.0)], "points at itself"),
            ("x", &[("support", 1.0)], "is an alias, too"),
            ("x", &[("base", 1.0)], "is the base model"),
            ("x", &[("v1", 1.0), ("v1", 2.0)], "named twice"),
            ("x", &[("v9", 1.0)], "no adapter 'v9'"),
            ("x", &[("v1", 0.0)], "got 0"),
            ("x", &[("v1", -1.0)], "got -1"),
            ("x", &[("v1", f64::NAN)], "got NaN"),
            ("x", &[("v1", f64::INFINITY)], "got inf"),
        ] {
            let error = aliases.set(&definition(name, targets), &names()).unwrap_err();
            assert!(error.to_string().contains(reason), "{name:?} {targets:?}: {error}");
        }
        assert_eq!(aliases.list().len(), 1);
        assert!(matches!(aliases.remove("x"), Err(AliasError::Unknown { .. })));
    }

    #[test]
    fn adapters_come_and_go_only_where_no_alias_stands() {
        let aliases = Aliases::default();
        set(&aliases, &[("v1", 9.0), ("v2", 1.0)]);
        assert!(matches!(aliases.leave("v2"), Err(AliasError::InUse { ref alias, .. }) if alias == "support"));
        set(&aliases, &[("v1", 1.0)]);
        let leaving = aliases.leave("v2").unwrap();
        assert!(aliases.set(&definition("support", &[("v2", 1.0)]), &names()).is_err());
        drop(leaving);
        set(&aliases, &[("v2", 1.0)]);
        assert!(matches!(aliases.arrive("support"), Err(AdapterError::BadName { .. })));
        let arriving = aliases.arrive("new").unwrap();
        let error = aliases.set(&definition("new", &[("v2", 1.0)]), &names()).unwrap_err();
        assert!(error.to_string().contains("is an adapter's"), "{error}");
        drop(arriving);
        aliases.set(&definition("new", &[("v2", 1.0)]), &names()).unwrap();
        aliases.remove("new").unwrap();
        aliases.remove("support").unwrap();
        assert!(aliases.list().is_empty());
    }
}
