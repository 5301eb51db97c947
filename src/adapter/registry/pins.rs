//! Adapters that stay in memory whatever else is wanted.

use std::collections::HashSet;

use super::{Inner, not_found};
use crate::adapter::Generation;
use crate::lora::PackedAdapter;
use crate::{Error, Result};

/// Pinned adapters may take this part of the top tier, so that loads of others find room without waiting for it.
const PINNED_SHARE: usize = 2;

impl Inner {
    /// What pinned names stand for.
    pub(super) fn pinned(&self) -> HashSet<Generation> {
        let names = self.names();
        let pinned = names.values().filter(|slot| slot.pinned);
        pinned.filter_map(|slot| Some(slot.current()?.ok()?.generation.clone())).collect()
    }

    /// Tells the cache what pinned names stand for. Called under `changes`, after a change.
    pub(super) fn update_pins(&self) {
        self.cache.pin(self.pinned());
    }

    /// Bytes that pinned adapters take beside `generation`, which `name` is to stand for, and those that all may take.
    pub(super) fn pinned_beside(&self, name: &str, generation: &Generation) -> (usize, usize) {
        let others: HashSet<Generation> = {
            let names = self.names();
            let pinned = names.iter().filter(|(other, slot)| slot.pinned && *other != name);
            pinned.filter_map(|(_, slot)| Some(slot.current()?.ok()?.generation.clone())).collect()
        };
        let others = others.iter().filter(|other| *other != generation);
        let others = others.filter_map(|generation| Some(self.cache.presence(generation)?.bytes)).sum();
        (others, self.cache.limit() / PINNED_SHARE)
    }

    /// Whether there is room to pin `adapter`, which `name` stands for.
    fn check_pin(&self, name: &str, adapter: &PackedAdapter) -> Result<()> {
        let (others, most) = self.pinned_beside(name, &adapter.generation);
        match others.saturating_add(adapter.bytes) <= most {
            true => Ok(()),
            false => Err(Error::conflict(format!(
                "adapter {name:?} takes {} bytes and others that are pinned {others}; of the {} bytes that adapters may \
                 take {most} may be pinned",
                adapter.bytes,
                self.cache.limit()
            ))),
        }
    }

    /// Pins `name`, which stands for `adapter`, or unpins it where there is none.
    pub(super) fn set_pinned(&self, name: &str, adapter: Option<&PackedAdapter>) -> Result<()> {
        let _change = self.change();
        adapter.map_or(Ok(()), |adapter| self.check_pin(name, adapter))?;
        {
            let mut names = self.names_mut();
            names.get_mut(name).ok_or_else(|| not_found(name))?.pinned = adapter.is_some();
        }
        self.update_pins();
        Ok(())
    }
}
