//! The `loramux` program.

mod adapters;
mod args;
mod bench;
mod bytes;
mod client;
mod config;
mod host;
mod keys;
mod methods;
mod oneshot;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

pub(crate) use adapters::push;
pub(crate) use client::Client;

use args::{BenchCommand, Cli, Command, ServeArgs};
use host::{Host, Limits};

use crate::engine::Grammars;
use crate::server::{Access, Audit, Certificate, Entrance, Origins};
use crate::signals::Signals;
use crate::{Error, Result, hosting, output, server};

/// What is logged where nobody says otherwise. What strangers send that is no HTTP is no error of the server's, as it is to
/// actix, and must not fill the log.
const LOGGED: &str = "info,actix_http::h1::dispatcher=off";

/// Lets the program's log go to standard error; `LORAMUX_LOG` says how much of it, and `LORAMUX_LOG_FORMAT=json` makes each line
/// a JSON object.
pub(crate) fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("LORAMUX_LOG");
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| LOGGED.into()))
        .with_writer(std::io::stderr)
        .with_target(false);
    match std::env::var("LORAMUX_LOG_FORMAT").as_deref() {
        Ok("json") => log.json().flatten_event(true).init(),
        _ => log.init(),
    }
}

/// Parses the command line and runs it. Results go to stdout, everything else to stderr.
pub fn run() -> Result<()> {
    log_to_stderr();
    let Cli { command } = config::parse()?;
    let command = match command {
        Command::Serve(args) => return serve(args),
        Command::Fetch { model } => {
            return output::line(crate::base::fetch(&model)?.display());
        }
        Command::Keys(command) => return keys::run(command),
        other => other,
    };
    tokio::runtime::Runtime::new()?.block_on(async {
        match command {
            Command::Generate(args) => interruptible(oneshot::generate(args)).await,
            Command::Classify(args) => interruptible(oneshot::classify(args)).await,
            Command::Adapters(command) => adapters::run(command).await,
            Command::Bench(BenchCommand::Serve(args)) => bench::serve(args).await,
            Command::Bench(BenchCommand::Engine(args)) => bench::engine(args).await,
            Command::Bench(BenchCommand::Hosting(args)) => interruptible(hosting::command::run(args.options())).await,
            Command::Bench(BenchCommand::Methods(args)) => interruptible(methods::bench(args)).await,
            Command::Serve(_) | Command::Fetch { .. } | Command::Keys(_) => unreachable!("answered above"),
        }
    })
}

/// Ends on SIGINT and SIGTERM as on an error, so that temporary files are deleted and programs that it started end, too.
pub(crate) async fn interruptible(work: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::select! {
        // Loading does not wait for anything, so until it is done a signal still ends the process by itself.
        biased;
        done = work => done,
        stopped = stopped() => stopped,
    }
}

/// Waits for a signal, which is an error.
async fn stopped() -> Result<()> {
    Signals::new()?.next().await;
    Err(Error::unavailable("interrupted"))
}

fn serve(args: ServeArgs) -> Result<()> {
    let store = args.store.map_or_else(host::default_store, Ok)?;
    let timeout = (args.request_timeout > 0).then(|| Duration::from_secs(args.request_timeout));
    let access = Access::open(args.keys, timeout)?.allowing(Origins::new(args.allow_origin)?);
    let access = Arc::new(access.listening(&args.listen, args.allow_anonymous)?);
    let audit = Audit::open(args.audit_log.as_deref())?;
    let certificate = match (args.tls_cert, args.tls_key) {
        (Some(chain), Some(key)) => Some(Certificate::open(chain, key)?),
        (None, None) => None,
        // Not for clap to see: to it what stands in --config is a default, which asks for nothing.
        _ => return Err(Error::bad_request("--tls-cert and --tls-key go together, and one of them is missing")),
    };
    let drain_timeout = Duration::from_secs(args.drain_timeout);
    let entrance = Entrance { listen: args.listen, certificate, drain_timeout };
    let own = access.clone();
    let limits = Limits {
        store,
        max_sequences: args.max_sequences,
        max_batch_tokens: args.max_batch_tokens,
        max_prefill_tokens: args.max_prefill_tokens,
        tenant_slowdown: args.tenant_slowdown,
        max_queue: args.max_queue,
        max_upload: args.max_upload.0,
        uploaded_templates: args.allow_uploaded_templates,
        sources: args.source,
        source_refresh: Duration::from_secs(args.source_refresh),
        source_cache: args.source_cache.0,
    };
    let load = move || {
        let host = Host::start(&args.model, limits)?;
        Ok(server::State {
            context: host.decoder.config().context,
            device: host.device_name,
            engine: host.engine,
            registry: host.registry,
            language: host.language,
            metrics: host.metrics,
            base_id: host.base_id,
            base_names: args.served_model_name,
            labels: host.labels,
            dtype: host.dtype,
            allow_local_paths: args.allow_local_paths,
            grammars: Grammars::default(),
            draining: false.into(),
            uploads: Semaphore::new(server::UPLOADS),
            access: own,
            audit,
        })
    };
    server::serve(entrance, access, load)
}
