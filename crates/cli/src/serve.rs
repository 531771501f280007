//! `mirai serve` and `mirai check-config`.
//!
//! Owns the order: configuration, bind, load beside the bound server, serve, drain. The two lines on standard
//! output are a contract with people and scripts: `listening on …`, `ready in … s`.

use std::io::Write;
use std::time::Instant;

use mirai_server::{BindError, ExitReason, IdentitySummary, Server, ServerHandle};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::ServeArgs;
use crate::config::Config;
use crate::exit::Failure;
#[cfg(not(feature = "test-hooks"))]
use crate::load;
use crate::{device, ledger, logging, quotas, usage};

/// Resolves all layers and checks what can be checked without touching the machine.
fn configuration(args: &ServeArgs) -> Result<Config, Failure> {
    let config = args.resolve()?;
    check_engine(&config)?;
    device::check(&config)?;
    config.energy.check().map_err(Failure::usage)?;
    ledger::check(&config.ledger)?;
    quotas::check(&config)?;
    usage::check(&config.usage, config.ledger.store.is_some())?;
    config.server.validate().map_err(Failure::usage)?;
    Ok(config)
}

/// Bounds that belong to no other crate's configuration.
fn check_engine(config: &Config) -> Result<(), Failure> {
    let engine = &config.engine;
    let bounds: [(&str, u64, u64, u64); 6] = [
        ("engine.max_num_seqs", engine.max_num_seqs.into(), 1, 65_536),
        ("engine.max_num_batched_tokens", engine.max_num_batched_tokens.unwrap_or(1).into(), 1, 1 << 20),
        ("engine.max_queued_requests", engine.max_queued_requests as u64, 1, 1 << 20),
        ("engine.max_queued_tokens", engine.max_queued_tokens as u64, 1, 1 << 40),
        ("engine.matmul_candidates", engine.matmul_candidates as u64, 1, 64),
        ("engine.threads", engine.threads.unwrap_or(1) as u64, 1, 1024),
    ];
    for (name, value, least, most) in bounds {
        if !(least..=most).contains(&value) {
            return Err(Failure::usage(format!("{name} is {value}, but must be from {least} to {most}")));
        }
    }
    Ok(())
}

/// Prints what is in force, as a configuration file. Keys are counted, never shown.
pub(crate) fn check_config(args: &ServeArgs) -> Result<(), Failure> {
    let config = configuration(args)?;
    let text = toml::to_string(&config).map_err(Failure::run)?;
    let IdentitySummary { keys, applications } =
        IdentitySummary::read(&config.server).map_err(Failure::usage)?;
    let plural = |count| if count == 1 { "" } else { "s" };
    let mut out = std::io::stdout().lock();
    writeln!(out, "# {keys} API key{}, not shown", plural(keys)).map_err(Failure::run)?;
    if config.identity.applications_file.is_some() {
        writeln!(out, "# {applications} application{}", plural(applications)).map_err(Failure::run)?;
    }
    write!(out, "{text}").map_err(Failure::run)
}

/// Serves until told to end.
pub(crate) fn run(args: &ServeArgs) -> Result<(), Failure> {
    let started = Instant::now();
    let config = configuration(args)?;
    logging::start(&config.log)?;
    #[cfg(feature = "test-hooks")]
    let loader = crate::hooks::loader(&args.hooks);
    #[cfg(not(feature = "test-hooks"))]
    let loader = {
        let device = device::choose(&config)?;
        move |config: &Config, server: &ServerHandle| load::load(config, device, server)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::environment(format!("cannot start the runtime: {e}")))?;
    let result = runtime.block_on(serve(config, loader, started));
    // Nothing that still runs may keep the process: what had to end has ended.
    runtime.shutdown_background();
    result
}

async fn serve<F>(config: Config, load: F, started: Instant) -> Result<(), Failure>
where
    F: FnOnce(&Config, &ServerHandle) -> Result<mirai_server::ServedModel, Failure> + Send + 'static,
{
    let server = Server::bind(config.server.clone()).await.map_err(|e| match e {
        BindError::Config(_) | BindError::Tls(_) | BindError::Identity(_) => Failure::usage(e),
        BindError::Listen { .. } | BindError::Thread(_) => Failure::environment(e),
    })?;
    let scheme = if server.is_tls() { "https" } else { "http" };
    print_line(&format!("listening on {scheme}://{}", server.local_addr()))?;
    if let Some(address) = server.metrics_addr() {
        tracing::info!(%address, "metrics have an address of their own");
    }
    if let Some(address) = server.admin_addr() {
        tracing::info!(%address, "administrators have an address of their own");
    }
    let handle = server.handle();
    listen_to_signals(&handle)?;
    let for_load = handle.clone();
    let loading = tokio::task::spawn_blocking(move || {
        // First: a store that cannot be had should not cost a load.
        if let Some(accounting) = ledger::start(&config.ledger, &config.usage)? {
            let replica = accounting.replica.clone();
            for_load.account(accounting).map_err(Failure::run)?;
            usage::start(&config, &replica, &for_load)?;
        }
        if let Some(quotas) = quotas::start(&config)? {
            for_load.quotas(quotas).map_err(Failure::run)?;
        }
        let model = load(&config, &for_load)?;
        for_load.ready(model).map_err(Failure::run)?;
        print_line(&format!("ready in {:.2} s", started.elapsed().as_secs_f64()))
    });
    let mut serving = tokio::spawn(server.run());
    tokio::select! {
        loaded = loading => {
            if let Err(failure) = loaded.map_err(|e| Failure::run(format!("loading panicked: {e}")))? {
                handle.failed(&failure.to_string());
                return Err(failure);
            }
            ended(serving.await)
        }
        reason = &mut serving => ended(reason),
    }
}

fn ended(reason: Result<ExitReason, tokio::task::JoinError>) -> Result<(), Failure> {
    match reason.map_err(|e| Failure::run(format!("the server panicked: {e}")))? {
        ExitReason::Drained => {
            tracing::info!("drained; bye");
            Ok(())
        }
        ExitReason::Cut(streams) => {
            tracing::warn!(streams, "the shutdown timeout cut streams off");
            Ok(())
        }
        ExitReason::Forced => {
            tracing::warn!("ended at once, as asked");
            Ok(())
        }
        ExitReason::LedgerBroken => {
            Err(Failure::run("the ledger's store must not be used any more; a restart recovers it"))
        }
        ExitReason::EngineDied(reason) => Err(Failure::run(format!("the engine died: {reason}"))),
    }
}

/// SIGTERM and SIGINT drain; a second one ends at once.
fn listen_to_signals(handle: &ServerHandle) -> Result<(), Failure> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).map_err(Failure::environment)?;
        let handle = handle.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                tracing::info!("signal received: draining (a second one ends at once)");
                handle.shutdown();
            }
        });
    }
    Ok(())
}

/// One line of the contract, flushed: whoever waits for it reads a pipe.
fn print_line(line: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(Failure::run)
}
