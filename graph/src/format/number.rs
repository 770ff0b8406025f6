//! Attribute types whose values may be expressions over `config`.
//!
//! While a row is parsed, a [`Scope`] holds the names that its expressions may use; [`with_scope`] makes it
//! current for the thread, because serde's traits have no place for a context.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::ser::{Serialize, Serializer};

use super::formula::{Formula, Number};
use crate::diagnostic::nearest;

/// Named numbers.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    numbers: Arc<BTreeMap<String, Number>>,
    /// Names that should have a number, but it is wrong and was reported.
    wrong: Arc<BTreeSet<String>>,
}

/// What [`Scope::evaluate`] says about an expression that uses a name whose number is wrong: nothing new for the user.
pub(crate) const FOLLOWS: &str = "a name that it uses has no value";

impl Scope {
    /// These names.
    pub fn new(names: BTreeMap<String, Number>) -> Self {
        Self { numbers: Arc::new(names), wrong: Arc::default() }
    }

    /// The same, with names whose numbers are wrong.
    pub(crate) fn without(self, wrong: BTreeSet<String>) -> Self {
        Self { wrong: Arc::new(wrong), ..self }
    }

    /// The same names and one more.
    pub fn with(&self, name: &str, value: Number) -> Self {
        let mut numbers = (*self.numbers).clone();
        numbers.insert(name.to_string(), value);
        Self { numbers: Arc::new(numbers), wrong: self.wrong.clone() }
    }

    /// The value of a name.
    pub fn get(&self, name: &str) -> Option<Number> {
        self.numbers.get(name).copied()
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.numbers.keys().map(String::as_str)
    }

    /// The value of an expression over these names.
    ///
    /// # Errors
    /// A message for the user.
    pub fn evaluate(&self, text: &str) -> Result<Number, String> {
        let formula = Formula::parse(text).map_err(|e| e.to_string())?;
        if formula.names().iter().any(|n| self.wrong.contains(*n)) {
            return Err(FOLLOWS.into());
        }
        for name in formula.names() {
            if self.get(name).is_none() {
                let hint = match nearest(name, self.names()) {
                    Some(best) => format!("did you mean `{best}`?"),
                    None => format!("there are: {}", self.names().collect::<Vec<_>>().join(", ")),
                };
                return Err(format!("`{text}`: unknown name `{name}`, {hint}"));
            }
        }
        formula.evaluate(&|name| self.get(name)).map_err(|e| e.to_string())
    }
}

thread_local! {
    static CURRENT: RefCell<Scope> = RefCell::default();
}

/// Runs `body` with `scope` as the names that expressions may use.
pub fn with_scope<R>(scope: &Scope, body: impl FnOnce() -> R) -> R {
    struct Restore(Option<Scope>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0.take().unwrap_or_default());
        }
    }
    let _restore = Restore(Some(CURRENT.replace(scope.clone())));
    body()
}

/// The names that expressions may use here.
pub fn current_scope() -> Scope {
    CURRENT.with_borrow(Scope::clone)
}

struct NumberVisitor;

impl Visitor<'_> for NumberVisitor {
    type Value = Number;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number or an expression in quotes")
    }
    fn visit_bool<E: Error>(self, v: bool) -> Result<Number, E> {
        Ok(Number::Int(v.into()))
    }
    fn visit_i64<E: Error>(self, v: i64) -> Result<Number, E> {
        Ok(Number::Int(v))
    }
    fn visit_u64<E: Error>(self, v: u64) -> Result<Number, E> {
        i64::try_from(v).map(Number::Int).map_err(|_| E::custom(format!("{v} is too large")))
    }
    fn visit_f64<E: Error>(self, v: f64) -> Result<Number, E> {
        Ok(Number::Real(v))
    }
    fn visit_str<E: Error>(self, v: &str) -> Result<Number, E> {
        current_scope().evaluate(v).map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberVisitor)
    }
}

/// A size: a non-negative integer or an expression that yields one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Size(pub usize);

/// A real number or an expression.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Real(pub f64);

/// `true`, `false`, or an expression of which 0 means false.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flag(pub bool);

macro_rules! number_type {
    ($name:ident, $inner:ty, $convert:expr) => {
        impl Deref for $name {
            type Target = $inner;
            fn deref(&self) -> &$inner {
                &self.0
            }
        }
        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let number = Number::deserialize(deserializer)?;
                let convert: fn(Number) -> Result<$inner, String> = $convert;
                convert(number).map(Self).map_err(D::Error::custom)
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }
    };
}

number_type!(Size, usize, |n| {
    n.int().and_then(|i| usize::try_from(i).ok()).ok_or_else(|| format!("expected a non-negative integer, found {n}"))
});
number_type!(Real, f64, |n| Ok(n.real()));
number_type!(Flag, bool, |n| Ok(n.real() != 0.0));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_numbers_or_expressions() {
        #[derive(serde::Deserialize)]
        struct Attributes {
            out: Size,
            eps: Real,
            bias: Flag,
        }
        let scope = Scope::new([("d".to_string(), Number::Int(8)), ("b".to_string(), Number::Int(0))].into());
        let parse = |text: &str| with_scope(&scope, || ron::from_str::<Attributes>(text));
        let a = parse(r#"(out: "d / 2", eps: 1e-5, bias: "b")"#).unwrap();
        assert_eq!((*a.out, *a.eps, *a.bias), (4, 1e-5, false));
        let a = parse("(out: 3, eps: 1, bias: true)").unwrap();
        assert_eq!((*a.out, *a.eps, *a.bias), (3, 1.0, true));
        for (text, expected) in [
            (r#"(out: "d / 3", eps: 1, bias: true)"#, "non-negative integer"),
            (r#"(out: "e", eps: 1, bias: true)"#, "unknown name `e`, there are: b, d"),
            (r#"(out: "d / b", eps: 1, bias: true)"#, "division by zero"),
            ("(out: -1, eps: 1, bias: true)", "non-negative integer, found -1"),
        ] {
            let message = parse(text).err().unwrap().code.to_string();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }
}
