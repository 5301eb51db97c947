//! What changes the adapter that a name stands for.

use std::sync::Arc;

use super::info::unusable;
use super::names::{Entry, Slot};
use super::{AdapterInfo, Inner, Source, not_found, now};
use crate::adapter::name::{OWNER, check_whole_name};
use crate::adapter::peft::{Loaded, Summary};
use crate::adapter::store::Lease;
use crate::adapter::{Generation, Upload};
use crate::lora::PackedAdapter;
use crate::{Error, Result};

/// What must hold for a change to be made, else [`crate::ErrorKind::Conflict`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    Always,
    /// The name is not taken.
    Absent,
    /// The name stands for this generation.
    Is(Generation),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    Created,
    Replaced,
    /// The same content was there already.
    Unchanged,
}

impl Inner {
    pub(super) fn publish(&self, name: &str, upload: Upload, when: &Condition) -> Result<(AdapterInfo, Published)> {
        check_whole_name(name)?;
        // A tenant would get the base by it too.
        if name.split(OWNER).next() == Some(&self.options.base) {
            return Err(
                Error::bad_request(format!("{name:?} is the base model's id, not free for an adapter")).param("name")
            );
        }
        upload.check_size()?;
        let (packed, summary) = self.validated(&upload)?;
        let generation = packed.generation.clone();
        let path = self.store.object(&generation);
        let entry = Arc::new(Entry {
            generation: generation.clone(),
            source: Source::Store,
            path,
            summary,
            created: now(),
            copy: None,
        });

        // From here on the object cannot be collected; if the change is not made, it is when the lease ends.
        let lease = self.store.lease(&generation);
        self.store.add(&lease, upload.path())?;
        let bytes = packed.bytes;
        if packed.is_placed() {
            self.cache.offer(&generation, packed, bytes);
        }
        let published = self.swap_in(name, entry, bytes, &lease, when);
        self.forget_unnamed(&generation);
        published.map(|(entry, published)| (self.info(name, &self.slot(name), &entry), published))
    }

    /// What came from elsewhere, read, checked, and packed to be offered to the top tier.
    pub(super) fn validated(&self, upload: &Upload) -> Result<(Arc<PackedAdapter>, Summary)> {
        let Loaded { adapter, language, summary } = self.read(upload.path())?;
        let mut packed = self.pack(adapter, language)?;
        self.check_template(&packed)?;
        self.find_pages_for_offer(&mut packed)?;
        Ok((Arc::new(packed), summary))
    }

    /// Refuses a chat template that comes from others than who runs the server.
    fn check_template(&self, packed: &PackedAdapter) -> Result<()> {
        let brings_template = packed.language.as_ref().is_some_and(|own| !own.has_chat_of(&self.options.language));
        if brings_template && !self.options.uploaded_templates {
            return Err(Error::unprocessable(
                "it has a chat template of its own, which is a program that can take any amount of memory; take \
                 chat_template.jinja, or chat_template in tokenizer_config.json, out of it, or start the server with \
                 --allow-uploaded-templates",
            ));
        }
        Ok(())
    }

    /// The instant of publishing: checks the condition, makes the change durable, then visible. `bytes` are
    /// those that it takes in memory.
    fn swap_in(
        &self,
        name: &str,
        entry: Arc<Entry>,
        bytes: usize,
        lease: &Lease,
        when: &Condition,
    ) -> Result<(Arc<Entry>, Published)> {
        let _change = self.change();
        let slot = self.slot(name);
        check(name, &slot, when)?;
        let published = match slot.current() {
            None if slot.is_empty() => Published::Created,
            // The same content from a folder is replaced all the same: it stays when the folder goes.
            Some(Ok(old)) if old.generation == entry.generation && old.source == Source::Store => {
                return Ok((old.clone(), Published::Unchanged));
            }
            _ => Published::Replaced,
        };
        let (others, most) = self.pinned_beside(name, &entry.generation);
        if slot.pinned && others.saturating_add(bytes) > most {
            // How much others have pinned is not a tenant's to know.
            return Err(Error::conflict(format!(
                "adapter {name:?} is pinned, and what is to replace it takes {bytes} bytes, more than can be pinned; \
                 unpin it first"
            )));
        }
        // The old files stay until no reader can find the entry that leads to them.
        let _old = self.lease_stored(&slot);
        self.store.set_name(name, lease, entry.created)?;
        {
            let mut names = self.names_mut();
            names.entry(name.to_string()).or_default().stored = Some(Ok(entry.clone()));
        }
        self.update_pins();
        if let Some(Ok(old)) = slot.current() {
            self.forget_unnamed(&old.generation);
        }
        Ok((entry, published))
    }

    pub(super) fn remove(&self, name: &str, when: &Condition) -> Result<AdapterInfo> {
        let removed = {
            let _change = self.change();
            let slot = self.slot(name);
            if slot.is_empty() {
                return Err(not_found(name));
            }
            check(name, &slot, when)?;
            let Some(stored) = &slot.stored else {
                let origin = match (&slot.directory, &slot.offer) {
                    (None, Some(offer)) => format!("source {}", self.url(offer)),
                    (entry, _) => {
                        let path = entry.as_ref().map_or(String::new(), |e| e.path.display().to_string());
                        format!("read-only folder {path}")
                    }
                };
                return Err(Error::conflict(format!(
                    "adapter {name:?} comes from the {origin}; it can be hidden by an upload of the same name, but not \
                     removed here"
                )));
            };
            let removed = stored.clone().map(|entry| (self.info(name, &slot, &entry), entry.generation.clone()));
            // As for a replacement.
            let _old = self.lease_stored(&slot);
            self.store.remove_name(name)?;
            {
                let mut names = self.names_mut();
                if let Some(slot) = names.get_mut(name) {
                    slot.stored = None;
                    if slot.is_empty() {
                        names.remove(name);
                    }
                }
            }
            self.update_pins();
            removed
        };
        let info = match removed {
            Ok((info, generation)) => {
                self.forget_unnamed(&generation);
                info
            }
            // What could not be read has nothing to tell but that it is gone.
            Err(_) => unusable(name),
        };
        Ok(info)
    }

    fn lease_stored(&self, slot: &Slot) -> Option<Lease> {
        let stored = slot.stored.as_ref()?.as_ref().ok()?;
        Some(self.store.lease(&stored.generation))
    }

    /// Frees the tier of a generation that no request can ask for any more.
    pub(super) fn forget_unnamed(&self, generation: &Generation) {
        if !self.is_named(generation) {
            self.cache.forget(generation);
        }
    }
}

pub(super) fn check(name: &str, slot: &Slot, when: &Condition) -> Result<()> {
    let current = slot.current();
    match (when, &current) {
        (Condition::Absent | Condition::Is(_), None) if !slot.is_empty() => {
            Err(Error::conflict(format!("adapter {name:?} is there already, in a source, and not fetched yet")))
        }
        (Condition::Always, _) | (Condition::Absent, None) => Ok(()),
        (Condition::Absent, Some(Ok(entry))) => {
            Err(Error::conflict(format!("adapter {name:?} is there already, as generation {}", entry.generation)))
        }
        (Condition::Absent, Some(Err(e))) => Err(Error::conflict(format!("adapter {name:?} is there already: {e}"))),
        (Condition::Is(expected), Some(Ok(entry))) if entry.generation == *expected => Ok(()),
        (Condition::Is(expected), Some(Ok(entry))) => Err(Error::conflict(format!(
            "adapter {name:?} is generation {}, not the expected {expected}",
            entry.generation
        ))),
        (Condition::Is(expected), Some(Err(e))) => {
            Err(Error::conflict(format!("adapter {name:?} is not the expected generation {expected}: {e}")))
        }
        (Condition::Is(expected), None) => {
            Err(Error::conflict(format!("there is no adapter {name:?}; expected its generation {expected}")))
        }
    }
}
