//! `allocate`: an offset for every value, from liveness over the launch order.
//!
//! Reads the resources `Order`, `Inputs`, `Outputs`, `States`, `Parameters`; `TensorType`, `Role`, `OpRef`,
//! `Alias`. Writes `Located` of values and the resource `Layout`.
//!
//! Parameters, states and what the host touches have regions of their own, in a fixed order, so that programs
//! of one model share them. In the arena, values are placed by decreasing size, each into the smallest gap
//! that is free during its whole life.

use std::collections::{BTreeMap, HashMap};

use dataflow_kernels::device::{Operand, Region};

use super::order::Order;
use super::simplify::Alias;
use crate::components::{Inputs, OpRef, Outputs, Parameters, Role, States};
use crate::diagnostic::Errors;
use crate::types::TensorType;
use crate::world::{NodeId, ValueId, World};

/// Offsets are multiples of this many bytes: a cache line, and the widest vector.
pub const ALIGNMENT: usize = 64;

/// Of values: where they lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located(pub Operand);

/// A value that owns memory in the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The value.
    pub value: ValueId,
    /// First byte.
    pub offset: usize,
    /// Size in bytes.
    pub bytes: usize,
    /// The launch that writes it first.
    pub first: usize,
    /// The launch that uses it last.
    pub last: usize,
}

/// Resource: the sizes of the regions and the arena's contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of each region, in the order of [`Region::ALL`].
    pub bytes: [usize; 4],
    /// What lies in the arena.
    pub arena: Vec<Placed>,
    /// The most bytes that are alive at once: no layout needs less.
    pub live_peak_bytes: usize,
    /// The bytes of all values, as if none were reused.
    pub sum_bytes: usize,
}

/// See the [module](self).
///
/// # Errors
/// None.
pub fn allocate(world: &mut World) -> Result<(), Errors> {
    let mut layout = Layout::default();
    let mut offsets: HashMap<ValueId, (Region, usize)> = HashMap::new();
    let mut fixed = |world: &World, region: Region, values: Vec<ValueId>| {
        let at = Region::ALL.iter().position(|r| *r == region).expect("every region is listed");
        for value in values {
            let root = root_of(world, value);
            if let std::collections::hash_map::Entry::Vacant(entry) = offsets.entry(root) {
                entry.insert((region, layout.bytes[at]));
                layout.bytes[at] += size_of(world, root);
            }
        }
    };
    let parameters = world.resource::<Parameters>().cloned().unwrap_or_default().0;
    let states: BTreeMap<_, _> = world.resource::<States>().cloned().unwrap_or_default().0;
    let inputs = world.resource::<Inputs>().cloned().unwrap_or_default().0;
    let outputs = world.resource::<Outputs>().cloned().unwrap_or_default().0;
    fixed(world, Region::Parameters, parameters);
    fixed(world, Region::State, states.into_values().collect());
    fixed(world, Region::Io, inputs.into_values().chain(outputs.into_values()).collect());

    let mut lives = lives(world, &world.resource::<Order>().expect("`order` ran").0);
    lives.retain(|life| !offsets.contains_key(&life.value));
    layout.sum_bytes = lives.iter().map(|l| l.bytes).sum();
    layout.live_peak_bytes = live_peak(&lives).0;
    layout.bytes[0] = place(&mut lives);
    offsets.extend(lives.iter().map(|l| (l.value, (Region::Arena, l.offset))));
    layout.arena = lives;

    for value in world.values() {
        let (root, column, stride) = locate(world, value);
        // values that nothing reads or writes have no place
        let Some(&(region, offset)) = offsets.get(&root) else { continue };
        let tensor = world.expect::<TensorType>(value);
        let (rows, cols, dtype) = (tensor.rows(), tensor.cols(), tensor.dtype);
        let offset = offset + column * dtype.size();
        world.set(value, Located(Operand { region, offset, rows, cols, stride, dtype }));
    }
    world.set_resource(layout);
    Ok(())
}

pub(super) fn size_of(world: &World, value: ValueId) -> usize {
    world.expect::<TensorType>(value).bytes().next_multiple_of(ALIGNMENT).max(ALIGNMENT)
}

/// What a value shares its memory with: an alias, or the input that its node updates.
fn shared_with(world: &World, value: ValueId) -> Option<Alias> {
    if let Some(alias) = world.get::<Alias>(value) {
        return Some(*alias);
    }
    let (node, port) = world.producer(value)?;
    let updates = world.expect::<OpRef>(node).0.updates();
    let (_, input) = updates.into_iter().find(|u| u.0 == port)?;
    Some(Alias { of: world.inputs(node)[input], column: 0 })
}

/// The value that owns the memory of `value`.
pub(super) fn root_of(world: &World, value: ValueId) -> ValueId {
    locate(world, value).0
}

/// The value that owns the memory, the first column in it, and the elements between rows.
pub(super) fn locate(world: &World, value: ValueId) -> (ValueId, usize, usize) {
    let own = world.expect::<TensorType>(value);
    let Some(alias) = shared_with(world, value) else { return (value, 0, own.cols()) };
    let (root, column, stride) = locate(world, alias.of);
    (root, column + alias.column, stride)
}

/// The values that own memory, with the places in `order` between which they are alive.
pub(super) fn lives(world: &World, order: &[NodeId]) -> Vec<Placed> {
    let mut lives: BTreeMap<ValueId, Placed> = BTreeMap::new();
    for (at, &node) in order.iter().enumerate() {
        for value in world.inputs(node).into_iter().chain(world.outputs(node)) {
            if !matches!(world.expect::<Role>(value), Role::Activation | Role::Gradient) {
                continue;
            }
            let root = root_of(world, value);
            let bytes = size_of(world, root);
            let life = lives.entry(root).or_insert(Placed { value: root, offset: 0, bytes, first: at, last: at });
            life.last = at;
        }
    }
    lives.into_values().collect()
}

/// The most bytes that are alive at once, and the first place in the order where they are.
pub(super) fn live_peak(lives: &[Placed]) -> (usize, usize) {
    let end = lives.iter().map(|l| l.last + 2).max().unwrap_or(0);
    let mut change = vec![0isize; end];
    for life in lives {
        change[life.first] += life.bytes as isize;
        change[life.last + 1] -= life.bytes as isize;
    }
    let (mut live, mut peak) = (0, (0, 0));
    for (at, change) in change.into_iter().enumerate() {
        live += change;
        if live > peak.0 {
            peak = (live, at);
        }
    }
    (peak.0 as usize, peak.1)
}

/// Gives every value an offset; returns the bytes of the arena.
fn place(lives: &mut [Placed]) -> usize {
    let mut by_size: Vec<usize> = (0..lives.len()).collect();
    by_size.sort_by_key(|&i| (std::cmp::Reverse(lives[i].bytes), lives[i].first));
    let mut placed: Vec<usize> = Vec::with_capacity(lives.len()); // by offset
    let mut total = 0;
    for i in by_size {
        let (first, last, bytes) = (lives[i].first, lives[i].last, lives[i].bytes);
        let mut end = 0; // of the neighbours below
        let mut best: Option<(usize, usize)> = None; // (gap, offset)
        for &p in &placed {
            let other = &lives[p];
            if other.last < first || last < other.first {
                continue;
            }
            if other.offset >= end + bytes && best.is_none_or(|(gap, _)| other.offset - end < gap) {
                best = Some((other.offset - end, end));
            }
            end = end.max(other.offset + other.bytes);
        }
        let offset = best.map_or(end, |(_, offset)| offset);
        lives[i].offset = offset;
        total = total.max(offset + bytes);
        let at = placed.partition_point(|&p| lives[p].offset < offset);
        placed.insert(at, i);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_that_meet_do_not_overlap() {
        let value = World::new().add_source();
        let mut lives: Vec<Placed> = [(64, 0, 3), (128, 1, 2), (64, 2, 5), (128, 3, 4), (192, 4, 6), (64, 6, 6)]
            .into_iter()
            .map(|(bytes, first, last)| Placed { value, offset: 0, bytes, first, last })
            .collect();
        let total = place(&mut lives);
        for (i, a) in lives.iter().enumerate() {
            for b in &lives[..i] {
                let apart = a.last < b.first || b.last < a.first;
                assert!(apart || a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset, "{a:?} {b:?}");
            }
        }
        assert_eq!((live_peak(&lives).0, total), (384, 384));
    }
}
