//! Text that ends a completion.

/// Looks for stop texts in a text that comes in pieces. What may be the beginning of one is held back.
#[derive(Clone, Debug, Default)]
pub struct Stops {
    stops: Vec<String>,
    held: String,
}

impl Stops {
    /// For some texts; empty ones stop nothing.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Takes in a piece; returns what can be shown, and whether a stop text was met, which is not shown.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let begins = |from: usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[from..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(|at| begins(*at)).unwrap_or(self.held.len());
        let later = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, later), false)
    }

    /// What is left when no more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_texts_are_found_across_pieces_and_not_shown() {
        let mut stops = Stops::new(["END".to_string(), "\n\n".into(), String::new()]);
        assert_eq!(stops.push("abE"), ("ab".into(), false));
        assert_eq!(stops.push("N"), ("".into(), false));
        assert_eq!(stops.push("x\n"), ("ENx".into(), false));
        assert_eq!(stops.push("é"), ("\né".into(), false));
        assert_eq!(stops.push("1E"), ("1".into(), false));
        assert_eq!(stops.clone().finish(), "E");
        assert_eq!(stops.push("ND and more"), ("".into(), true));
        assert_eq!(Stops::new([]).push("all\n\n"), ("all\n\n".into(), false));
    }
}
