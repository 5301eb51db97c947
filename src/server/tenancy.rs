//! Which adapters a caller means, sees and may change. A tenant's adapters are called `NAME@TENANT` in the registry; the tenant
//! knows them as `NAME`, and those without a tenant too, which are everybody's. Its own comes first.

use serde_json::{Value, json};

use super::State;
use super::access::Caller;
use crate::adapter::{AdapterInfo, OWNER, check_name, check_whole_name};
use crate::{Error, ErrorKind, Result};

/// What a tenant is not told of an adapter that others use too.
const OF_OTHERS: [&str; 5] = ["tier", "memory_bytes", "in_flight", "requests", "last_used"];

impl Caller {
    /// The whole name under which the caller would publish `name`.
    pub fn own(&self, name: &str) -> Result<String> {
        match self.tenant() {
            Some(tenant) => check_name(name).map(|()| format!("{name}{OWNER}{tenant}")),
            None if self.is_operator() => check_whole_name(name).map(|()| name.to_string()),
            None => check_name(name).map(|()| name.to_string()),
        }
    }

    /// What the caller calls the adapter of this whole name; `None` where that is another tenant's.
    pub fn called<'a>(&self, whole: &'a str) -> Option<&'a str> {
        match (self.tenant(), whole.split_once(OWNER)) {
            (Some(tenant), Some((name, owner))) => (owner == tenant).then_some(name),
            _ => Some(whole),
        }
    }

    /// An adapter as the caller is told of it.
    pub fn told(&self, mut info: AdapterInfo) -> Option<Value> {
        let shared = !info.name.contains(OWNER);
        info.name = self.called(&info.name)?.to_string();
        let mut told = json!(info);
        if let (Some(_), true, Some(map)) = (self.tenant(), shared, told.as_object_mut()) {
            map.retain(|key, _| !OF_OTHERS.contains(&key.as_str()));
        }
        Some(told)
    }
}

impl State {
    /// The whole name of the adapter that the caller means by `name`. Whether there is one is not looked at, but that it could be
    /// the caller's.
    pub fn meant(&self, caller: &Caller, name: &str) -> Result<String> {
        if name.contains(OWNER) && !caller.is_operator() {
            check_name(name)?;
        }
        match caller.tenant().map(|tenant| format!("{name}{OWNER}{tenant}")) {
            Some(own) if self.registry.has(&own) => Ok(own),
            _ => Ok(name.to_string()),
        }
    }

    /// The whole name of the adapter that the caller wants to change by `name`. Errors: `Forbidden` for a tenant that means one of
    /// everybody's; `NotFound`.
    pub fn changed(&self, caller: &Caller, name: &str) -> Result<String> {
        let whole = self.meant(caller, name)?;
        match caller.tenant() {
            // Also where there is none: by the time of the change it may be everybody's.
            Some(tenant) if !whole.contains(OWNER) => match self.registry.get(&whole) {
                Err(e) if e.kind == ErrorKind::NotFound => Err(e),
                _ => {
                    let what = format!(
                        "adapter {name:?} is everybody's; a key of tenant {tenant} can change the tenant's alone"
                    );
                    Err(Error::new(ErrorKind::Forbidden, what))
                }
            },
            _ => Ok(whole),
        }
    }

    /// The adapters that the caller sees, by the names that it knows: its own hide everybody's of the same name.
    pub fn seen(&self, caller: &Caller) -> Vec<AdapterInfo> {
        let mut all = self.registry.list();
        all.retain(|info| match caller.tenant() {
            _ if caller.called(&info.name).is_none() => false,
            Some(tenant) if !info.name.contains(OWNER) => !self.registry.has(&format!("{}{OWNER}{tenant}", info.name)),
            _ => true,
        });
        all
    }
}
