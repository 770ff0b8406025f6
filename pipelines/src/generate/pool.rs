//! Sequences that a model continues, each with its state in a slot of a pool.
//!
//! One model file gives several programs, which differ in how many sequences and tokens they take at once: prompts go
//! through programs of one sequence and many tokens, which compute in parallel over time; decoding goes through programs
//! of one token each for as many sequences as are active. All share parameters and states. A program is compiled when it
//! is first needed.
//!
//! How a prompt is cut depends on its length alone, and no number of a sequence depends on the others of its batch: a
//! sequence gets the same logits, bit for bit, alone and in company.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use dataflow_graph::compile::{Request, compile};
use dataflow_graph::components::{Options, Recurrence};
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::format::number::Scope;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_graph::types::DType;
use dataflow_kernels::device::{Device, Region};

/// Tokens of a prompt that are taken in at once: the longest piece that does not exceed what is left, or the shortest.
const PIECES: [usize; 3] = [256, 64, 16];

/// What a pool is made for.
pub struct Setup {
    /// Where ops are found.
    pub registry: Arc<Registry>,
    /// What runs the model.
    pub device: Arc<dyn Device>,
    /// The model.
    pub model: Arc<ModelFile>,
    /// Its config.
    pub scope: Scope,
    /// Sequences at once.
    pub slots: usize,
    /// Tokens of a sequence, where its state grows with them.
    pub capacity: usize,
    /// The element type of the large parameters, `f32` or `bf16`.
    pub weights: DType,
}

/// A program's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Sizes {
    batch: usize,
    time: usize,
    logits: bool,
}

/// One more token of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// Where its state lies.
    pub slot: usize,
    /// Tokens before this one.
    pub position: usize,
    /// The token.
    pub token: u32,
}

/// A model that continues sequences.
pub struct Pool {
    setup: Setup,
    base: Session,
    programs: BTreeMap<Sizes, Session>,
    logits: Vec<f32>,
    classes: usize,
}

const ONE: Sizes = Sizes { batch: 1, time: 1, logits: true };

impl Pool {
    /// Compiles the model and makes room for its states. Parameters are zeros until the caller fills those of
    /// [`parameters`](Self::parameters).
    ///
    /// # Errors
    /// Everything that is wrong with the model, an op without a recurrent form, or no memory left.
    pub fn new(setup: Setup) -> Result<Self, Errors> {
        let base = Session::new(setup.device.clone(), &compile(&setup.request(ONE))?, None)?;
        let classes = base.plan().outputs.get("logits").map_or(0, |port| port.tensor.cols());
        if classes == 0 {
            return Err(Diagnostic::new("the model has no logits to choose a token from").into());
        }
        Ok(Self { setup, base, programs: BTreeMap::new(), logits: Vec::new(), classes })
    }

    /// The session whose parameters all programs share.
    pub fn parameters(&mut self) -> &mut Session {
        &mut self.base
    }

    /// Sequences at once.
    pub fn slots(&self) -> usize {
        self.setup.slots
    }

    /// The columns of the logits; padding of the vocabulary counts.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// The most tokens of a sequence, if there is such a limit: room for keys and values, or learned positions.
    pub fn limit(&self) -> Option<usize> {
        self.base.plan().token_limit
    }

    /// Bytes of the states of all slots, and of the parameters.
    pub fn bytes(&self) -> (usize, usize) {
        (self.base.plan().bytes(Region::State), self.base.plan().bytes(Region::Parameters))
    }

    /// Takes in tokens of a sequence from `position` on; at 0 the slot is emptied first.
    ///
    /// # Errors
    /// A token that the model does not have, more tokens than the [`limit`](Self::limit), or no memory left.
    pub fn prefill(&mut self, slot: usize, position: usize, tokens: &[u32]) -> Result<(), Errors> {
        self.pieces(slot, position, tokens, false, |_| ())
    }

    /// As [`prefill`](Self::prefill), and hands the logits behind each token on, `[classes]`.
    ///
    /// # Errors
    /// As `prefill`.
    pub fn score(
        &mut self,
        slot: usize,
        position: usize,
        tokens: &[u32],
        each: impl FnMut(&[f32]),
    ) -> Result<(), Errors> {
        self.pieces(slot, position, tokens, true, each)
    }

    fn pieces(
        &mut self,
        slot: usize,
        mut position: usize,
        mut tokens: &[u32],
        logits: bool,
        mut each: impl FnMut(&[f32]),
    ) -> Result<(), Errors> {
        self.check(position + tokens.len())?;
        let most = self.limit().unwrap_or(usize::MAX);
        let mut padded = Vec::new();
        while !tokens.is_empty() {
            let fits = PIECES.iter().copied().find(|piece| *piece <= tokens.len());
            // a model of few positions has no programs of more
            let time = fits.unwrap_or(PIECES[PIECES.len() - 1]).min(most);
            let len = time.min(tokens.len());
            let (now, later) = tokens.split_at(len);
            padded.clear();
            padded.extend(now.iter().map(|t| *t as i32));
            padded.resize(time, 0);
            let session = self.program(Sizes { batch: 1, time, logits })?;
            write(session, &padded, &[slot as i32], &[position as i32], &[len as i32]);
            session.run_step().map_err(|e| Diagnostic::new(e.to_string()))?;
            if logits {
                self.read_logits(Sizes { batch: 1, time, logits })?;
                self.logits.chunks_exact(self.classes).take(len).for_each(&mut each);
            }
            position += len;
            tokens = later;
        }
        Ok(())
    }

    /// One more token of each sequence; returns the logits behind them, `[next.len(), classes]`.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill), or two sequences in one slot.
    pub fn step(&mut self, next: &[Next]) -> Result<&[f32], Errors> {
        for next in next {
            self.check(next.position + 1)?;
        }
        let batch = next.len().next_power_of_two().min(self.setup.slots).max(next.len());
        let sizes = Sizes { batch, ..ONE };
        let numbers = |number: fn(&Next) -> usize| {
            let mut numbers: Vec<i32> = next.iter().map(|next| number(next) as i32).collect();
            numbers.resize(batch, 0);
            numbers
        };
        let tokens = numbers(|next| next.token as usize);
        let (slots, positions) = (numbers(|next| next.slot), numbers(|next| next.position));
        let session = self.program(sizes)?;
        write(session, &tokens, &slots, &positions, &numbers(|_| 1));
        session.run_step().map_err(|e| Diagnostic::new(e.to_string()))?;
        self.read_logits(sizes)?;
        Ok(&self.logits[..next.len() * self.classes])
    }

    /// Fails if a sequence would be longer than the model can take.
    fn check(&self, tokens: usize) -> Result<(), Errors> {
        match self.limit() {
            Some(limit) if tokens > limit => {
                Err(Diagnostic::new(format!("the model takes {limit} tokens at most, not {tokens}")).into())
            }
            _ => Ok(()),
        }
    }

    fn read_logits(&mut self, sizes: Sizes) -> Result<(), Errors> {
        let mut logits = std::mem::take(&mut self.logits);
        let session = self.program(sizes)?;
        let port = &session.plan().outputs["logits"];
        logits.resize(port.tensor.elements(), 0.0);
        session.read_into(port, &mut logits);
        self.logits = logits;
        Ok(())
    }

    /// The program of these sizes.
    fn program(&mut self, sizes: Sizes) -> Result<&mut Session, Errors> {
        if sizes == ONE {
            return Ok(&mut self.base);
        }
        match self.programs.entry(sizes) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let compiled = compile(&self.setup.request(sizes))?;
                let base = Some(&self.base);
                Ok(entry.insert(Session::sharing(self.setup.device.clone(), &compiled, base, base)?))
            }
        }
    }
}

fn write(session: &Session, tokens: &[i32], slots: &[i32], positions: &[i32], lengths: &[i32]) {
    session.write_input("tokens", tokens);
    session.write_input("slots", slots);
    session.write_input("positions", positions);
    session.write_input("lengths", lengths);
}

impl Setup {
    fn request(&self, sizes: Sizes) -> Request {
        let Sizes { batch, time, logits } = sizes;
        let (slots, capacity, weights) = (self.slots, self.capacity, self.weights);
        let recurrent = Some(Recurrence { slots, capacity, logits, weights });
        Request {
            registry: self.registry.clone(),
            model: self.model.clone(),
            scope: self.scope.clone(),
            options: Options { recurrent, target: self.device.target(), ..Options::new(batch, time) },
            objectives: Vec::new(),
            optimizer: None,
            without: Vec::new(),
            memory_budget: None,
        }
    }
}
