//! Byte-pair encoding of one word (Sennrich, Haddow & Birch, arXiv:1508.07909).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

/// From this length on, the next pair is found with a heap instead of a scan.
const LONG: usize = 128;

/// No pair.
const NONE: u32 = u32::MAX;

/// The tokens by their bytes; a lower number merges first.
pub(super) type Ranks = FxHashMap<Box<[u8]>, u32>;

/// Appends the tokens of a word: of its bytes, the two neighbours whose union has the lowest rank are joined, the left
/// ones first, until no union of neighbours is a token. `ranks` must hold every single byte.
#[inline]
pub(super) fn encode(word: &[u8], ranks: &Ranks, tokens: &mut Vec<u32>) {
    if let Some(&token) = ranks.get(word) {
        tokens.push(token);
    } else if word.len() < LONG {
        short(word, ranks, tokens);
    } else {
        long(word, ranks, tokens);
    }
}

#[inline]
fn rank(ranks: &Ranks, bytes: &[u8]) -> u32 {
    ranks.get(bytes).copied().unwrap_or(NONE)
}

#[inline]
fn short(word: &[u8], ranks: &Ranks, tokens: &mut Vec<u32>) {
    // `starts[i]` is where part i starts; `pairs[i]` is the rank of parts i and i + 1.
    let mut starts = [0u8; LONG + 1];
    let mut pairs = [NONE; LONG + 1];
    let mut parts = word.len();
    for i in 0..=parts {
        starts[i] = i as u8;
        pairs[i] = if i + 2 <= parts { rank(ranks, &word[i..i + 2]) } else { NONE };
    }
    loop {
        let mut best = (NONE, 0);
        for (i, &pair) in pairs[..parts].iter().enumerate() {
            if pair < best.0 {
                best = (pair, i);
            }
        }
        let (found, at) = best;
        if found == NONE {
            break;
        }
        starts.copy_within(at + 2..=parts, at + 1);
        pairs.copy_within(at + 2..=parts, at + 1);
        parts -= 1;
        let pair = |i: usize| match i + 2 <= parts {
            true => rank(ranks, &word[usize::from(starts[i])..usize::from(starts[i + 2])]),
            false => NONE,
        };
        pairs[at] = pair(at);
        if at > 0 {
            pairs[at - 1] = pair(at - 1);
        }
    }
    for i in 0..parts {
        tokens.push(rank(ranks, &word[usize::from(starts[i])..usize::from(starts[i + 1])]));
    }
}

/// The same in O(n log n).
fn long(word: &[u8], ranks: &Ranks, tokens: &mut Vec<u32>) {
    let count = word.len();
    // Parts are known by where they start: a list linked both ways. A part that was joined to the one before it has
    // the end 0.
    let mut ends: Vec<usize> = (1..=count).collect();
    let mut before: Vec<usize> = (0..count).map(|i| i.wrapping_sub(1)).collect();
    // (rank, start, middle, end): outdated once either part has changed
    let mut heap = BinaryHeap::new();
    let push = |heap: &mut BinaryHeap<_>, start: usize, middle: usize, end: usize| {
        let rank = rank(ranks, &word[start..end]);
        if rank != NONE {
            heap.push(Reverse((rank, start, middle, end)));
        }
    };
    (0..count - 1).for_each(|i| push(&mut heap, i, i + 1, i + 2));
    while let Some(Reverse((_, start, middle, end))) = heap.pop() {
        if ends[start] != middle || ends[middle] != end {
            continue;
        }
        ends[start] = end;
        ends[middle] = 0;
        if end < count {
            before[end] = start;
            push(&mut heap, start, end, ends[end]);
        }
        if start > 0 {
            push(&mut heap, before[start], start, end);
        }
    }
    let mut start = 0;
    while start < count {
        tokens.push(rank(ranks, &word[start..ends[start]]));
        start = ends[start];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::gpt2::ranks;

    #[test]
    fn heap_and_scan_agree() {
        let ranks = ranks();
        let mut words: Vec<Vec<u8>> = ["a", "-", "hello", "ab", "=-", "lll", "wasser", "ÿþ", "\0"]
            .iter()
            .map(|piece| piece.bytes().cycle().take(100).collect())
            .collect();
        // every byte, in an order that repeats nothing
        words.push((0..120u32).map(|i| (i * i * 7 + i * 31) as u8).collect());
        words.push(b"supercalifragilisticexpialidocious".to_vec());
        for word in words {
            for length in [2, 3, 7, 34, word.len()] {
                let word = &word[..length.min(word.len())];
                let (mut scan, mut heap) = (Vec::new(), Vec::new());
                short(word, &ranks, &mut scan);
                long(word, &ranks, &mut heap);
                assert_eq!(scan, heap, "{word:?}");
            }
        }
    }

    #[test]
    fn a_long_run_takes_no_time() {
        let ranks = ranks();
        let mut tokens = Vec::new();
        encode(&vec![b'x'; 1 << 20], &ranks, &mut tokens);
        let length: usize = ranks.iter().filter(|(_, id)| tokens[0] == **id).map(|(bytes, _)| bytes.len()).sum();
        assert_eq!(tokens.len(), (1 << 20) / length);
    }
}
