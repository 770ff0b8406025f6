//! The time of each launch against its roofline.

use dataflow_graph::op::Cost;
use dataflow_graph::plan::PlannedLaunch;
use serde::{Deserialize, Serialize};

use super::median;
use super::roofline::Roofline;

/// What was measured of one launch, or of all launches of one op.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The path of row names; for several launches how many there are.
    pub name: String,
    /// The op, without its attributes.
    pub op: String,
    /// Median time of a step, in milliseconds.
    pub ms: f64,
    /// Its part of the time of all launches.
    pub share: f64,
    /// 10⁹ floating-point operations in a second.
    pub gflops_per_s: f64,
    /// 10⁹ bytes read and written in a second.
    pub gb_per_s: f64,
    /// The least time that the roofline allows over the time it took.
    pub roofline_fraction: f64,
    /// The least time that the roofline allows, in milliseconds.
    pub floor_ms: f64,
}

/// The op of a launch without its attributes.
fn kind(launch: &PlannedLaunch) -> &str {
    launch.op.split([' ', '(', '{']).next().unwrap_or_default()
}

/// Time and work of some launches.
#[derive(Clone, Copy, Default)]
struct Sum {
    seconds: f64,
    cost: Cost,
    floor: f64,
}

impl Sum {
    fn measured(&self, name: String, op: &str, total: f64) -> Measured {
        let per = |x: f64, y: f64| if y > 0.0 { x / y } else { 0.0 };
        Measured {
            name,
            op: op.to_string(),
            ms: self.seconds * 1e3,
            share: per(self.seconds, total),
            gflops_per_s: per(self.cost.flops, self.seconds) / 1e9,
            gb_per_s: per(self.cost.bytes, self.seconds) / 1e9,
            roofline_fraction: per(self.floor, self.seconds),
            floor_ms: self.floor * 1e3,
        }
    }
}

/// Every launch, in order, and every kind of op, the slowest first. `steps` has the seconds of each launch in each step.
pub fn measure(launches: &[PlannedLaunch], steps: &[Vec<f64>], roofline: &Roofline) -> (Vec<Measured>, Vec<Measured>) {
    let seconds: Vec<f64> =
        (0..launches.len()).map(|i| median(&steps.iter().map(|step| step[i]).collect::<Vec<_>>())).collect();
    let total: f64 = seconds.iter().sum();
    let mut kinds: Vec<(&str, usize, Sum)> = Vec::new();
    let mut each = Vec::with_capacity(launches.len());
    for (launch, &seconds) in launches.iter().zip(&seconds) {
        let one = Sum { seconds, cost: launch.cost, floor: roofline.floor(launch.cost) };
        each.push(one.measured(launch.name.clone(), kind(launch), total));
        let at = kinds.iter().position(|k| k.0 == kind(launch)).unwrap_or_else(|| {
            kinds.push((kind(launch), 0, Sum::default()));
            kinds.len() - 1
        });
        let (_, count, sum) = &mut kinds[at];
        *count += 1;
        sum.seconds += one.seconds;
        sum.floor += one.floor;
        sum.cost.flops += one.cost.flops;
        sum.cost.bytes += one.cost.bytes;
    }
    kinds.sort_by(|a, b| b.2.seconds.total_cmp(&a.2.seconds));
    (each, kinds.iter().map(|(op, count, sum)| sum.measured(count.to_string(), op, total)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataflow_graph::components::Phase;

    #[test]
    fn times_are_medians_and_kinds_are_sums() {
        let mut world = dataflow_graph::world::World::new();
        let node = world.add_node();
        let launch = |name: &str, op: &str, flops: f64, bytes: f64| PlannedLaunch {
            node,
            name: name.into(),
            op: op.into(),
            phase: Phase::Step,
            inputs: vec![],
            outputs: vec![],
            sources: vec![],
            in_place: vec![],
            cost: Cost { flops, bytes },
        };
        let launches =
            [launch("a", "Linear { out: 3 }", 4e9, 1e9), launch("b", "Add", 0.0, 3e9), launch("c", "Linear", 4e9, 0.0)];
        let roofline = Roofline { flops_per_s: 4e9, bytes_per_s: 2e9 };
        let steps = [vec![2.0, 3.0, 2.0], vec![9.0, 2.0, 2.0], vec![1.0, 3.0, 1.0]];
        let (each, kinds) = measure(&launches, &steps, &roofline);
        assert_eq!(each.iter().map(|m| m.ms).collect::<Vec<_>>(), [2000.0, 3000.0, 2000.0]);
        assert_eq!(each[0].roofline_fraction, 0.5);
        assert_eq!((each[1].roofline_fraction, each[1].gb_per_s), (0.5, 1.0));
        let shown: Vec<_> = kinds.iter().map(|m| (m.op.as_str(), m.name.as_str(), m.ms)).collect();
        assert_eq!(shown, [("Linear", "2", 4000.0), ("Add", "1", 3000.0)]);
        assert_eq!((kinds[0].floor_ms, kinds[0].gflops_per_s), (2000.0, 2.0));
    }
}
