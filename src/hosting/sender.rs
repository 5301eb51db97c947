//! The program that sends requests, measured alone: whether it could be what a load is slow by.

use std::time::Duration;

use actix_web::{App, HttpResponse, HttpServer, web};
use serde::{Deserialize, Serialize};

use super::fleet::Work;
use super::statistics::quantile;
use super::traffic::{self, Hosts, Lengths, Popularity, Source};
use crate::cli::Client;
use crate::{Error, Result};

/// Clients that find out how fast it can be.
const CLIENTS: usize = 16;
const WINDOW: Duration = Duration::from_secs(2);

/// What it did with a server that answers at once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sender {
    /// Requests a second that it sends and reads the answers of when it does nothing else, on cores that it shares with that
    /// server.
    pub most: f64,
    /// Twice the fastest of the open loads, in requests a second.
    pub rate: f64,
    /// Milliseconds that requests were sent too late at that rate, the 99th percentile.
    pub late: Option<f64>,
}

/// A server in this process that answers without work.
struct Nothing {
    client: Client,
}

impl Hosts for Nothing {
    fn target(&self, _: usize) -> (&Client, Option<String>) {
        (&self.client, None)
    }
    fn work(&self, task: usize) -> Work {
        if task.is_multiple_of(2) { Work::Classify } else { Work::Generate }
    }
}

async fn classified() -> HttpResponse {
    HttpResponse::Ok().content_type("application/json").body(r#"{"results": [], "usage": {"prompt_tokens": 1}}"#)
}

async fn generated() -> HttpResponse {
    let events = "data: {\"text\": \" word\"}\n\n".repeat(32);
    let last =
        "data: {\"text\": \"\", \"usage\": {\"prompt_tokens\": 1, \"completion_tokens\": 32}}\n\ndata: [DONE]\n\n";
    HttpResponse::Ok().content_type("text/event-stream").body(events + last)
}

/// Sends as fast as it can, and at twice the rate `fastest`.
pub async fn measure(fastest: f64, lengths: Lengths, seed: u64) -> Result<Sender> {
    let app = || {
        App::new().route("/v1/classify", web::post().to(classified)).route("/v1/generate", web::post().to(generated))
    };
    let server = HttpServer::new(app).workers(1).disable_signals().bind("127.0.0.1:0").map_err(Error::unavailable)?;
    let address = server.addrs().first().copied().ok_or_else(|| Error::internal("no address"))?;
    let server = server.run();
    let handle = server.handle();
    let thread = std::thread::spawn(move || actix_web::rt::System::new().block_on(server));
    let nothing = Nothing { client: Client::new(&format!("http://{address}"), None, None)? };
    let mut source = Source::new(seed, Popularity::Uniform, 2, lengths)?;
    let closed = traffic::closed(&nothing, &mut source, CLIENTS, WINDOW).await;
    let rate = 2.0 * fastest;
    let open = traffic::open(&nothing, &mut source, rate, WINDOW).await;
    handle.stop(false).await;
    thread.join().map_err(|_| Error::internal("the server that answers at once panicked"))??;
    let late: Vec<f64> = open?.samples.iter().map(|s| s.late).collect();
    Ok(Sender { most: closed.answered() / closed.seconds, rate, late: quantile(&late, 0.99) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_answers_at_once_is_answered() {
        let sender = measure(20.0, Lengths { words: 5, tokens: 5 }, 1).await.unwrap();
        assert!(sender.most > 20.0 && sender.rate == 40.0 && sender.late.is_some(), "{sender:?}");
    }
}
