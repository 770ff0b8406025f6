//! The list of systems, in order, of which each can be switched off.

use crate::diagnostic::{Diagnostic, Errors};
use crate::systems;
use crate::world::World;

/// A system: reads some components of the world and writes others.
pub type System = fn(&mut World) -> Result<(), Errors>;

struct Step {
    name: &'static str,
    run: System,
    /// Whether a plan is right without it.
    optional: bool,
}

/// Resource: the systems that are left out.
#[derive(Clone, Debug, Default)]
pub struct Without(pub Vec<String>);

/// Systems in the order in which they run.
pub struct Schedule(Vec<Step>);

impl Default for Schedule {
    fn default() -> Self {
        let required = |name, run| Step { name, run, optional: false };
        let optional = |name, run| Step { name, run, optional: true };
        Self(vec![
            required("infer", systems::infer::infer),
            optional("compound", systems::compound::compound),
            required("decompose", systems::compound::decompose),
            optional("merge", systems::merge::merge),
            required("differentiate", systems::differentiate::differentiate),
            required("update", systems::update::update),
            required("decompose_update", systems::compound::decompose),
            optional("merge_gradients", systems::merge::merge),
            optional("simplify", systems::simplify::simplify),
            optional("fuse", systems::fuse::fuse),
            optional("epilogue", systems::epilogue::epilogue),
            optional("mixed_precision", systems::mixed_precision::mixed_precision),
            optional("rematerialize", systems::rematerialize::rematerialize),
            required("order", systems::order::order),
            optional("in_place", systems::in_place::in_place),
            required("allocate", systems::allocate::allocate),
        ])
    }
}

impl Schedule {
    /// Adds an optional system behind the one named `after`, or before `rematerialize` if there is none of that name.
    pub fn insert_after(&mut self, after: &str, name: &'static str, run: System) {
        let at = self.0.iter().position(|s| s.name == after).map(|i| i + 1);
        let at = at.or_else(|| self.0.iter().position(|s| s.name == "rematerialize")).unwrap_or(self.0.len());
        self.0.insert(at, Step { name, run, optional: true });
    }

    /// The systems that `--without` may name.
    pub fn optional(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().filter(|s| s.optional).map(|s| s.name)
    }

    /// Runs every system but those named in `without`.
    ///
    /// # Errors
    /// What the first failing system says, or a name in `without` that is no optional system.
    pub fn run(&self, world: &mut World, without: &[String]) -> Result<(), Errors> {
        for name in without {
            if !self.optional().any(|s| s == name) {
                let known: Vec<_> = self.optional().collect();
                return Err(Diagnostic::new(format!("`{name}` is no system that can be switched off"))
                    .help(format!("there are: {}", known.join(", ")))
                    .into());
            }
        }
        world.set_resource(Without(without.to_vec()));
        for step in self.0.iter().filter(|s| !without.iter().any(|w| w == s.name)) {
            (step.run)(world)?;
        }
        Ok(())
    }
}
