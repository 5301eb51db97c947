//! What waits to run, and whose turn it is: the virtual token counter of Sheng et al., *Fairness in Serving Large Language
//! Models* (OSDI 2024).
//!
//! Each tenant has a counter of the work done for it. The next sequence is the oldest of the tenant whose counter is lowest,
//! so that all who wait get the same, whatever each has queued. A tenant that had nothing waiting is lifted to the level of the
//! others when it comes back: time in which it did not ask is not saved up.
//!
//! A tenant that wants no more than its own places ([`Shares`](super::shares::Shares)) has its turn before that: it cannot take
//! from others what is theirs.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::engine::Client;
use crate::engine::scheduler::{Order, Sequence};

/// Work of a generated token; one of a prompt is 1.
pub const DRAWN: f64 = 2.0;

/// `None` for all who are of no tenant.
pub type Tenant = Option<Arc<str>>;

pub struct Queue<P> {
    /// By the order of arrival; none is empty.
    lines: HashMap<Tenant, BTreeMap<Order, Sequence<P>>>,
    /// Work done for each tenant, over its share.
    served: HashMap<Tenant, f64>,
    /// The counter of the tenant whose line ended last.
    level: f64,
}

impl<P> Default for Queue<P> {
    fn default() -> Self {
        Queue { lines: HashMap::new(), served: HashMap::new(), level: 0.0 }
    }
}

impl<P> Queue<P> {
    fn served(&self, tenant: &Tenant) -> f64 {
        self.served.get(tenant).copied().unwrap_or(0.0)
    }

    /// A sequence that has just come.
    pub fn add(&mut self, sequence: Sequence<P>) {
        let tenant = &sequence.client.tenant;
        if !self.lines.contains_key(tenant) {
            let level = self.lines.keys().map(|other| self.served(other)).reduce(f64::min).unwrap_or(self.level);
            let served = self.served(tenant).max(level);
            self.served.insert(tenant.clone(), served);
        }
        self.put_back(sequence);
    }

    /// A sequence that was here before.
    pub fn put_back(&mut self, sequence: Sequence<P>) {
        self.lines.entry(sequence.client.tenant.clone()).or_default().insert(sequence.order, sequence);
    }

    /// Whose turn it is: before all others that of the tenants that `first` names.
    pub fn turn(&self, first: impl Fn(&Tenant) -> bool) -> Option<&Tenant> {
        // Of equals the one that came first: the order must not depend on a hash.
        let turn = |(tenant, line): &(&Tenant, &BTreeMap<Order, Sequence<P>>)| {
            (!first(tenant), self.served(tenant), line.keys().next().copied())
        };
        let next = self.lines.iter().min_by(|a, b| {
            let (a, b) = (turn(a), turn(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2))
        });
        next.map(|(tenant, _)| tenant)
    }

    /// The oldest sequence of a tenant.
    pub fn pop(&mut self, tenant: &Tenant) -> Option<Sequence<P>> {
        let line = self.lines.get_mut(tenant)?;
        let (_, sequence) = line.pop_first()?;
        if line.is_empty() {
            self.lines.remove(tenant);
            self.level = self.served(tenant);
        }
        Some(sequence)
    }

    /// Counts work for a client.
    pub fn charge(&mut self, client: &Client, work: f64) {
        match self.served.get_mut(&client.tenant) {
            Some(served) => *served += work / client.share,
            None => drop(self.served.insert(client.tenant.clone(), work / client.share)),
        }
    }

    /// A client of each tenant, and how many of the tenant's sequences wait.
    pub fn clients(&self) -> impl Iterator<Item = (&Client, usize)> {
        self.lines.values().filter_map(|line| Some((&line.values().next()?.client, line.len())))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Sequence<P>> {
        self.lines.values().flat_map(BTreeMap::values)
    }

    pub fn retain(&mut self, keep: impl Fn(&Sequence<P>) -> bool) {
        let served = &self.served;
        let mut ended: Option<f64> = None;
        self.lines.retain(|tenant, line| {
            line.retain(|_, sequence| keep(sequence));
            if line.is_empty() {
                let level = served.get(tenant).copied().unwrap_or(0.0);
                ended = Some(ended.map_or(level, |ended| ended.max(level)));
            }
            !line.is_empty()
        });
        self.level = ended.unwrap_or(self.level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::scheduler::Rows;

    fn sequence(number: u64, tenant: &str, share: f64) -> Sequence<()> {
        let client = Client { tenant: Some(tenant.into()), share };
        Sequence::new((number, 0), vec![1; 10], None, Rows::Last, ()).of(client)
    }

    /// Who runs, `count` times, when each that runs takes `work`.
    fn turns(queue: &mut Queue<()>, count: usize, work: f64) -> String {
        (0..count)
            .filter_map(|_| {
                let tenant = queue.turn(|_| false)?.clone();
                let sequence = queue.pop(&tenant)?;
                queue.charge(&sequence.client, work);
                sequence.client.tenant.map(|tenant| tenant.to_string())
            })
            .collect()
    }

    #[test]
    fn a_flood_does_not_keep_others_waiting() {
        let mut queue = Queue::default();
        (0..100).for_each(|i| queue.add(sequence(i, "a", 1.0)));
        assert_eq!(turns(&mut queue, 3, 10.0), "aaa");
        (100..104).for_each(|i| queue.add(sequence(i, "b", 1.0)));
        (104..108).for_each(|i| queue.add(sequence(i, "c", 1.0)));
        // At the level of those that wait, not three turns ahead of them.
        assert_eq!(turns(&mut queue, 9, 10.0), "abcabcabc");
    }

    #[test]
    fn a_share_is_a_proportion() {
        let mut queue = Queue::default();
        (0..30).for_each(|i| queue.add(sequence(i, "a", 2.0)));
        (30..60).for_each(|i| queue.add(sequence(i, "b", 1.0)));
        let turns = turns(&mut queue, 30, 1.0);
        assert_eq!(turns.matches('a').count(), 20, "{turns}");
    }

    #[test]
    fn absence_is_not_saved_up() {
        let mut queue = Queue::default();
        queue.add(sequence(0, "b", 1.0));
        assert_eq!(turns(&mut queue, 1, 1.0), "b");
        (1..50).for_each(|i| queue.add(sequence(i, "a", 1.0)));
        assert_eq!(turns(&mut queue, 40, 1.0), "a".repeat(40));
        (50..60).for_each(|i| queue.add(sequence(i, "b", 1.0)));
        assert_eq!(turns(&mut queue, 8, 1.0).matches('b').count(), 4);
        // Nor lost by a queue that was empty for a while.
        turns(&mut queue, 100, 1.0);
        queue.add(sequence(60, "c", 1.0));
        queue.add(sequence(61, "a", 1.0));
        assert_eq!(turns(&mut queue, 2, 1.0), "ca");
    }

    #[test]
    fn a_line_that_all_have_left_ends_like_any_other() {
        let mut queue = Queue::default();
        (0..50).for_each(|i| queue.add(sequence(i, "a", 1.0)));
        assert_eq!(turns(&mut queue, 40, 1.0), "a".repeat(40));
        queue.retain(|_| false);
        (50..60).for_each(|i| queue.add(sequence(i, "b", 1.0)));
        (60..70).for_each(|i| queue.add(sequence(i, "a", 1.0)));
        assert_eq!(turns(&mut queue, 8, 1.0).matches('a').count(), 4);
    }

    #[test]
    fn within_a_tenant_the_first_comes_first_also_when_put_back() {
        let mut queue = Queue::default();
        [3, 1, 2].into_iter().for_each(|i| queue.add(sequence(i, "a", 1.0)));
        let tenant = Some("a".into());
        let first = queue.pop(&tenant).unwrap();
        assert_eq!(first.order, (1, 0));
        queue.put_back(first);
        assert_eq!(queue.iter().count(), 3);
        queue.retain(|sequence| sequence.order.0 != 2);
        assert_eq!([queue.pop(&tenant), queue.pop(&tenant)].map(|s| s.unwrap().order.0), [1, 3]);
        assert!(queue.pop(&tenant).is_none() && queue.turn(|_| false).is_none());
    }
}
