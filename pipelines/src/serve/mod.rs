//! An HTTP server with OpenAI's completion interface over a trained model.
//!
//! Connections are handled by one thread ([`http`], [`protocol`]), the model by another ([`engine`]), which takes requests
//! from a bounded queue and lets all that are active share every step: a new one joins while others are in the middle of
//! their texts, and leaves when it is done or its client is gone.

pub mod engine;
pub mod http;
pub mod protocol;
pub mod tokens;

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::generate::pool::Pool;
use crate::generate::vocabulary::Vocabulary;
use engine::Engine;

/// What a server allows.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Requests that wait for a slot; past it the answer is 429.
    pub queue: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens that a request may ask for.
    pub max_tokens: usize,
    /// Prompts of a request times answers to each.
    pub choices: usize,
    /// Bytes of a request.
    pub body_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { queue: 64, prompt_tokens: 32_768, max_tokens: 16_384, choices: 128, body_bytes: 4 << 20 }
    }
}

/// What a server needs to know.
pub struct Options {
    /// Where it listens; port 0 takes any that is free.
    pub address: SocketAddr,
    /// The model's name in answers.
    pub name: String,
    /// If given, requests must bring `Authorization: Bearer` with this.
    pub token: Option<String>,
    /// What is allowed.
    pub limits: Limits,
}

/// A server at work.
pub struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    connections: Option<JoinHandle<std::io::Result<()>>>,
}

impl Server {
    /// Starts to listen.
    ///
    /// # Errors
    /// An address that cannot be had, or no threads left.
    pub fn start(options: Options, pool: Pool, vocabulary: Option<Vocabulary>) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let listener = runtime.block_on(TcpListener::bind(options.address))?;
        let address = listener.local_addr()?;
        let facts = engine::Facts::new(&pool, vocabulary);
        let (engine, jobs) = Engine::new(pool, facts.clone(), options.limits.queue);
        let model = std::thread::Builder::new().name("model".into()).spawn(move || engine.run())?;
        let service = http::router(Arc::new(http::Service::new(options, facts, jobs)));
        let (stop, stopped) = oneshot::channel::<()>();
        let connections = std::thread::Builder::new().name("connections".into()).spawn(move || {
            let stopped = async move {
                let _ = stopped.await;
            };
            let done = runtime.block_on(axum::serve(listener, service).with_graceful_shutdown(stopped).into_future());
            // all senders of jobs are gone by now, so that the model's thread ends
            drop(runtime);
            let _ = model.join();
            done
        })?;
        Ok(Self { address, stop: Some(stop), connections: Some(connections) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What stops it, for another thread.
    pub fn stopper(&mut self) -> Option<oneshot::Sender<()>> {
        self.stop.take()
    }

    /// Waits until it is stopped and has answered what it has accepted.
    ///
    /// # Errors
    /// What ended it.
    pub fn wait(mut self) -> std::io::Result<()> {
        match self.connections.take().map(JoinHandle::join) {
            Some(Ok(done)) => done,
            Some(Err(_)) => Err(std::io::Error::other("the thread of the connections panicked; please report it")),
            None => Ok(()),
        }
    }
}
