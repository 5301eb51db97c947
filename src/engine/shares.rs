//! The places of a step that each tenant is due, and who has more than that.

use std::collections::BTreeMap;

use crate::engine::Client;
use crate::engine::queue::Tenant;

/// Where the tenants stand that have something to run.
pub struct Shares<'a> {
    standings: BTreeMap<&'a Tenant, Standing>,
    /// Places for one unit of share.
    unit: f64,
}

struct Standing {
    share: f64,
    running: usize,
    waiting: usize,
}

impl<'a> Shares<'a> {
    /// Of `places`, by whose sequences run, and whose wait and how many.
    pub fn new(
        places: usize,
        running: impl Iterator<Item = &'a Client>,
        waiting: impl Iterator<Item = (&'a Client, usize)>,
    ) -> Self {
        let mut standings = BTreeMap::new();
        let all = running.map(|client| (client, 1, 0)).chain(waiting.map(|(client, waiting)| (client, 0, waiting)));
        for (client, running, waiting) in all {
            let new = Standing { share: client.share, running: 0, waiting: 0 };
            let standing = standings.entry(&client.tenant).or_insert(new);
            standing.running += running;
            standing.waiting += waiting;
        }
        let sum: f64 = standings.values().map(|standing| standing.share).sum();
        Shares { standings, unit: places as f64 / sum }
    }

    /// Places that are its own, whatever others want.
    fn due(&self, standing: &Standing) -> f64 {
        self.unit * standing.share
    }

    /// It wants no more places than are its own.
    pub fn is_modest(&self, tenant: &Tenant) -> bool {
        self.standings.get(tenant).is_some_and(|s| (s.running + s.waiting) as f64 <= self.due(s))
    }

    /// The tenant that has to give up a place for one more of `tenant`. None where `tenant` would then have more than it is
    /// due, or no other would still have all that it is due; so no place is ever taken back and forth.
    pub fn gives_way(&self, tenant: &Tenant) -> Option<&'a Tenant> {
        let has = |s: &Standing| s.running as f64;
        let own = self.standings.get(tenant)?;
        if has(own) + 1.0 > self.due(own) {
            return None;
        }
        let over = self.standings.iter().filter(|(_, s)| has(s) - 1.0 >= self.due(s));
        let most = over.max_by(|(_, a), (_, b)| (has(a) / a.share).total_cmp(&(has(b) / b.share)));
        most.map(|(tenant, _)| *tenant)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn client(tenant: &str, share: f64) -> Client {
        Client { tenant: Some(tenant.into()), share }
    }

    #[test]
    fn who_has_more_than_its_places_gives_way_to_who_has_less() {
        let (a, b, c) = (client("a", 1.0), client("b", 1.0), client("c", 2.0));
        let shares = |running: &[&Client], waiting: &[(&Client, usize)], tenant: &Client| {
            let shares = Shares::new(8, running.iter().copied(), waiting.iter().copied());
            (
                shares.is_modest(&tenant.tenant),
                shares.gives_way(&tenant.tenant).cloned().flatten().map(|t| t.to_string()),
            )
        };
        // Alone it may have all, and whatever waits is its own.
        assert_eq!(shares(&[&a; 8], &[(&a, 1)], &a), (false, None));
        assert_eq!(shares(&[&a; 8], &[(&a, 90), (&b, 1)], &b), (true, Some("a".into())));
        assert_eq!(shares(&[&a, &a, &a, &a, &b, &b, &b, &b], &[(&a, 1), (&b, 1)], &b), (false, None));
        assert_eq!(shares(&[&a, &a, &a, &a, &a, &b, &b, &b], &[(&b, 2)], &b), (false, Some("a".into())));
        assert_eq!(shares(&[&a, &a, &a, &b], &[], &b), (true, None));
        // Four of c's places are its own, two of each other's.
        let running = [&a, &a, &a, &b, &b, &c, &c, &c];
        assert_eq!(shares(&running, &[(&c, 1), (&b, 1)], &c), (true, Some("a".into())));
        assert_eq!(shares(&running, &[(&c, 1), (&b, 1)], &b), (false, None));
    }

    proptest! {
        /// Who gives way keeps what it is due, who gets the place has not more, and it ends.
        #[test]
        fn places_are_never_taken_back_and_forth(
            shares in prop::collection::vec(0.1f64..10.0, 1..6),
            mut running in prop::collection::vec(0usize..6, 6),
        ) {
            let clients: Vec<Client> = shares.iter().enumerate().map(|(i, s)| client(&i.to_string(), *s)).collect();
            let places: usize = running[..clients.len()].iter().sum();
            let sum: f64 = shares.iter().sum();
            let due = |i: usize| places as f64 * shares[i] / sum;
            for _ in 0..=places {
                let moved = (0..clients.len()).find_map(|i| {
                    let run = clients.iter().zip(&running).flat_map(|(client, n)| std::iter::repeat_n(client, *n));
                    let shares = Shares::new(places, run, clients.iter().map(|client| (client, 1)));
                    let from = shares.gives_way(&clients[i].tenant)?.clone();
                    Some((clients.iter().position(|client| client.tenant == from)?, i))
                });
                let Some((from, to)) = moved else { return Ok(()) };
                (running[from], running[to]) = (running[from] - 1, running[to] + 1);
                prop_assert!(running[from] as f64 + 1e-9 >= due(from) && running[to] as f64 <= due(to) + 1e-9);
            }
            prop_assert!(false, "places moved more often than there are");
        }
    }
}
