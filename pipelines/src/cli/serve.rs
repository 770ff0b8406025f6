//! `dataflow serve RUN`

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::registry::Registry;

use super::sample::Weights;
use super::{DeviceArgs, print};
use crate::files::FileError;
use crate::generate::open;
use crate::serve::{Limits, Options, Server};
use crate::signals;

#[derive(Args)]
pub(super) struct Serve {
    /// A run folder, a checkpoint folder in it, or a weight file
    run: PathBuf,
    /// The address to listen at; only this machine can reach the default one
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// The port; 0 takes any that is free
    #[arg(long, value_name = "N", default_value_t = 8000)]
    port: u16,
    /// Sequences that are generated at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=4096))]
    slots: u16,
    /// Tokens of a sequence, the prompt among them, where the model keeps keys and values of all of them; the context
    /// length of training by default
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Sequences that may wait for a slot; past it the answer is 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    queue: u16,
    /// The most tokens that a request may ask for
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// The most tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 32_768, value_parser = clap::value_parser!(u32).range(1..))]
    max_prompt: u32,
    /// The model's name; that of the run by default
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// A file with the token that requests must bring (`Authorization: Bearer …`); the environment variable DATAFLOW_TOKEN
    /// by default
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The element type of the large parameters
    #[arg(long, value_enum, default_value_t)]
    weights: Weights,
    #[command(flatten)]
    device: DeviceArgs,
}

/// How often it is looked whether a signal came.
const GLANCE: Duration = Duration::from_millis(50);

/// From now on the first SIGINT or SIGTERM ends the taking of requests, and a second one the process.
fn stop_on_signals(server: &mut Server) -> Result<(), Errors> {
    signals::listen().map_err(|e| Diagnostic::new(format!("cannot listen to signals: {e}")))?;
    let Some(stop) = server.stopper() else { return Ok(()) };
    let watch = move || {
        while signals::received().is_none() {
            std::thread::sleep(GLANCE);
        }
        eprintln!("stopping: answers that were begun are finished; a second signal ends the program at once");
        // the server may have ended by itself
        let _ = stop.send(());
    };
    let started = std::thread::Builder::new().name("signals".into()).spawn(watch);
    started.map(drop).map_err(|e| Diagnostic::new(format!("cannot start a thread: {e}")).into())
}

impl Serve {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let token = self.token()?;
        let saved = open::saved(&self.run)?;
        let vocabulary = open::vocabulary(&saved);
        let context = self.context.map(|t| t as usize).or_else(|| open::block(&saved)).unwrap_or(1024);
        let sizes = open::Sizes { slots: self.slots.into(), capacity: context, weights: self.weights.dtype() };
        let device = self.device.open(&[])?;
        let described = device.describe();
        let pool = open::pool(&saved, registry, device, &sizes)?;
        let own = self.run.file_stem().map_or("dataflow".into(), |n| n.to_string_lossy().into_owned());
        let name = self.name.clone().unwrap_or(own);
        let queue = usize::from(self.queue);
        let limits = Limits {
            queue,
            prompt_tokens: self.max_prompt as usize,
            max_tokens: self.max_tokens as usize,
            choices: queue.min(Limits::default().choices),
            ..Limits::default()
        };
        if !self.host.is_loopback() && token.is_none() {
            eprintln!("warning: everybody who reaches {} can use the model: set a token with --token-file", self.host);
        }
        let (states, parameters) = pool.bytes();
        let limit = pool.limit().map_or("no limit".to_string(), |n| format!("{n} tokens"));
        let address = SocketAddr::new(self.host, self.port);
        let server = Server::start(Options { address, name: name.clone(), token, limits }, pool, vocabulary);
        let mut server = server.map_err(|e| {
            let error = Diagnostic::new(format!("cannot listen at {address}: {e}"));
            error.help("choose another port with --port, or 0 for any")
        })?;
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        print(&format!(
            "{name}: {:.1} MiB of parameters, {:.1} MiB of states for {} sequences, context: {limit}\n\
             device: {described}\nlistening at http://{}/v1\n",
            mib(parameters),
            mib(states),
            self.slots,
            server.address()
        ));
        stop_on_signals(&mut server)?;
        server.wait().map_err(|e| Diagnostic::new(e.to_string()))?;
        print("stopped: every answer that was begun is out\n");
        Ok(())
    }

    fn token(&self) -> Result<Option<String>, Errors> {
        let token = match &self.token_file {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(FileError::on("read", path));
                Some(text.map_err(|e| Diagnostic::new(e.to_string()))?.trim().to_string())
            }
            None => std::env::var("DATAFLOW_TOKEN").ok(),
        };
        match token {
            Some(token) if token.is_empty() => {
                Err(Diagnostic::new("the token that requests must bring is empty").into())
            }
            token => Ok(token),
        }
    }
}
