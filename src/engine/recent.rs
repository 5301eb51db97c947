//! Tenants that asked lately, whose next request is to be expected.

use std::collections::BTreeMap;

use crate::engine::Client;
use crate::engine::queue::Tenant;

/// Seconds of steps after a request of a tenant in which the next one is expected.
const LATELY: f64 = 10.0;

#[derive(Debug, Default)]
pub struct Recent {
    /// Seconds that steps have taken so far.
    now: f64,
    tenants: BTreeMap<Tenant, Visit>,
}

#[derive(Debug)]
struct Visit {
    client: Client,
    at: f64,
    tokens: usize,
}

impl Recent {
    /// A request of a client begins, and has so many tokens to compute for its first answer.
    pub fn note(&mut self, client: &Client, tokens: usize) {
        let visit = Visit { client: client.clone(), at: self.now, tokens };
        self.tenants.insert(client.tenant.clone(), visit);
    }

    /// Time passes.
    pub fn pass(&mut self, seconds: f64) {
        self.now += seconds;
        let now = self.now;
        self.tenants.retain(|_, visit| now - visit.at < LATELY);
    }

    /// A client of each tenant that asked lately, and the tokens of its last request.
    pub fn clients(&self) -> impl Iterator<Item = (&Client, usize)> {
        self.tenants.values().map(|visit| (&visit.client, visit.tokens))
    }
}
