//! One way to register: ops, stages and systems come in through [`Plugin`]s.
//!
//! A [`Registry`] holds one [`Table`] for each kind of row (`dyn Op`, the package's `dyn Stage`). An entry is
//! a serde struct found by its name; its attributes are the struct's fields.

use std::any::{Any, TypeId};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use ron::extensions::Extensions;
use serde::Serialize;
use serde::de::{self, DeserializeOwned, Deserializer, Visitor};

use crate::format::rows::options;
use crate::op::Op;
use crate::schedule::Schedule;

/// A bundle of registrations. The built-in ops and stages are plugins too.
pub trait Plugin {
    /// Registers what the plugin brings.
    fn build(&self, registry: &mut Registry);
}

/// What people read about an op or stage.
#[derive(Clone, Copy, Debug)]
pub struct Info {
    /// As it is written in a row: the name before `(`.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// What each input is, in order.
    pub inputs: &'static [&'static str],
    /// The formula, or empty.
    pub formula: &'static str,
    /// The paper or other source, or empty.
    pub source: &'static str,
    /// The attributes that must be given, with sample values: `(out: 8)`. Empty if none must.
    pub example: &'static str,
}

type Parse<K> = Box<dyn Fn(&str) -> Result<Arc<K>, ron::error::SpannedError> + Send + Sync>;

/// A registered op or stage.
pub struct Entry<K: ?Sized> {
    /// For people.
    pub info: Info,
    /// Names of its attributes.
    pub attributes: &'static [&'static str],
    parse: Parse<K>,
    /// Attributes of the example, written out: shows defaults.
    pub shown: String,
}

impl<K: ?Sized> Entry<K> {
    /// Reads the attributes `(…)` of a row.
    ///
    /// # Errors
    /// What serde says, with the place inside of `attributes`.
    pub fn parse(&self, attributes: &str) -> Result<Arc<K>, ron::error::SpannedError> {
        (self.parse)(attributes)
    }
}

/// All registered entries of one kind.
pub struct Table<K: ?Sized>(BTreeMap<&'static str, Entry<K>>);

impl<K: ?Sized> Default for Table<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: ?Sized> Table<K> {
    /// The entry of this name.
    pub fn get(&self, name: &str) -> Option<&Entry<K>> {
        self.0.get(name)
    }

    /// Every name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.keys().copied()
    }

    /// Every entry, sorted by name.
    pub fn entries(&self) -> impl Iterator<Item = &Entry<K>> {
        self.0.values()
    }
}

/// Everything that rows may name, and the systems of the compiler.
#[derive(Default)]
pub struct Registry {
    tables: HashMap<TypeId, Box<dyn Any + Send + Sync>>,
    /// The systems that compile a model, in order.
    pub systems: Schedule,
}

impl Registry {
    /// Nothing registered but the compiler's own systems.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers everything that a plugin brings.
    pub fn add_plugin(&mut self, plugin: &dyn Plugin) {
        plugin.build(self);
    }

    /// Registers an op; a later registration of the same name replaces the earlier one.
    pub fn op<T>(&mut self, info: Info)
    where
        T: Op + Serialize + DeserializeOwned,
    {
        self.add::<dyn Op, T>(info, |op| Arc::new(op));
    }

    /// Registers an entry of any kind.
    pub fn add<K, T>(&mut self, info: Info, into: fn(T) -> Arc<K>)
    where
        K: ?Sized + Send + Sync + 'static,
        T: Serialize + DeserializeOwned + 'static,
    {
        let example = if info.example.is_empty() { "()" } else { info.example };
        let shown = options()
            .from_str::<T>(example)
            .ok()
            .and_then(|sample| {
                let pretty = ron::ser::PrettyConfig::new().compact_structs(true).extensions(Extensions::IMPLICIT_SOME);
                ron::ser::to_string_pretty(&sample, pretty).ok()
            })
            // without the line that enables the extension
            .and_then(|text| text.lines().last().map(str::to_string))
            .unwrap_or_default();
        let entry = Entry {
            info,
            attributes: fields_of::<T>(),
            parse: Box::new(move |text| options().from_str::<T>(text).map(into)),
            shown,
        };
        let table = self.tables.entry(TypeId::of::<Table<K>>()).or_insert_with(|| Box::new(Table::<K>::default()));
        let table: &mut Table<K> = table.downcast_mut().expect("keyed by type");
        table.0.insert(info.name, entry);
    }

    /// The table of a kind.
    pub fn table<K: ?Sized + Send + Sync + 'static>(&self) -> Option<&Table<K>> {
        self.tables.get(&TypeId::of::<Table<K>>())?.downcast_ref()
    }

    /// The ops.
    pub fn ops(&self) -> Option<&Table<dyn Op>> {
        self.table()
    }
}

/// The field names that a struct's `Deserialize` asks for.
fn fields_of<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Probe<'a>(&'a mut &'static [&'static str]);

    #[derive(Debug)]
    struct Stop;
    impl fmt::Display for Stop {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("stop")
        }
    }
    impl std::error::Error for Stop {}
    impl de::Error for Stop {
        fn custom<M: fmt::Display>(_: M) -> Self {
            Stop
        }
    }

    impl<'de> Deserializer<'de> for Probe<'_> {
        type Error = Stop;
        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Stop> {
            Err(Stop)
        }
        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Stop> {
            *self.0 = fields;
            Err(Stop)
        }
        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut fields: &'static [&'static str] = &[];
    let _ = T::deserialize(Probe(&mut fields));
    fields
}
