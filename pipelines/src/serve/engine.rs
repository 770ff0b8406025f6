//! The thread of the model: continuous batching over the slots of a pool.

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded};
use dataflow_graph::diagnostic::Errors;
use tokio::sync::mpsc::UnboundedSender;

use crate::generate::pool::{Next, Pool};
use crate::generate::sampling::{Sampler, Sampling, log_sum_exp, most_likely};
use crate::generate::stops::Stops;
use crate::generate::vocabulary::{Characters, Vocabulary};

/// Tokens of a prompt that are taken in between two steps of those that are further. It is a multiple of the pool's longest
/// piece, so that a prompt is cut as it would be in one go.
const BETWEEN_STEPS: usize = 256;

/// What does not change about the model.
#[derive(Clone)]
pub struct Facts {
    /// What turns text into tokens.
    pub vocabulary: Option<Arc<Vocabulary>>,
    /// Tokens from here on stand for nothing.
    pub known: usize,
    /// The most tokens of a sequence.
    pub limit: Option<usize>,
    /// Sequences at once.
    pub slots: usize,
}

impl Facts {
    /// Those of a pool.
    pub fn new(pool: &Pool, vocabulary: Option<Vocabulary>) -> Self {
        let known = vocabulary.as_ref().map_or(pool.classes(), |v| v.len().min(pool.classes()));
        Self { vocabulary: vocabulary.map(Arc::new), known, limit: pool.limit(), slots: pool.slots() }
    }

    /// The bytes of a token; its number where there is no text.
    pub fn bytes(&self, token: u32) -> Vec<u8> {
        match &self.vocabulary {
            Some(vocabulary) => vocabulary.bytes(token).unwrap_or_default(),
            None => format!("{token} ").into_bytes(),
        }
    }
}

/// One sequence that is wanted.
pub struct Job {
    /// Its number in the request.
    pub index: usize,
    /// At least one token; all of them known.
    pub prompt: Vec<u32>,
    /// Tokens to generate.
    pub max_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// For the choice.
    pub seed: u64,
    /// Texts that end it.
    pub stops: Vec<String>,
    /// How many of the most likely tokens are wanted beside each token, if log-probabilities are.
    pub logprobs: Option<usize>,
    /// Whether the answer begins with the prompt.
    pub echo: bool,
    /// Where the answer goes. When nobody listens any more the sequence is given up.
    pub events: UnboundedSender<(usize, Event)>,
}

/// A token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its number.
    pub token: u32,
    /// The logarithm of its probability; the first token has none.
    pub logprob: Option<f32>,
    /// The most likely tokens in its place.
    pub top: Vec<(u32, f32)>,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// More text, and tokens with log-probabilities if they are wanted. A token may come before its text.
    Piece {
        /// Whole characters.
        text: String,
        /// Tokens.
        tokens: Vec<Token>,
    },
    /// The end.
    Done {
        /// `stop` or `length`
        reason: &'static str,
        /// Tokens generated.
        generated: usize,
    },
    /// The model cannot go on.
    Failed(String),
}

/// A sequence with a slot.
struct Active {
    job: Job,
    slot: usize,
    /// Tokens that the state knows.
    fed: usize,
    last: u32,
    generated: usize,
    sampler: Sampler,
    characters: Characters,
    stops: Stops,
    over: bool,
}

/// The model with its sequences.
pub struct Engine {
    pool: Pool,
    facts: Facts,
    jobs: Receiver<Job>,
    free: Vec<usize>,
    feeding: VecDeque<Active>,
    decoding: Vec<Active>,
}

impl Engine {
    /// An engine, and the queue to it.
    pub fn new(pool: Pool, facts: Facts, queue: usize) -> (Self, Sender<Job>) {
        let (sender, jobs) = bounded(queue.max(1));
        let free = (0..pool.slots()).rev().collect();
        (Self { pool, facts, jobs, free, feeding: VecDeque::new(), decoding: Vec::new() }, sender)
    }

    /// Works until nobody can send jobs any more and all are done.
    pub fn run(mut self) {
        while self.admit() {
            self.feed();
            self.decode();
            self.sweep();
        }
    }

    /// Gives free slots to jobs; waits for one if there is nothing else to do. `false` at the end.
    fn admit(&mut self) -> bool {
        while !self.free.is_empty() {
            let idle = self.feeding.is_empty() && self.decoding.is_empty();
            let job = match idle {
                true => self.jobs.recv().map_err(|_| TryRecvError::Disconnected),
                false => self.jobs.try_recv(),
            };
            match job {
                Ok(job) => self.start(job),
                Err(TryRecvError::Disconnected) if idle => return false,
                Err(_) => break,
            }
        }
        true
    }

    fn start(&mut self, job: Job) {
        if job.events.is_closed() {
            return;
        }
        let Some(slot) = self.free.pop() else { return };
        let sequence = Active {
            slot,
            fed: 0,
            last: job.prompt.last().copied().unwrap_or_default(),
            generated: 0,
            sampler: Sampler::new(job.sampling, job.seed, job.index as u64),
            characters: Characters::default(),
            stops: Stops::new(job.stops.iter().cloned()),
            over: false,
            job,
        };
        self.feeding.push_back(sequence);
    }

    /// Takes in a part of the oldest prompt that is not yet known.
    fn feed(&mut self) {
        let Some(mut sequence) = self.feeding.pop_front() else { return };
        if sequence.job.echo && sequence.fed == 0 {
            sequence.echo_first(&self.facts);
        }
        // the last token is left to the first step
        let end = sequence.job.prompt.len() - 1;
        let from = sequence.fed;
        let to = (from + BETWEEN_STEPS).min(end);
        let scored = sequence.job.echo && sequence.job.logprobs.is_some();
        let done = match scored {
            false => self.pool.prefill(sequence.slot, from, &sequence.job.prompt[from..to]),
            true => {
                let part = sequence.job.prompt[from..to].to_vec();
                let mut at = from;
                self.pool.score(sequence.slot, from, &part, |logits| {
                    at += 1;
                    sequence.scored(at, logits);
                })
            }
        };
        sequence.fed = to;
        if let Err(error) = done {
            sequence.fail(&error);
        }
        if sequence.fed < end && !sequence.over {
            self.feeding.push_front(sequence);
            return;
        }
        if sequence.job.echo && !sequence.over {
            sequence.echo_rest(&self.facts);
        }
        if sequence.job.max_tokens == 0 {
            sequence.end("length", String::new(), Vec::new());
        }
        self.decoding.push(sequence);
    }

    /// One token for every sequence whose prompt is known.
    fn decode(&mut self) {
        let sequences: Vec<&mut Active> = self.decoding.iter_mut().filter(|s| !s.over).collect();
        if sequences.is_empty() {
            return;
        }
        let next: Vec<Next> = sequences.iter().map(|s| Next { slot: s.slot, position: s.fed, token: s.last }).collect();
        let classes = self.pool.classes();
        match self.pool.step(&next) {
            Ok(logits) => {
                for (sequence, logits) in sequences.into_iter().zip(logits.chunks_exact(classes)) {
                    sequence.advance(logits, &self.facts);
                }
            }
            Err(error) => sequences.into_iter().for_each(|sequence| sequence.fail(&error)),
        }
    }

    /// Frees the slots of those that are done or that nobody waits for.
    fn sweep(&mut self) {
        for sequence in self.feeding.iter_mut().chain(&mut self.decoding) {
            sequence.over |= sequence.job.events.is_closed();
        }
        let free = &mut self.free;
        let mut keep = |sequence: &Active| {
            if sequence.over {
                free.push(sequence.slot);
            }
            !sequence.over
        };
        self.feeding.retain(&mut keep);
        self.decoding.retain(&mut keep);
    }
}

impl Active {
    fn send(&mut self, event: Event) {
        self.over |= self.job.events.send((self.job.index, event)).is_err();
    }

    fn fail(&mut self, error: &Errors) {
        self.send(Event::Failed(error.to_string()));
        self.over = true;
    }

    fn end(&mut self, reason: &'static str, mut text: String, tokens: Vec<Token>) {
        if reason == "length" {
            let rest = self.characters.finish();
            let (shown, met) = self.stops.push(&rest);
            text.push_str(&shown);
            if !met {
                text.push_str(&self.stops.finish());
            }
        }
        if !text.is_empty() || !tokens.is_empty() {
            self.send(Event::Piece { text, tokens });
        }
        let generated = self.generated;
        self.send(Event::Done { reason, generated });
        self.over = true;
    }

    /// A token with its probability by these logits.
    fn token(&self, token: u32, logits: Option<&[f32]>) -> Option<Token> {
        let count = self.job.logprobs?;
        let Some(logits) = logits else { return Some(Token { token, logprob: None, top: Vec::new() }) };
        let logprob = (f64::from(logits[token as usize]) - log_sum_exp(logits)) as f32;
        Some(Token { token, logprob: Some(logprob), top: most_likely(logits, count) })
    }

    /// The first token of a prompt that is to be repeated; it has no probability.
    fn echo_first(&mut self, facts: &Facts) {
        let first = self.job.prompt[0];
        let text = self.characters.push(&facts.bytes(first));
        let tokens = self.token(first, None).into_iter().collect();
        self.send(Event::Piece { text, tokens });
    }

    /// Token `at` of a prompt that is scored, by the logits before it.
    fn scored(&mut self, at: usize, logits: &[f32]) {
        let tokens = self.token(self.job.prompt[at], Some(logits)).into_iter().collect();
        self.send(Event::Piece { text: String::new(), tokens });
    }

    /// The text of a prompt behind its first token.
    fn echo_rest(&mut self, facts: &Facts) {
        let mut text = String::new();
        for i in 1..self.job.prompt.len() {
            text.push_str(&self.characters.push(&facts.bytes(self.job.prompt[i])));
        }
        if !text.is_empty() {
            self.send(Event::Piece { text, tokens: Vec::new() });
        }
    }

    /// Chooses a token by the logits behind the last one.
    fn advance(&mut self, logits: &[f32], facts: &Facts) {
        self.fed += 1;
        let token = match self.sampler.choose(logits, facts.known) {
            Ok(token) => token,
            Err(message) => {
                self.send(Event::Failed(message));
                self.over = true;
                return;
            }
        };
        self.last = token;
        self.generated += 1;
        let tokens: Vec<Token> = self.token(token, Some(logits)).into_iter().collect();
        let piece = self.characters.push(&facts.bytes(token));
        let (text, met) = self.stops.push(&piece);
        if met {
            self.end("stop", text, tokens);
        } else if self.generated == self.job.max_tokens {
            self.end("length", text, tokens);
        } else if !text.is_empty() || !tokens.is_empty() {
            self.send(Event::Piece { text, tokens });
        }
    }
}
