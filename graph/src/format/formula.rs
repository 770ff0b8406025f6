//! Arithmetic over named numbers: the expressions of `config`, of attributes, and of per-element initialisers.
//!
//! ```text
//! sum     = product (("+" | "-") product)*
//! product = factor (("*" | "/" | "%") factor)*
//! factor  = "-" factor | atom ("^" factor)?
//! atom    = number | name | name "(" sum ("," sum)* ")" | "(" sum ")"
//! ```
//! `/` is the division of real numbers; `floor` and `ceil` make integers of them. `%` has the sign of the
//! divisor. `^` is the power, and binds as in mathematics: `-x^2` is `-(x^2)`.

use std::fmt;

/// An integer or a real number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// Exact.
    Int(i64),
    /// Double precision.
    Real(f64),
}

impl Number {
    /// As a real number.
    pub fn real(self) -> f64 {
        match self {
            Number::Int(i) => i as f64,
            Number::Real(x) => x,
        }
    }

    /// As an integer, if it is one.
    pub fn int(self) -> Option<i64> {
        match self {
            Number::Int(i) => Some(i),
            Number::Real(x) => (x.fract() == 0.0 && x.abs() < 9e15).then_some(x as i64),
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Number::Int(i) => write!(f, "{i}"),
            Number::Real(x) => write!(f, "{x}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Number(Number),
    Name(String),
    Negate(Box<Node>),
    Binary(char, Box<Node>, Box<Node>),
    Call(&'static str, Vec<Node>),
}

/// A parsed expression.
#[derive(Clone, Debug, PartialEq)]
pub struct Formula {
    text: String,
    root: Node,
}

/// Functions and how many arguments they take.
const FUNCTIONS: &[(&str, usize)] = &[
    ("abs", 1),
    ("ceil", 1),
    ("exp", 1),
    ("floor", 1),
    ("ln", 1),
    ("max", 2),
    ("min", 2),
    ("round_up", 2),
    ("sqrt", 1),
];

/// Why an expression has no value.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FormulaError {
    /// It cannot be parsed.
    #[error("`{text}`: {what} at character {at}")]
    Syntax {
        /// The expression.
        text: String,
        /// What is wrong.
        what: String,
        /// Where, counted from 1.
        at: usize,
    },
    /// A name that is not defined here.
    #[error("`{text}`: unknown name `{name}`{hint}")]
    Unknown {
        /// The expression.
        text: String,
        /// The name.
        name: String,
        /// ", did you mean …" or nothing.
        hint: String,
    },
    /// A division by zero, an overflow and the like.
    #[error("`{text}`: {what}")]
    Arithmetic {
        /// The expression.
        text: String,
        /// What is wrong.
        what: String,
    },
}

impl Formula {
    /// Parses an expression.
    ///
    /// # Errors
    /// [`FormulaError::Syntax`]
    pub fn parse(text: &str) -> Result<Self, FormulaError> {
        let mut parser = Parser { text, at: 0 };
        let root = parser.sum(0)?;
        parser.space();
        if parser.at < text.len() {
            return Err(parser.error("expected an operator or the end"));
        }
        Ok(Self { text: text.to_string(), root })
    }

    /// The names that it uses.
    pub fn names(&self) -> Vec<&str> {
        fn walk<'a>(node: &'a Node, names: &mut Vec<&'a str>) {
            match node {
                Node::Number(_) => {}
                Node::Name(name) => names.push(name),
                Node::Negate(a) => walk(a, names),
                Node::Binary(_, a, b) => [a, b].into_iter().for_each(|n| walk(n, names)),
                Node::Call(_, arguments) => arguments.iter().for_each(|n| walk(n, names)),
            }
        }
        let mut names = Vec::new();
        walk(&self.root, &mut names);
        names
    }

    /// The value, with names looked up by `lookup`.
    ///
    /// # Errors
    /// [`FormulaError::Unknown`] or [`FormulaError::Arithmetic`]
    pub fn evaluate(&self, lookup: &dyn Fn(&str) -> Option<Number>) -> Result<Number, FormulaError> {
        self.node(&self.root, lookup).map_err(|error| match error {
            // the names' values tell which of them is to blame
            FormulaError::Arithmetic { text, what } => {
                let mut names = self.names();
                names.sort_unstable();
                names.dedup();
                let values = names.iter().filter_map(|n| lookup(n).map(|v| format!("{n} = {v}"))).collect::<Vec<_>>();
                let with = if values.is_empty() { String::new() } else { format!(" where {}", values.join(", ")) };
                FormulaError::Arithmetic { text, what: what + &with }
            }
            other => other,
        })
    }

    fn node(&self, node: &Node, lookup: &dyn Fn(&str) -> Option<Number>) -> Result<Number, FormulaError> {
        use Number::{Int, Real};
        let fail = |what: &str| FormulaError::Arithmetic { text: self.text.clone(), what: what.to_string() };
        let overflow = || fail("the result does not fit 64 bits");
        let finite = |x: f64| if x.is_finite() { Ok(Real(x)) } else { Err(fail("the result is not a finite number")) };
        Ok(match node {
            Node::Number(n) => *n,
            Node::Name(name) => lookup(name).ok_or_else(|| FormulaError::Unknown {
                text: self.text.clone(),
                name: name.clone(),
                hint: String::new(),
            })?,
            Node::Negate(a) => match self.node(a, lookup)? {
                Int(a) => Int(a.checked_neg().ok_or_else(overflow)?),
                Real(a) => Real(-a),
            },
            Node::Binary(operator, a, b) => {
                let (a, b) = (self.node(a, lookup)?, self.node(b, lookup)?);
                if matches!(operator, '/' | '%') && b.real() == 0.0 {
                    return Err(fail("division by zero"));
                }
                match (operator, a, b) {
                    ('+', Int(a), Int(b)) => Int(a.checked_add(b).ok_or_else(overflow)?),
                    ('-', Int(a), Int(b)) => Int(a.checked_sub(b).ok_or_else(overflow)?),
                    ('*', Int(a), Int(b)) => Int(a.checked_mul(b).ok_or_else(overflow)?),
                    ('%', Int(a), Int(b)) => {
                        let r = a.checked_rem(b).ok_or_else(overflow)?;
                        Int(if r != 0 && (r < 0) != (b < 0) { r + b } else { r })
                    }
                    ('^', Int(a), Int(b)) if b >= 0 => {
                        let exponent = u32::try_from(b).map_err(|_| overflow())?;
                        Int(a.checked_pow(exponent).ok_or_else(overflow)?)
                    }
                    ('+', a, b) => finite(a.real() + b.real())?,
                    ('-', a, b) => finite(a.real() - b.real())?,
                    ('*', a, b) => finite(a.real() * b.real())?,
                    ('/', a, b) => finite(a.real() / b.real())?,
                    ('%', a, b) => finite(a.real() - b.real() * (a.real() / b.real()).floor())?,
                    (_, a, b) => finite(a.real().powf(b.real()))?,
                }
            }
            Node::Call(function, arguments) => {
                let values =
                    arguments.iter().map(|a| self.node(a, lookup)).collect::<Result<Vec<_>, FormulaError>>()?;
                let to_int = |x: f64| {
                    if x.abs() < 9e15 { Ok(Int(x as i64)) } else { Err(overflow()) }
                };
                match (*function, values[0], values.get(1).copied()) {
                    ("abs", Int(a), _) => Int(a.checked_abs().ok_or_else(overflow)?),
                    ("abs", a, _) => Real(a.real().abs()),
                    ("ceil", a, _) => to_int(a.real().ceil())?,
                    ("floor", a, _) => to_int(a.real().floor())?,
                    ("exp", a, _) => finite(a.real().exp())?,
                    ("ln", a, _) => finite(a.real().ln())?,
                    ("sqrt", a, _) => finite(a.real().sqrt())?,
                    ("max", a, Some(b)) => {
                        if a.real() >= b.real() {
                            a
                        } else {
                            b
                        }
                    }
                    ("min", a, Some(b)) => {
                        if a.real() <= b.real() {
                            a
                        } else {
                            b
                        }
                    }
                    (_, a, Some(m)) => {
                        let (Some(a), Some(m)) = (a.int(), m.int()) else {
                            return Err(fail("`round_up(x, multiple)` takes integers"));
                        };
                        if m <= 0 {
                            return Err(fail("the multiple of `round_up` must be positive"));
                        }
                        Int((a.checked_add(m - 1).ok_or_else(overflow)?).div_euclid(m) * m)
                    }
                    _ => unreachable!("the parser checks the number of arguments"),
                }
            }
        })
    }
}

impl fmt::Display for Formula {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Nesting beyond this is an error rather than a stack overflow.
const MAX_DEPTH: usize = 64;

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn error(&self, what: impl Into<String>) -> FormulaError {
        let at = self.text[..self.at].chars().count() + 1;
        FormulaError::Syntax { text: self.text.to_string(), what: what.into(), at }
    }

    fn space(&mut self) {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
    }

    fn peek(&mut self) -> Option<char> {
        self.space();
        self.text[self.at..].chars().next()
    }

    fn eat(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.at += wanted.len_utf8();
        }
        found
    }

    fn binary(
        &mut self,
        depth: usize,
        operators: &[char],
        next: fn(&mut Self, usize) -> Result<Node, FormulaError>,
    ) -> Result<Node, FormulaError> {
        let mut left = next(self, depth)?;
        let mut terms = 0;
        while let Some(operator) = self.peek().filter(|c| operators.contains(c)) {
            self.eat(operator);
            terms += 1;
            if terms > MAX_DEPTH {
                return Err(self.error("the expression is too long"));
            }
            left = Node::Binary(operator, Box::new(left), Box::new(next(self, depth)?));
        }
        Ok(left)
    }

    fn sum(&mut self, depth: usize) -> Result<Node, FormulaError> {
        if depth > MAX_DEPTH {
            return Err(self.error("the expression is nested too deeply"));
        }
        self.binary(depth, &['+', '-'], Self::product)
    }

    fn product(&mut self, depth: usize) -> Result<Node, FormulaError> {
        self.binary(depth, &['*', '/', '%'], Self::factor)
    }

    fn factor(&mut self, depth: usize) -> Result<Node, FormulaError> {
        if depth > MAX_DEPTH {
            return Err(self.error("the expression is nested too deeply"));
        }
        if self.eat('-') {
            return Ok(Node::Negate(Box::new(self.factor(depth + 1)?)));
        }
        let base = self.atom(depth)?;
        if self.eat('^') {
            return Ok(Node::Binary('^', Box::new(base), Box::new(self.factor(depth + 1)?)));
        }
        Ok(base)
    }

    fn atom(&mut self, depth: usize) -> Result<Node, FormulaError> {
        if self.eat('(') {
            let inner = self.sum(depth + 1)?;
            return if self.eat(')') { Ok(inner) } else { Err(self.error("expected `)`")) };
        }
        let start = {
            self.space();
            self.at
        };
        let rest = &self.text[start..];
        match rest.chars().next() {
            Some(c) if c.is_ascii_digit() || c == '.' => {
                let bytes = rest.as_bytes();
                let mut end = 0;
                while end < bytes.len() {
                    let exponent_sign = matches!(bytes[end], b'+' | b'-') && matches!(bytes[end - 1], b'e' | b'E');
                    if !(bytes[end].is_ascii_digit()
                        || matches!(bytes[end], b'.' | b'e' | b'E' | b'_')
                        || exponent_sign)
                    {
                        break;
                    }
                    end += 1;
                }
                let digits = rest[..end].replace('_', "");
                let number = match digits.parse::<i64>() {
                    Ok(i) => Number::Int(i),
                    Err(_) => match digits.parse::<f64>() {
                        Ok(x) if x.is_finite() => Number::Real(x),
                        _ => return Err(self.error(format!("`{}` is not a number", &rest[..end]))),
                    },
                };
                self.at += end;
                Ok(Node::Number(number))
            }
            Some(c) if c.is_alphabetic() || c == '_' => {
                let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
                let name = &rest[..end];
                self.at += end;
                if !self.eat('(') {
                    return Ok(Node::Name(name.to_string()));
                }
                let Some(&(function, count)) = FUNCTIONS.iter().find(|f| f.0 == name) else {
                    self.at = start;
                    let known: Vec<_> = FUNCTIONS.iter().map(|f| f.0).collect();
                    return Err(self.error(format!("unknown function `{name}` (there are: {})", known.join(", "))));
                };
                let mut arguments = vec![self.sum(depth + 1)?];
                while self.eat(',') {
                    arguments.push(self.sum(depth + 1)?);
                }
                if !self.eat(')') {
                    return Err(self.error("expected `,` or `)`"));
                }
                if arguments.len() != count {
                    self.at = start;
                    return Err(self.error(format!("`{name}` takes {count} argument(s), not {}", arguments.len())));
                }
                Ok(Node::Call(function, arguments))
            }
            Some(c) => Err(self.error(format!("unexpected `{c}`, expected a number, a name or `(`"))),
            None => Err(self.error("expected a number, a name or `(`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Result<Number, FormulaError> {
        let names = |name: &str| match name {
            "c" => Some(Number::Int(384)),
            "p" => Some(Number::Real(0.5)),
            _ => None,
        };
        Formula::parse(text)?.evaluate(&names)
    }

    #[test]
    fn arithmetic_follows_the_usual_rules() {
        for (text, expected) in [
            ("2 * c + 1", Number::Int(769)),
            ("-2^2", Number::Int(-4)),
            ("2^-1", Number::Real(0.5)),
            ("ceil(c / 16)", Number::Int(24)),
            ("ceil(c / 18)", Number::Int(22)),
            ("round_up(floor(8 * c / 3), 256)", Number::Int(1024)),
            ("floor(floor(1.8 * c) / 6) * 6", Number::Int(690)),
            ("7 % 4 - (-7) % 4", Number::Int(2)),
            ("max(1, 2.5) * p", Number::Real(1.25)),
            ("1e-3 * 1_000", Number::Real(1.0)),
            ("10 - 3 - 2", Number::Int(5)),
        ] {
            assert_eq!(value(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn errors_say_what_and_where() {
        for (text, expected) in [
            ("c / 0", "`c / 0`: division by zero"),
            ("c % (p - p)", "`c % (p - p)`: division by zero"),
            ("2 * d", "`2 * d`: unknown name `d`"),
            ("2 *", "`2 *`: expected a number, a name or `(` at character 4"),
            ("sqr(2)", "`sqr(2)`: unknown function `sqr`"),
            ("max(2)", "`max(2)`: `max` takes 2 argument(s), not 1 at character 1"),
            ("(1", "`(1`: expected `)` at character 3"),
            ("1 2", "`1 2`: expected an operator or the end at character 3"),
            ("9223372036854775807 + 1", "does not fit 64 bits"),
            ("ln(0)", "not a finite number"),
        ] {
            let message = value(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{text}: {message}");
        }
        let deep = "(".repeat(100_000);
        assert!(value(&deep).unwrap_err().to_string().contains("nested too deeply"));
        assert!(value(&"-".repeat(100_000)).unwrap_err().to_string().contains("nested too deeply"));
        assert!(value(&"1+".repeat(100_000)).unwrap_err().to_string().contains("too long"));
    }
}
