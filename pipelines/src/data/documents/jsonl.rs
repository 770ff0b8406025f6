//! JSON lines: a document is a string field of an object, one object a line.

use std::fmt;
use std::io::{self, BufRead};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::text::TextError;
use super::{DocumentError, Sink};

/// Reads all lines; `lines` counts them. Empty ones are passed over.
pub(super) fn read(
    mut reader: impl BufRead,
    name: &str,
    field: &str,
    lines: &mut u64,
    sink: &mut dyn Sink,
) -> Result<(), TextError> {
    let mut line = Vec::new();
    let mut text = Vec::new();
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => *lines += 1,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(TextError::Io(error)),
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        text.clear();
        let mut parser = serde_json::Deserializer::from_slice(&line);
        let parsed = Field { name: field, text: &mut text }.deserialize(&mut parser);
        parsed.and_then(|()| parser.end()).map_err(|error| {
            let error = DocumentError::NoText {
                name: name.into(),
                position: format!("line {lines}"),
                // the parser's own line is always 1
                reason: error.to_string().replace(" at line 1 column ", " at column "),
            };
            TextError::Sink(error.into())
        })?;
        sink.text(&text)?;
        sink.end()?;
    }
}

/// Copies one field of an object.
struct Field<'a> {
    name: &'a str,
    text: &'a mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "an object with the field {:?}", self.name)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut found = false;
        let mut others = Vec::new();
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            if key == self.name {
                found = true;
                self.text.clear();
                map.next_value_seed(Text(self.text))?;
            } else {
                map.next_value::<IgnoredAny>()?;
                if !found && others.len() < 8 {
                    others.push(format!("{key:?}"));
                }
            }
        }
        match found {
            true => Ok(()),
            false if others.is_empty() => Err(serde::de::Error::custom(format!("there is no field {:?}", self.name))),
            false => Err(serde::de::Error::custom(format!(
                "there is no field {:?}, but {}; name the one with the text: --set documents.field=…",
                self.name,
                others.join(", ")
            ))),
        }
    }
}

/// Copies a string. Half a surrogate pair, which JSON allows and Unicode does not, becomes U+FFFD.
struct Text<'a>(&'a mut Vec<u8>);

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_bytes(self)
    }
}

impl Visitor<'_> for Text<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }

    fn visit_bytes<E>(self, mut bytes: &[u8]) -> Result<(), E> {
        if std::str::from_utf8(bytes).is_err() {
            // the parser writes half a pair as if it were a character: three bytes, ED A0…BF xx
            while let Some(at) = bytes.windows(3).position(|w| w[0] == 0xed && (0xa0..=0xbf).contains(&w[1])) {
                self.0.extend_from_slice(&bytes[..at]);
                self.0.extend_from_slice("\u{fffd}".as_bytes());
                bytes = &bytes[at + 3..];
            }
        }
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}
