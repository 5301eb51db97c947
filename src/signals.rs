//! What the system or a user sends to end a program.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::Result;

/// SIGTERM and SIGINT. From [`Self::new`] on they no longer end the process by themselves.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// # Errors
    /// If the system refuses, or outside a runtime.
    pub fn new() -> Result<Self> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
