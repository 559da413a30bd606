//! What admins change at run time: adapters come and go, aliases are pointed elsewhere. The routes are forms of these operations.

use std::{sync::Arc, time::Instant};

use polylora_engine::{AdapterError, AdapterInfo, LoadRequest, UnloadMode};

use crate::{
    aliases::{Alias, AliasDefinition},
    app::Gateway,
    auth::Identity,
    error::ApiError,
    metrics::LoadStage,
};

/// What a client wants loaded.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// The name to serve it under.
    pub name: String,
    /// Where it is, as the client says it.
    pub path: String,
    /// Never evicted.
    pub pinned: bool,
    /// Swap atomically if the name is taken.
    pub replace: bool,
    /// Only swap if the name has this version (hex).
    pub expected_version: Option<String>,
}

impl Gateway {
    /// Finds an adapter's files and loads them.
    ///
    /// # Errors
    /// 400 for a name that can't be or is taken, and for what is wrong with the files; 403 and 404 for the path; 409 for another
    /// version than the expected one; 503 if there is no room now.
    pub async fn load_adapter(self: &Arc<Self>, load: Load) -> Result<AdapterInfo, ApiError> {
        let Load {
            name,
            path,
            pinned,
            replace,
            expected_version,
        } = load;
        self.require_lora()?;
        if self.served.names.contains(&name) {
            let reason = "is the base model's".to_owned();
            return Err(AdapterError::BadName { name, reason }.into());
        }
        let moving = self.aliases.arrive(&name)?;
        if !replace && self.engine.adapter_info(&name).is_some_and(|info| info.parts.is_empty()) {
            return Err(AdapterError::AlreadyLoaded { name }.into());
        }
        let began = Instant::now();
        let sources = Arc::clone(&self.sources);
        let from = path.clone();
        // Looking at folders blocks, and downloading does for long.
        let files = tokio::task::spawn_blocking(move || sources.resolve_from_client(&from));
        let files = files.await.map_err(|_| ApiError::internal())??;
        let request = LoadRequest {
            name,
            files,
            source: path,
            pinned,
            replace,
            expected_version,
        };
        let fetched = Instant::now();
        self.metrics.adapter_load_stage(LoadStage::Fetch, fetched - began);
        let loaded = self.engine.load_adapter(request).await;
        drop(moving);
        if loaded.is_ok() {
            self.metrics.adapter_load_stage(LoadStage::Pack, fetched.elapsed());
        }
        loaded.map_err(ApiError::from)
    }

    /// Forgets an adapter's name, and waits for the requests that hold it.
    ///
    /// # Errors
    /// 404 for an unknown name; 409 while an alias points at it.
    pub async fn unload_adapter(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        self.require_lora()?;
        let moving = self.aliases.leave(name)?;
        let unloading = self.engine.unload_adapter(name, UnloadMode::Drain)?;
        drop(moving);
        self.metrics.adapter_unloaded();
        unloading.drained().await;
        Ok(())
    }

    /// Makes an alias, or gives one other targets.
    ///
    /// # Errors
    /// 400 for a name or targets that can't be.
    pub async fn set_alias(self: &Arc<Self>, definition: AliasDefinition) -> Result<Arc<Alias>, ApiError> {
        self.require_lora()?;
        let names = Identity::anonymous();
        Ok(self.aliases.set(&definition, &self.router(&names))?)
    }

    /// Forgets an alias.
    ///
    /// # Errors
    /// 404.
    pub async fn remove_alias(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        self.aliases.remove(name)?;
        Ok(())
    }

    fn require_lora(&self) -> Result<(), ApiError> {
        if self.engine.describe().lora_enabled {
            Ok(())
        } else {
            Err(AdapterError::NotEnabled.into())
        }
    }
}
