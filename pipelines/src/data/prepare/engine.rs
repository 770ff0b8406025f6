//! Reader, tokenizers and writer, joined by bounded channels.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::super::batch::Split;
use super::super::documents::{self, Corpus, Progress, ReadError};
use super::super::layout::Layout;
use super::super::prefetch::message_of;
use super::super::tokenizer::Codec;
use super::chunks::{Chunk, Chunker};
use super::output::{Output, Seen, State};
use super::progress::Meter;
use super::{FileRecord, PrepareError, Recipe};

/// After this time what is done is made safe; then after twice the time, up to the longest.
const FIRST_CHECKPOINT: Duration = Duration::from_millis(100);
const LONGEST_CHECKPOINT: Duration = Duration::from_secs(10);

/// What is to be done.
pub(super) struct Job<'a> {
    pub recipe: &'a Recipe,
    pub corpus: &'a Corpus,
    pub codec: &'a dyn Codec,
    pub threads: usize,
}

/// What reaches the writer.
enum Message {
    Chunk(Chunk),
    /// The reader ended early; the chunks before are on their way.
    Failed(PrepareError),
}

/// Reads what is left of the corpus, encodes it on the threads and writes it, if there is an output. `state` moves on
/// with what is written.
pub(super) fn run(
    job: &Job,
    state: &mut State,
    mut output: Option<&mut Output>,
    meter: &mut Meter,
) -> Result<(), PrepareError> {
    let threads = job.threads.max(1);
    // every thread has a chunk in hand and one waiting; reader and writer have theirs
    let chunks = 2 * threads + 3;
    let (empty_sender, empty) = bounded(chunks);
    let (full, full_receiver) = bounded(chunks);
    let (done, done_receiver) = bounded(chunks + 1);
    (0..chunks).for_each(|_| drop(empty_sender.send(Chunk::default())));
    let chunker = Chunker::new(empty, full, job.recipe.seed, state.threshold, job.codec.may_be_cut_before_spaces());
    let (first, skip, layout) = (state.files.len(), state.documents, state.layout);
    thread::scope(|scope| {
        let failed = done.clone();
        let reader = move || {
            let read = catch_unwind(AssertUnwindSafe(|| read(job, chunker, first, skip)));
            let error = match read {
                Ok(Ok(()) | Err(ReadError::Stopped)) => return,
                Ok(Err(ReadError::Source(error))) => error.into(),
                Err(panic) => PrepareError::Panicked(message_of(&*panic)),
            };
            // the writer is gone if it failed too
            let _ = failed.send(Message::Failed(error));
        };
        spawn(scope, "documents", reader)?;
        for _ in 0..threads {
            let (full, done) = (full_receiver.clone(), done.clone());
            spawn(scope, "tokenizer", move || encode(job.codec, layout, &full, &done))?;
        }
        drop((full_receiver, done));
        // the receiver must be gone before the scope waits for the threads
        let done_receiver = done_receiver;
        let empty_sender = empty_sender;
        write(job, state, &mut output, meter, &done_receiver, &empty_sender)
    })
}

fn spawn<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() + Send + 'scope,
) -> Result<(), PrepareError> {
    let spawned = thread::Builder::new().name(name.into()).spawn_scoped(scope, work);
    spawned.map(drop).map_err(|error| PrepareError::Panicked(format!("cannot start a thread: {error}")))
}

fn read(job: &Job, mut chunker: Chunker, first: usize, skip: u64) -> Result<(), ReadError> {
    chunker.skip = skip;
    chunker.read_before = job.corpus.files[..first].iter().map(|file| file.bytes).sum();
    for file in &job.corpus.files[first..] {
        let progress = chunker.progress.clone();
        let sha256 = documents::read_file(file, &job.recipe.documents, &progress, &mut chunker)?;
        chunker.end_file(sha256)?;
        chunker.read_before += file.bytes;
        chunker.progress = Progress::default();
    }
    chunker.finish()
}

fn encode(codec: &dyn Codec, layout: Layout, full: &Receiver<Chunk>, done: &Sender<Message>) {
    let mut encoder = codec.encoder();
    let mut tokens = Vec::new();
    for mut chunk in full {
        let work = AssertUnwindSafe(|| {
            let mut start = 0;
            for piece in &chunk.pieces {
                tokens.clear();
                if let Err(error) = encoder.encode(&chunk.bytes[start..piece.end], &mut tokens) {
                    chunk.error = Some(error);
                    return;
                }
                if piece.last {
                    tokens.push(codec.end_of_text());
                }
                let (to, count) = match piece.split {
                    Split::Train => (&mut chunk.tokens[0], &mut chunk.counts.train),
                    Split::Validation => (&mut chunk.tokens[1], &mut chunk.counts.validation),
                };
                append(to, &tokens, layout);
                count.documents += u64::from(piece.last);
                count.tokens += tokens.len() as u64;
                count.text_bytes += (piece.end - start) as u64;
                start = piece.end;
            }
        });
        let message = match catch_unwind(work) {
            Ok(()) => Message::Chunk(chunk),
            Err(panic) => Message::Failed(PrepareError::Panicked(message_of(&*panic))),
        };
        if done.send(message).is_err() {
            return;
        }
    }
}

/// Appends tokens as they lie in the file.
fn append(to: &mut Vec<u8>, tokens: &[u32], layout: Layout) {
    let start = to.len();
    to.resize(start + layout.width() * tokens.len(), 0);
    if layout.width() == 2 {
        let (places, _) = to[start..].as_chunks_mut::<2>();
        places.iter_mut().zip(tokens).for_each(|(place, token)| *place = (*token as u16).to_le_bytes());
    } else {
        let (places, _) = to[start..].as_chunks_mut::<4>();
        places.iter_mut().zip(tokens).for_each(|(place, token)| *place = token.to_le_bytes());
    }
}

fn write(
    job: &Job,
    state: &mut State,
    output: &mut Option<&mut Output>,
    meter: &mut Meter,
    done: &Receiver<Message>,
    empty: &Sender<Chunk>,
) -> Result<(), PrepareError> {
    let mut waiting = BTreeMap::new();
    let mut next = 0;
    let mut failure = None;
    let (mut safe, mut interval) = (Instant::now(), FIRST_CHECKPOINT);
    let mut whole = true;
    for message in done {
        match message {
            Message::Chunk(chunk) => drop(waiting.insert(chunk.sequence, chunk)),
            // its chunk will never come
            Message::Failed(error @ PrepareError::Panicked(_)) => return Err(error),
            Message::Failed(error) => failure = Some(error),
        }
        while let Some(mut chunk) = waiting.remove(&next) {
            next += 1;
            if let Some(error) = chunk.error.take() {
                return Err(error.into());
            }
            if let Some(output) = output {
                output.write(&chunk.tokens)?;
            }
            advance(state, &chunk, job.corpus);
            let most = state.layout.most_tokens() as u64;
            if state.counts.train.tokens.max(state.counts.validation.tokens) > most {
                return Err(PrepareError::TooManyTokens(most as usize));
            }
            whole = chunk.whole;
            if whole
                && safe.elapsed() > interval
                && let Some(output) = output
            {
                output.checkpoint(state)?;
                (safe, interval) = (Instant::now(), (2 * interval).min(LONGEST_CHECKPOINT));
            }
            meter.chunk(chunk.read, &state.counts);
            // the reader may have ended
            let _ = empty.send(chunk);
        }
    }
    match failure {
        None => Ok(()),
        Some(error) => {
            // what came before it is of use the next time
            if let Some(output) = output
                && whole
                && next > 0
            {
                output.checkpoint(state)?;
            }
            Err(error)
        }
    }
}

/// Counts a chunk that was written.
fn advance(state: &mut State, chunk: &Chunk, corpus: &Corpus) {
    state.counts.add(&chunk.counts);
    for sha256 in &chunk.file_ends {
        let file = &corpus.files[state.files.len()];
        let record = FileRecord { name: file.name.clone(), bytes: file.bytes, sha256: sha256.clone() };
        state.files.push(Seen { record, modified: file.modified });
    }
    state.documents = chunk.documents;
    state.open = corpus.files.get(state.files.len()).map(|file| (file.bytes, file.modified));
    if chunk.whole && chunk.documents == 0 {
        state.boundary = (state.files.len(), state.counts);
    }
}
