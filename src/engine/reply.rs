//! The engine's end of a request's event stream.

use tokio::sync::mpsc::UnboundedSender;

use crate::Error;
use crate::engine::Event;

/// Makes sure that a request gets a last event, come what may.
pub struct Reply {
    sender: UnboundedSender<Event>,
    answered: bool,
}

impl Reply {
    pub fn new(sender: UnboundedSender<Event>) -> Self {
        Reply { sender, answered: false }
    }

    pub fn send(&mut self, event: Event) {
        self.answered |= !matches!(event, Event::Progress(_));
        // A receiver that is gone has cancelled the request; `is_closed` tells.
        let _ = self.sender.send(event);
    }

    /// The last event was sent.
    pub fn is_answered(&self) -> bool {
        self.answered
    }

    /// The other end has hung up.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.answered {
            self.send(Event::Failed(Error::internal("the engine stopped before it answered")));
        }
    }
}
