//! The pickles of `torch.save`, read by a machine that knows the few operations which describe tensors.
//!
//! A pickle is a program, and Python's reader lets it call anything. Here nothing is ever called: the names of a dozen
//! classes and functions of PyTorch are known, and mean a tensor, a storage or an empty dictionary; any other name is
//! refused. Objects lie in one list and refer to each other by number, so that neither depth nor cycles matter, and
//! the memory used is bounded by the length of the pickle.

use std::collections::HashMap;

/// Why a pickle is not read.
#[derive(Debug, PartialEq)]
pub(super) enum PickleError {
    /// It asks for a name that is not known.
    Refused(String),
    /// It is damaged, or uses operations that tensors do not need.
    Wrong(String),
}

/// A tensor as the pickle describes it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TensorRef {
    /// The class of its storage: `FloatStorage`.
    pub storage: String,
    /// The name of the storage.
    pub key: String,
    /// In elements.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// In elements.
    pub stride: Vec<usize>,
}

impl TensorRef {
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The first element of the storage that it uses, and one past the last; `None` if these are no numbers.
    pub(super) fn range(&self) -> Option<(usize, usize)> {
        if self.shape.len() != self.stride.len() {
            return None;
        }
        let elements = self.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
        let mut last = self.offset;
        for (d, stride) in self.shape.iter().zip(&self.stride) {
            // products of a single dimension may be large even where the tensor is empty
            last = last.checked_add(d.saturating_sub(1).checked_mul(*stride)?)?;
            d.checked_mul(*stride)?;
        }
        Some(if elements == 0 { (0, 0) } else { (self.offset, last.checked_add(1)?) })
    }
}

/// A tensor with its name.
#[derive(Debug, PartialEq)]
pub(super) struct Found {
    pub name: String,
    pub tensor: TensorRef,
}

/// Names of dictionaries within a training checkpoint that hold the parameters.
const WITHIN: [&str; 4] = ["model", "state_dict", "model_state_dict", "module"];

/// Dimensions of a tensor, of PyTorch's 64 at most. Small, as the next one, so that copies do not multiply memory.
const MOST_DIMENSIONS: usize = 8;

/// Bytes of the name of a storage, which is a number.
const LONGEST_KEY: usize = 32;

/// The named tensors of a pickled `state_dict`, or of a dictionary with one in it.
pub(super) fn tensors(bytes: &[u8]) -> Result<Vec<Found>, PickleError> {
    let mut machine =
        Machine { bytes, at: 0, objects: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    let top = machine.run()?;
    let Object::Dict(mut entries) = machine.objects[top].clone() else {
        return wrong("it holds no dictionary: save a `state_dict()`");
    };
    let text = |id: &usize| match &machine.objects[*id] {
        Object::Text(text) => Some(text.as_str()),
        _ => None,
    };
    let dict = |id: &usize| match &machine.objects[*id] {
        Object::Dict(entries) => Some(entries.clone()),
        _ => None,
    };
    for name in WITHIN {
        let inner = entries.iter().find(|(key, value)| text(key) == Some(name) && dict(value).is_some());
        if let Some(inner) = inner.and_then(|(_, value)| dict(value)) {
            entries = inner;
            break;
        }
    }
    let mut found = Vec::new();
    for (key, value) in entries {
        if let (Some(name), Object::Tensor(tensor)) = (text(&key), &machine.objects[value]) {
            found.push(Found { name: name.to_string(), tensor: tensor.clone() });
        }
    }
    Ok(found)
}

/// What the machine computes with. Numbers are places in its list.
#[derive(Clone, Debug)]
enum Object {
    None,
    Int(i64),
    Text(String),
    /// A float, or bytes: of no use here.
    Other,
    Tuple(Vec<usize>),
    List(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Known(Known),
    Storage {
        class: String,
        key: String,
    },
    Tensor(TensorRef),
}

/// Classes and functions that are known.
#[derive(Clone, Debug)]
enum Known {
    /// `collections.OrderedDict`: called without arguments, an empty dictionary.
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, …)`
    Tensor,
    /// `torch._utils._rebuild_parameter(tensor, …)`
    Parameter,
    /// `torch.Size(sizes)`
    Size,
    /// `torch.FloatStorage` and its like; never called, only named.
    Storage(String),
    /// `torch.device(name)` and types of elements: of no use here.
    Other,
}

fn known(module: &str, name: &str) -> Option<Known> {
    Some(match (module, name) {
        ("collections", "OrderedDict") => Known::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => Known::Tensor,
        ("torch._utils", "_rebuild_parameter") => Known::Parameter,
        ("torch", "Size") => Known::Size,
        ("torch", "device" | "float32" | "float16" | "bfloat16" | "float64" | "int64" | "int32" | "bool") => {
            Known::Other
        }
        (
            "torch",
            "DoubleStorage" | "FloatStorage" | "HalfStorage" | "BFloat16Storage" | "LongStorage" | "IntStorage"
            | "ShortStorage" | "CharStorage" | "ByteStorage" | "BoolStorage",
        ) => Known::Storage(name.to_string()),
        _ => return None,
    })
}

fn wrong<T>(what: impl Into<String>) -> Result<T, PickleError> {
    Err(PickleError::Wrong(what.into()))
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    objects: Vec<Object>,
    stack: Vec<usize>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, usize>,
}

impl<'a> Machine<'a> {
    /// Runs to the end; returns the place of the result.
    fn run(&mut self) -> Result<usize, PickleError> {
        loop {
            let start = self.at;
            match self.byte()? {
                // PROTO, FRAME
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),
                b'.' => return self.pop(),
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.push(Object::None),
                0x88 => self.push(Object::Int(1)),
                0x89 => self.push(Object::Int(0)),
                b'J' => {
                    let n = i32::from_le_bytes(self.array()?);
                    self.push(Object::Int(n.into()));
                }
                b'K' => {
                    let n = self.byte()?;
                    self.push(Object::Int(n.into()));
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.array()?);
                    self.push(Object::Int(n.into()));
                }
                // LONG1: two's complement, little-endian
                0x8a => {
                    let length = self.byte()? as usize;
                    let bytes = self.take(length)?;
                    if length > 8 {
                        return wrong(format!("a number of {length} bytes at byte {start}"));
                    }
                    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                    let mut wide = if negative { [0xff; 8] } else { [0; 8] };
                    wide[..length].copy_from_slice(bytes);
                    self.push(Object::Int(i64::from_le_bytes(wide)));
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Object::Other);
                }
                b'X' => {
                    let length = u32::from_le_bytes(self.array()?) as usize;
                    self.text(length)?;
                }
                0x8c => {
                    let length = self.byte()? as usize;
                    self.text(length)?;
                }
                b'C' => {
                    let length = self.byte()? as usize;
                    self.take(length)?;
                    self.push(Object::Other);
                }
                b'B' => {
                    let length = u32::from_le_bytes(self.array()?) as usize;
                    self.take(length)?;
                    self.push(Object::Other);
                }
                b')' => self.push(Object::Tuple(Vec::new())),
                b']' => self.push(Object::List(Vec::new())),
                b'}' => self.push(Object::Dict(Vec::new())),
                count @ 0x85..=0x87 => {
                    let items = self.pop_some((count - 0x84) as usize)?;
                    self.push(Object::Tuple(items));
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Object::Tuple(items));
                }
                b'l' => {
                    let items = self.pop_to_mark()?;
                    self.push(Object::List(items));
                }
                b'd' => {
                    let items = self.pop_to_mark()?;
                    self.push(Object::Dict(Vec::new()));
                    self.set_items(items)?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.append(items)?;
                }
                b's' => {
                    let items = self.pop_some(2)?;
                    self.set_items(items)?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set_items(items)?;
                }
                b'q' => {
                    let key = self.byte()?;
                    self.remember(key.into())?;
                }
                b'r' => {
                    let key = u32::from_le_bytes(self.array()?);
                    self.remember(key)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'h' => {
                    let key = self.byte()?;
                    self.recall(key.into())?;
                }
                b'j' => {
                    let key = u32::from_le_bytes(self.array()?);
                    self.recall(key)?;
                }
                b'0' => drop(self.pop()?),
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(&module, &name)?;
                }
                // STACK_GLOBAL
                0x93 => {
                    let names = self.pop_some(2)?;
                    let [Object::Text(module), Object::Text(name)] = [&self.objects[names[0]], &self.objects[names[1]]]
                    else {
                        return wrong(format!("a name that is no text at byte {start}"));
                    };
                    let (module, name) = (module.clone(), name.clone());
                    self.global(&module, &name)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.reduce()?,
                // BUILD: the attributes of a dictionary, such as its `_metadata`, say nothing about tensors
                b'b' => {
                    self.pop()?;
                    match self.stack.last().map(|id| &self.objects[*id]) {
                        Some(Object::Dict(_) | Object::Tensor(_)) => {}
                        _ => return wrong(format!("attributes of something that has none at byte {start}")),
                    }
                }
                other => return wrong(format!("operation 0x{other:02x} at byte {start}, which no tensor needs")),
            }
        }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], PickleError> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else { return wrong("it ends in the middle") };
        let bytes = &self.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, PickleError> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        Ok(self.take(N)?.try_into().expect("as many as were taken"))
    }

    fn text(&mut self, length: usize) -> Result<(), PickleError> {
        match std::str::from_utf8(self.take(length)?) {
            Ok(text) => self.push(Object::Text(text.to_string())),
            Err(_) => return wrong("a text that is not UTF-8"),
        }
        Ok(())
    }

    fn line(&mut self) -> Result<String, PickleError> {
        let rest = &self.bytes[self.at..];
        let Some(length) = rest.iter().position(|b| *b == b'\n') else { return wrong("it ends in the middle") };
        let line = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.at += 1;
        Ok(line)
    }

    fn push(&mut self, object: Object) {
        self.stack.push(self.objects.len());
        self.objects.push(object);
    }

    fn pop(&mut self) -> Result<usize, PickleError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => Ok(self.stack.pop().expect("higher than the floor")),
            false => wrong("it takes from an empty stack"),
        }
    }

    /// In the order in which they were pushed.
    fn pop_some(&mut self, count: usize) -> Result<Vec<usize>, PickleError> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        Ok(items)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<usize>, PickleError> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => wrong("a mark is missing"),
        }
    }

    fn top(&mut self) -> Result<&mut Object, PickleError> {
        match self.stack.last() {
            Some(id) => Ok(&mut self.objects[*id]),
            None => wrong("it uses an empty stack"),
        }
    }

    fn append(&mut self, items: Vec<usize>) -> Result<(), PickleError> {
        match self.top()? {
            Object::List(list) => list.extend(items),
            _ => return wrong("it appends to what is no list"),
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<usize>) -> Result<(), PickleError> {
        match self.top()? {
            Object::Dict(dict) if items.len().is_multiple_of(2) => {
                dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                Ok(())
            }
            _ => wrong("it sets items of what is no dictionary"),
        }
    }

    fn remember(&mut self, key: u32) -> Result<(), PickleError> {
        match self.stack.last() {
            Some(id) => drop(self.memo.insert(key, *id)),
            None => return wrong("it remembers nothing"),
        }
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), PickleError> {
        match self.memo.get(&key) {
            Some(id) => self.stack.push(*id),
            None => return wrong("it recalls what was not remembered"),
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), PickleError> {
        match known(module, name) {
            Some(known) => self.push(Object::Known(known)),
            None => return Err(PickleError::Refused(format!("{module}.{name}"))),
        }
        Ok(())
    }

    fn int(&self, id: usize) -> Result<usize, PickleError> {
        match self.objects[id] {
            Object::Int(n) => usize::try_from(n).or_else(|_| wrong(format!("a size of {n}"))),
            _ => wrong("a size that is no number"),
        }
    }

    fn ints(&self, id: usize) -> Result<Vec<usize>, PickleError> {
        match &self.objects[id] {
            Object::Tuple(items) | Object::List(items) if items.len() <= MOST_DIMENSIONS => {
                items.iter().map(|id| self.int(*id)).collect()
            }
            _ => wrong("a shape that is no short tuple"),
        }
    }

    /// BINPERSID: `("storage", class, key, place, elements)`.
    fn storage(&mut self) -> Result<(), PickleError> {
        let id = self.pop()?;
        let Object::Tuple(items) = &self.objects[id] else { return wrong("a storage that is no tuple") };
        let object = |n: usize| items.get(n).map(|id| &self.objects[*id]);
        let storage = match (object(0), object(1), object(2)) {
            (Some(Object::Text(kind)), Some(Object::Known(Known::Storage(class))), Some(Object::Text(key)))
                if kind == "storage" && key.len() <= LONGEST_KEY =>
            {
                Object::Storage { class: class.clone(), key: key.clone() }
            }
            _ => return wrong("a storage without class and key"),
        };
        self.push(storage);
        Ok(())
    }

    fn reduce(&mut self) -> Result<(), PickleError> {
        let pair = self.pop_some(2)?;
        let (Object::Known(callee), Object::Tuple(arguments)) = (&self.objects[pair[0]], &self.objects[pair[1]]) else {
            return wrong("a call of what cannot be called");
        };
        let result = match (callee, &arguments[..]) {
            (Known::OrderedDict, []) => Object::Dict(Vec::new()),
            (Known::Tensor, [storage, offset, shape, stride, ..]) => {
                let Object::Storage { class, key } = &self.objects[*storage] else {
                    return wrong("a tensor without a storage");
                };
                Object::Tensor(TensorRef {
                    storage: class.clone(),
                    key: key.clone(),
                    offset: self.int(*offset)?,
                    shape: self.ints(*shape)?,
                    stride: self.ints(*stride)?,
                })
            }
            // what they wrap, not a copy: calls must not multiply memory
            (Known::Parameter, [wrapped, ..]) | (Known::Size, [wrapped]) => {
                self.stack.push(*wrapped);
                return Ok(());
            }
            (Known::Other, _) => Object::Other,
            _ => return wrong("a call with arguments that no tensor needs"),
        };
        self.push(result);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `{"w": tensor of shape [2, 3]}`, as `torch.save` pickles it.
    fn example() -> Vec<u8> {
        let mut bytes = b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01X\x01\x00\x00\x00wq\x02".to_vec();
        bytes.extend(
            b"ctorch._utils\n_rebuild_tensor_v2\nq\x03((X\x07\x00\x00\x00storageq\x04ctorch\nFloatStorage\nq\x05",
        );
        bytes.extend(
            b"X\x01\x00\x00\x000q\x06X\x03\x00\x00\x00cpuq\x07K\x06tq\x08QK\x00K\x02K\x03\x86q\x09K\x03K\x01\x86q\x0a",
        );
        bytes.extend(b"\x89h\x00)Rq\x0btq\x0cRq\x0ds}q\x0eX\x09\x00\x00\x00_metadataq\x0fh\x00)Rq\x10sb.");
        bytes
    }

    #[test]
    fn a_state_dict() {
        let tensor = TensorRef {
            storage: "FloatStorage".into(),
            key: "0".into(),
            offset: 0,
            shape: vec![2, 3],
            stride: vec![3, 1],
        };
        assert_eq!(tensors(&example()).unwrap(), [Found { name: "w".into(), tensor }]);
    }

    #[test]
    fn nothing_else_is_called() {
        for (module, name) in [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("posix", "system")] {
            let bytes = format!("\x02c{module}\n{name}\nX\x02\0\0\0ls\u{7f}");
            let mut bytes: Vec<u8> = bytes.into_bytes();
            bytes[0] = 2;
            bytes.insert(0, 0x80);
            *bytes.last_mut().unwrap() = 0x85;
            bytes.extend(b"R.");
            assert_eq!(tensors(&bytes), Err(PickleError::Refused(format!("{module}.{name}"))));
        }
        // by the stack, as newer protocols do
        let bytes = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.";
        assert_eq!(tensors(bytes), Err(PickleError::Refused("os.system".into())));
        // operations that make objects of classes: INST, OBJ, NEWOBJ, EXT1
        for operation in *b"io\x81\x82" {
            let bytes = [0x80, 2, b'(', operation, b'.'];
            assert!(matches!(tensors(&bytes), Err(PickleError::Wrong(_))), "{operation}");
        }
    }

    #[test]
    fn damage_is_an_error_and_no_panic() {
        let whole = example();
        for length in 0..whole.len() {
            assert!(tensors(&whole[..length]).is_err(), "{length} bytes");
        }
        let mut random = dataflow_kernels::random::Stream::new(5, 0);
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..1 + random.next_u32() % 4 {
                let at = random.next_u32() as usize % bytes.len();
                bytes[at] = random.next_u32() as u8;
            }
            if let Ok(found) = tensors(&bytes) {
                assert!(found.iter().all(|f| f.tensor.range().is_none_or(|(first, last)| first <= last)));
            }
        }
    }
}
