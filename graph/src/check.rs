//! A checker of plans: proves that memory holds what every launch expects, from the plan alone.
//!
//! It follows the launches in order and knows, for each operand that is read, which launches made its contents
//! ([`PlannedLaunch::sources`]). A plan is right if
//!
//! - every operand lies inside of its region, and rows of an operand do not overlap;
//! - of the operands of one launch, none that is written overlaps another, but for pairs that are updated in place;
//! - what is read was written before, completely, by its sources, and by nobody since: then no two values that are
//!   alive share a byte, however the layout came about;
//! - what no launch writes is a parameter, a state or an input, and not yet overwritten;
//! - parameters change in place during the update only, inputs never, and the update comes last;
//! - outputs lie where the next step leaves them alone.

use std::fmt;

use dataflow_kernels::device::{Operand, Region};

use crate::components::Phase;
use crate::diagnostic::{Diagnostic, Errors};
use crate::plan::{Plan, PlannedLaunch};

/// Proves that a plan is right.
///
/// # Errors
/// Everything that is wrong, with launches and operands.
pub fn check(plan: &Plan) -> Result<(), Errors> {
    let mut checker = Checker { plan, written: Default::default(), errors: Errors::default() };
    let mut updating = false;
    for (at, launch) in plan.launches.iter().enumerate() {
        match launch.phase {
            Phase::Update => updating = true,
            Phase::Step if updating => {
                checker.report(launch, "runs in every micro-batch, but stands behind launches of the update".into());
            }
            Phase::Step => {}
        }
        checker.operands(launch);
        checker.in_place(launch);
        checker.reads(at, launch);
        checker.writes(at, launch);
    }
    checker.ports();
    checker.errors.into_result()
}

/// Operands that were written, for each region: the launch and the number of the output.
type Written = [Vec<(usize, usize)>; 4];

struct Checker<'p> {
    plan: &'p Plan,
    written: Written,
    errors: Errors,
}

/// An operand in words.
struct Shown<'a>(&'a Operand);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Operand { region, rows, cols, stride, dtype, .. } = self.0;
        let span = self.0.span();
        write!(f, "{region:?}[{}..{}] ({dtype} {rows} x {cols}, rows {stride} apart)", span.start, span.end)
    }
}

fn place(region: Region) -> usize {
    Region::ALL.iter().position(|r| *r == region).expect("every region is listed")
}

impl<'p> Checker<'p> {
    fn report(&mut self, launch: &PlannedLaunch, what: String) {
        self.errors.push(Diagnostic::new(format!("launch `{}` {what}", launch.name)).row(launch.name.clone()));
    }

    fn name(&self, launch: usize) -> &'p str {
        &self.plan.launches[launch].name
    }

    fn output(&self, (launch, output): (usize, usize)) -> &'p Operand {
        &self.plan.launches[launch].outputs[output]
    }

    /// Bounds, alignment and gaps.
    fn operands(&mut self, launch: &PlannedLaunch) {
        let inputs = launch.inputs.iter().map(|o| ("input", o)).enumerate();
        let outputs = launch.outputs.iter().map(|o| ("output", o)).enumerate();
        for (i, (kind, operand)) in inputs.chain(outputs) {
            let (bytes, shown) = (self.plan.bytes(operand.region), Shown(operand));
            if operand.span().end > bytes {
                self.report(launch, format!("has {kind} {i} at {shown}, outside of its region of {bytes} bytes"));
            }
            if !operand.offset.is_multiple_of(operand.dtype.size()) {
                self.report(launch, format!("has {kind} {i} at {shown}, which is not aligned to its elements"));
            }
            if operand.rows > 1 && operand.stride < operand.cols {
                self.report(launch, format!("has {kind} {i} at {shown}, whose rows overlap"));
            }
        }
    }

    /// Pairs, and overlaps within the launch.
    fn in_place(&mut self, launch: &PlannedLaunch) {
        for (n, &(o, i)) in launch.in_place.iter().enumerate() {
            let (Some(output), Some(input)) = (launch.outputs.get(o), launch.inputs.get(i)) else {
                self.report(launch, format!("updates input {i} in place as output {o}, which do not both exist"));
                continue;
            };
            if output != input {
                let (output, input) = (Shown(output), Shown(input));
                self.report(
                    launch,
                    format!("updates input {i} in place as output {o}, but they are {input} and {output}"),
                );
            }
            if launch.in_place[..n].iter().any(|p| p.0 == o || p.1 == i) {
                self.report(launch, format!("has output {o} or input {i} in two pairs that are updated in place"));
            }
        }
        for (o, output) in launch.outputs.iter().enumerate() {
            for (i, input) in launch.inputs.iter().enumerate() {
                if !launch.in_place.contains(&(o, i)) && output.overlaps(input) {
                    let (output, input) = (Shown(output), Shown(input));
                    self.report(launch, format!("writes output {o} at {output} over its input {i} at {input}"));
                }
            }
            for (p, other) in launch.outputs[..o].iter().enumerate().filter(|(_, other)| other.overlaps(output)) {
                let (other, output) = (Shown(other), Shown(output));
                self.report(launch, format!("writes outputs {p} and {o} to one place: {other} and {output}"));
            }
        }
    }

    fn reads(&mut self, at: usize, launch: &PlannedLaunch) {
        if launch.sources.len() != launch.inputs.len() {
            let (inputs, sources) = (launch.inputs.len(), launch.sources.len());
            return self.report(launch, format!("has {inputs} inputs, but sources of {sources}"));
        }
        for (i, (input, sources)) in launch.inputs.iter().zip(&launch.sources).enumerate() {
            let shown = Shown(input);
            if let Some(&late) = sources.iter().find(|s| **s >= at) {
                let late = self.plan.launches.get(late).map_or("no launch", |l| &l.name);
                self.report(launch, format!("reads input {i} at {shown} before `{late}` writes it"));
                continue;
            }
            if sources.is_empty() {
                if input.region == Region::Arena {
                    self.report(launch, format!("reads input {i} at {shown}, which no launch writes"));
                } else if let Some(by) = self.overwritten(input, None, &[]) {
                    self.report(launch, format!("reads input {i} at {shown} after `{}` changed it", self.name(by)));
                }
                continue;
            }
            let parts: Vec<(usize, usize)> = sources
                .iter()
                .flat_map(|&s| (0..self.plan.launches[s].outputs.len()).map(move |o| (s, o)))
                .filter(|&part| self.output(part).overlaps(input))
                .collect();
            if !covered(input, &parts.iter().map(|p| self.output(*p)).collect::<Vec<_>>()) {
                let names: Vec<_> = sources.iter().map(|s| format!("`{}`", self.name(*s))).collect();
                let what = format!("reads input {i} at {shown}, of which {} did not write all", names.join(", "));
                self.report(launch, what);
            }
            for part in parts {
                if let Some(by) = self.overwritten(input, Some(part), sources) {
                    let (by, from) = (self.name(by), self.name(part.0));
                    self.report(
                        launch,
                        format!("reads input {i} at {shown}, which `{by}` overwrote after `{from}` wrote it"),
                    );
                }
            }
        }
    }

    /// Who wrote over `input` after `part` of it was written, the part's fellow sources aside.
    fn overwritten(&self, input: &Operand, part: Option<(usize, usize)>, sources: &[usize]) -> Option<usize> {
        let list = &self.written[place(input.region)];
        let from = part.map_or(0, |part| list.partition_point(|w| w.0 <= part.0));
        let hit = |w: &&(usize, usize)| {
            let operand = self.output(**w);
            operand.overlaps(input)
                && part.is_none_or(|part| self.output(part).overlaps(operand) && !sources.contains(&w.0))
        };
        list[from..].iter().find(hit).map(|w| w.0)
    }

    fn writes(&mut self, at: usize, launch: &PlannedLaunch) {
        for (o, output) in launch.outputs.iter().enumerate() {
            let (updates, shown) = (launch.in_place.iter().any(|p| p.0 == o), Shown(output));
            match output.region {
                Region::Parameters if launch.phase == Phase::Step => {
                    self.report(launch, format!("writes output {o} at {shown}: parameters change in the update only"));
                }
                Region::Parameters | Region::State if !updates => {
                    self.report(launch, format!("writes output {o} at {shown}, but does not update it in place"));
                }
                Region::Io => {
                    let hit = self.plan.inputs.iter().find(|(_, port)| port.operand.overlaps(output));
                    if let Some((name, _)) = hit {
                        self.report(launch, format!("writes output {o} at {shown} over the input `{name}`"));
                    }
                }
                _ => {}
            }
            self.written[place(output.region)].push((at, o));
        }
    }

    /// What the host writes and reads.
    fn ports(&mut self) {
        let plan = self.plan;
        let mut wrong = |what: String| self.errors.push(Diagnostic::new(what));
        for (name, port) in &plan.outputs {
            let shown = Shown(&port.operand);
            if port.operand.region == Region::Arena {
                wrong(format!("output `{name}` lies at {shown}, where later launches may write"));
            } else if port.operand.span().end > plan.bytes(port.operand.region) {
                wrong(format!("output `{name}` lies at {shown}, outside of its region"));
            }
        }
        let ports: Vec<_> = plan.inputs.iter().chain(&plan.outputs).collect();
        for (n, (name, port)) in ports.iter().enumerate() {
            let clash = |other: &&(&String, &crate::plan::Port)| {
                other.1.operand.overlaps(&port.operand) && other.1.operand != port.operand
            };
            if let Some((other, _)) = ports[..n].iter().find(clash) {
                wrong(format!("`{other}` and `{name}` share memory at {}", Shown(&port.operand)));
            }
        }
    }
}

/// Whether the parts, together, have every element of `whole`.
fn covered(whole: &Operand, parts: &[&Operand]) -> bool {
    let size = whole.dtype.size();
    let solid = |o: &Operand| o.rows <= 1 || o.stride == o.cols;
    let span = whole.span();
    if parts.iter().any(|p| solid(p) && p.span().start <= span.start && span.end <= p.span().end) {
        return true;
    }
    // columns of rows with one period; a single row is a part of any
    let alike = |p: &&&Operand| p.rows == whole.rows && (p.rows <= 1 || p.stride == whole.stride);
    let start = |p: &Operand| (p.offset as isize - whole.offset as isize) / size as isize;
    let mut columns: Vec<(isize, isize)> =
        parts.iter().filter(alike).map(|p| (start(p), start(p) + p.cols as isize)).collect();
    columns.sort_unstable();
    let mut reached = 0;
    for (from, to) in columns {
        if from <= reached {
            reached = reached.max(to);
        }
    }
    reached >= whole.cols as isize
}
