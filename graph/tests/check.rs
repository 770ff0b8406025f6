//! The checker of plans accepts a sound plan, and rejects it with any one thing broken.

use std::collections::BTreeMap;

use dataflow_graph::check::check;
use dataflow_graph::components::Phase;
use dataflow_graph::op::Cost;
use dataflow_graph::plan::{Plan, PlannedLaunch, Port};
use dataflow_graph::systems::allocate::Layout;
use dataflow_graph::types::TensorType;
use dataflow_graph::world::World;
use dataflow_kernels::device::{DType, Operand, Region};

/// `rows` x `cols` numbers, `stride` apart, from number `at` of the region on.
fn at(region: Region, at: usize, rows: usize, cols: usize, stride: usize) -> Operand {
    Operand { region, offset: 4 * at, rows, cols, stride, dtype: DType::F32 }
}

fn arena(start: usize) -> Operand {
    at(Region::Arena, start, 4, 4, 4)
}

fn launch(name: &str, inputs: Vec<(Operand, Vec<usize>)>, outputs: Vec<Operand>) -> PlannedLaunch {
    let (inputs, sources) = inputs.into_iter().unzip();
    PlannedLaunch {
        node: World::new().add_node(),
        name: name.into(),
        op: String::new(),
        phase: Phase::Step,
        inputs,
        outputs,
        sources,
        in_place: vec![],
        cost: Cost::default(),
    }
}

fn port(operand: Operand) -> Port {
    Port { tensor: TensorType::f32([operand.rows, operand.cols]), operand }
}

/// x (input) -> a; a -> the left half of b; a -> the right half of b; b -> c in the place of a; c, b -> y (output),
/// then the update of w by c.
fn sound() -> Plan {
    let (x, y) = (at(Region::Io, 0, 4, 4, 4), at(Region::Io, 16, 4, 4, 4));
    let (a, w) = (arena(0), at(Region::Parameters, 0, 4, 4, 4));
    let (left, right) = (at(Region::Arena, 16, 4, 4, 8), at(Region::Arena, 20, 4, 4, 8));
    let b = at(Region::Arena, 16, 4, 8, 8);
    let mut launches = vec![
        launch("make a", vec![(x.clone(), vec![]), (w.clone(), vec![])], vec![a.clone()]),
        launch("left of b", vec![(a.clone(), vec![0])], vec![left]),
        launch("right of b", vec![(a.clone(), vec![0])], vec![right]),
        launch("make c", vec![(b.clone(), vec![1, 2])], vec![a.clone()]),
        launch("make y", vec![(a.clone(), vec![3]), (b, vec![1, 2])], vec![y.clone()]),
        launch("update w", vec![(w.clone(), vec![]), (a, vec![3])], vec![w]),
    ];
    launches[5].phase = Phase::Update;
    launches[5].in_place = vec![(0, 0)];
    Plan {
        launches,
        layout: Layout { bytes: [4 * 48, 4 * 16, 4 * 16, 4 * 32], ..Layout::default() },
        inputs: BTreeMap::from([("x".into(), port(x))]),
        outputs: BTreeMap::from([("y".into(), port(y))]),
        states: BTreeMap::new(),
        parameters: vec![],
        rematerialized: None,
        token_limit: None,
    }
}

/// What the checker says about the sound plan with something broken.
fn broken(damage: impl FnOnce(&mut Plan)) -> String {
    let mut plan = sound();
    damage(&mut plan);
    let errors = check(&plan).expect_err("the plan is broken");
    errors.0.iter().map(|e| e.message.clone()).collect::<Vec<_>>().join("\n")
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "expected `{part}` in:\n{message}");
    }
}

#[test]
fn a_sound_plan_passes() {
    check(&sound()).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_value_that_is_still_needed_may_not_be_overwritten() {
    // a is needed by the right half, but the left half goes over its last row
    let message = broken(|p| p.launches[1].outputs[0] = at(Region::Arena, 12, 4, 4, 8));
    says(&message, &["`left of b` writes output 0", "over its input 0 at Arena[0..64] (f32 4 x 4, rows 4 apart)"]);
    // c over b, which y reads afterwards
    let message = broken(|p| {
        p.launches[3].outputs[0] = arena(40);
        p.launches[4].inputs[0] = arena(40);
    });
    says(&message, &["`make y` reads input 1", "which `make c` overwrote after `left of b` wrote it"]);
}

#[test]
fn two_halves_of_a_value_may_not_meet() {
    let message = broken(|p| p.launches[2].outputs[0].offset -= 4);
    says(&message, &["`make c` reads input 0", "of which `left of b`, `right of b` did not write all"]);
    let message = broken(|p| p.launches[2].outputs[0] = at(Region::Arena, 16, 4, 4, 8));
    says(&message, &["of which `left of b`, `right of b` did not write all"]);
}

#[test]
fn a_read_follows_its_write() {
    let message = broken(|p| p.launches[1].sources[0] = vec![3]);
    says(&message, &["`left of b` reads input 0", "before `make c` writes it"]);
    let message = broken(|p| p.launches.swap(0, 1));
    says(&message, &["`left of b` reads input 0", "before `left of b` writes it"]);
}

#[test]
fn what_is_read_was_written() {
    let message = broken(|p| p.launches[1].sources[0] = vec![]);
    says(&message, &["`left of b` reads input 0", "which no launch writes"]);
    let message = broken(|p| p.launches[1].inputs[0].offset += 4 * 28);
    says(&message, &["`left of b` reads input 0", "of which `make a` did not write all"]);
    let message = broken(|p| p.launches[1].sources.clear());
    says(&message, &["`left of b` has 1 inputs, but sources of 0"]);
}

#[test]
fn operands_stay_inside_of_their_region() {
    let message = broken(|p| p.layout.bytes[0] -= 4);
    says(&message, &["`right of b` has output 0 at Arena[80..192]", "outside of its region of 188 bytes"]);
    let message = broken(|p| p.launches[0].inputs[1].offset += 4);
    says(&message, &["`make a` has input 1 at Parameters[4..68]", "outside of its region of 64 bytes"]);
    let message = broken(|p| p.launches[0].inputs[1].offset += 2);
    says(&message, &["`make a` has input 1", "not aligned to its elements"]);
    let message = broken(|p| p.launches[0].inputs[1].stride = 3);
    says(&message, &["`make a` has input 1", "whose rows overlap"]);
}

#[test]
fn pairs_in_place_are_one_place() {
    let message = broken(|p| p.launches[5].in_place = vec![(0, 1)]);
    says(&message, &["`update w` updates input 1 in place as output 0, but they are Arena[0..64]"]);
    let message = broken(|p| p.launches[5].in_place = vec![(0, 2)]);
    says(&message, &["`update w` updates input 2 in place as output 0, which do not both exist"]);
    let message = broken(|p| p.launches[5].in_place = vec![(0, 0), (0, 0)]);
    says(&message, &["`update w` has output 0 or input 0 in two pairs"]);
    let message = broken(|p| p.launches[5].in_place = vec![]);
    says(&message, &["`update w` writes output 0", "over its input 0", "does not update it in place"]);
}

#[test]
fn outputs_of_a_launch_lie_apart() {
    let message = broken(|p| p.launches[0].outputs.push(at(Region::Arena, 12, 4, 4, 4)));
    says(&message, &["`make a` writes outputs 0 and 1 to one place"]);
}

#[test]
fn the_update_comes_last() {
    let message = broken(|p| p.launches[3].phase = Phase::Update);
    says(&message, &["`make y` runs in every micro-batch, but stands behind launches of the update"]);
}

#[test]
fn parameters_change_in_the_update_and_inputs_never() {
    let message = broken(|p| p.launches[5].phase = Phase::Step);
    says(&message, &["`update w` writes output 0", "parameters change in the update only"]);
    let message = broken(|p| p.launches[4].outputs[0] = at(Region::Io, 0, 4, 4, 4));
    says(&message, &["`make y` writes output 0", "over the input `x`"]);
    let message = broken(|p| {
        let again = p.launches[0].inputs[1].clone();
        p.launches.push(launch("late", vec![(again, vec![])], vec![]));
        p.launches[6].phase = Phase::Update;
    });
    says(&message, &["`late` reads input 0 at Parameters[0..64]", "after `update w` changed it"]);
}

#[test]
fn ports_outlive_the_step() {
    let message = broken(|p| p.outputs.get_mut("y").unwrap().operand = arena(0));
    says(&message, &["output `y` lies at Arena[0..64]", "where later launches may write"]);
    let message = broken(|p| p.outputs.get_mut("y").unwrap().operand.offset += 4);
    says(&message, &["output `y` lies at Io[68..132]", "outside of its region"]);
    let message = broken(|p| p.outputs.get_mut("y").unwrap().operand.offset -= 4);
    says(&message, &["`x` and `y` share memory at Io[60..124]"]);
}
