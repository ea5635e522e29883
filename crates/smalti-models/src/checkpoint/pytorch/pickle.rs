//! A pickle's values, by an interpreter that builds containers and tensors' descriptions, and calls nothing.
//!
//! What neither holds nor names a tensor is a placeholder. Memory is counted while values are made, and ends with an error instead of
//! with the process: a pickle of a few bytes can ask for any amount.

use super::rebuild;
use super::tensor::{Storage, Tensor};
use std::collections::HashMap;
use std::io::{BufRead, Read};
use std::sync::Arc;

/// The place of a value among those of its pickle.
pub(super) type Ref = u32;

/// A value of a pickle.
#[derive(Clone, Debug)]
pub(super) enum Value {
    /// What neither holds nor names a tensor.
    Other,
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Box<str>),
    /// Module and name.
    Class(Box<(String, String)>),
    /// Lists and sets.
    List(Vec<Ref>),
    Tuple(Vec<Ref>),
    Dict(Vec<(Ref, Ref)>),
    Object(Box<Object>),
    Storage(Box<Storage>),
    Tensor(Arc<Tensor>),
}

/// What a call would have made.
#[derive(Clone, Debug)]
pub(super) struct Object {
    /// What was called.
    pub callable: Ref,
    /// With what: a tuple, as a rule.
    pub arguments: Ref,
    /// What was appended, of a list's subclass.
    pub items: Vec<Ref>,
    /// What was set by key, of a dictionary's subclass.
    pub entries: Vec<(Ref, Ref)>,
    /// Its attributes.
    pub state: Option<Ref>,
}

/// What persistent ids stand for.
pub(super) enum Ids<'a> {
    /// Nothing.
    Unknown,
    /// Storages, as the id describes them.
    Storages,
    /// Tensors of a table.
    Tensors(&'a HashMap<String, Arc<Tensor>>),
}

/// The values of a pickle.
pub(super) struct Values {
    pub all: Vec<Value>,
    pub root: Ref,
}

impl Values {
    pub fn root(&self) -> &Value {
        &self.all[self.root as usize]
    }
}

/// Reads one pickle; the reader stands behind it afterwards. `size` is what the reader has at most: no text can be longer.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(input: &mut dyn BufRead, size: u64, ids: &Ids<'_>) -> Result<Values, String> {
    let mut machine = Machine::new(input, size, ids);
    loop {
        let op = machine.byte()?;
        if op == b'.' {
            let root = machine.pop()?;
            return Ok(Values { all: machine.values, root });
        }
        machine.step(op)?;
    }
}

/// Longest text that can be a key.
const LONGEST_KEY: usize = 1 << 16;
/// Memory that the values of any pickle may take, and what a large file's may take at most.
const MEMORY: (u64, u64) = (64 << 20, 1 << 30);

pub(super) struct Machine<'a> {
    input: &'a mut dyn BufRead,
    size: u64,
    ids: &'a Ids<'a>,
    pub values: Vec<Value>,
    stack: Vec<Ref>,
    marks: Vec<usize>,
    memo: HashMap<u64, Ref>,
    /// Bytes of memory that are left.
    budget: u64,
}

impl<'a> Machine<'a> {
    fn new(input: &'a mut dyn BufRead, size: u64, ids: &'a Ids<'a>) -> Self {
        let budget = MEMORY.0.saturating_add(size.saturating_mul(16)).min(MEMORY.1);
        let (values, stack, marks) = (Vec::new(), Vec::new(), Vec::new());
        Self { input, size, ids, values, stack, marks, memo: HashMap::new(), budget }
    }

    /// # Errors
    /// If the pickle asks for more memory than a checkpoint's can need.
    pub fn spend(&mut self, bytes: usize) -> Result<(), String> {
        match self.budget.checked_sub(bytes as u64) {
            Some(left) => self.budget = left,
            None => return Err("its pickle needs more memory than any checkpoint's".into()),
        }
        Ok(())
    }

    /// # Errors
    /// As [`Self::spend`].
    pub fn make(&mut self, value: Value) -> Result<Ref, String> {
        let inside = match &value {
            Value::Text(text) => text.len(),
            Value::List(items) | Value::Tuple(items) => items.len() * size_of::<Ref>(),
            Value::Dict(entries) => entries.len() * size_of::<(Ref, Ref)>(),
            Value::Class(class) => 128 + class.0.len() + class.1.len(),
            Value::Object(object) => size_of::<Object>() + object.entries.len() * size_of::<(Ref, Ref)>(),
            Value::Storage(_) | Value::Tensor(_) => 384,
            _ => 0,
        };
        // Twice, since what grows is moved.
        self.spend(2 * size_of::<Value>() + inside)?;
        self.values.push(value);
        Ref::try_from(self.values.len() - 1).map_err(|_| "its pickle holds too many values".into())
    }

    pub fn value(&self, at: Ref) -> &Value {
        &self.values[at as usize]
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        let at = self.make(value)?;
        self.push_ref(at)
    }

    fn push_ref(&mut self, at: Ref) -> Result<(), String> {
        self.spend(2 * size_of::<Ref>())?;
        self.stack.push(at);
        Ok(())
    }

    fn pop(&mut self) -> Result<Ref, String> {
        let floor = self.marks.last().copied().unwrap_or_default();
        if self.stack.len() <= floor {
            return Err("its pickle takes more than it has".into());
        }
        self.stack.pop().ok_or_else(|| "its pickle takes more than it has".into())
    }

    fn top(&self) -> Result<Ref, String> {
        self.stack.last().copied().ok_or_else(|| "its pickle takes more than it has".into())
    }

    fn pop_mark(&mut self) -> Result<Vec<Ref>, String> {
        let mark = self.marks.pop().ok_or("its pickle ends a list that has no start")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    /// One instruction.
    fn step(&mut self, op: u8) -> Result<(), String> {
        match op {
            b'(' => {
                self.spend(2 * size_of::<usize>())?;
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' if self.marks.last() == Some(&self.stack.len()) => self.pop_mark().map(drop),
            b'0' => self.pop().map(drop),
            b'1' => self.pop_mark().map(drop),
            b'2' => self.top().and_then(|top| self.push_ref(top)),
            // Version, frame, and the end of a buffer that cannot be written.
            0x80 => self.skip(1),
            0x95 => self.skip(8),
            0x98 => Ok(()),
            b'p' | b'q' | b'r' | 0x94 | b'g' | b'h' | b'j' => self.remember(op),
            b'c' | 0x93 | b'R' | 0x81 | 0x92 | b'i' | b'o' | b'b' | b'P' | b'Q' => self.call(op),
            b')' | b't' | 0x85..=0x87 | b']' | b'l' | b'}' | b'd' | 0x8f | 0x91 => self.container(op),
            b'a' | b'e' | 0x90 | b's' | b'u' => self.fill(op),
            _ => self.scalar(op),
        }
    }

    /// Numbers and texts.
    fn scalar(&mut self, op: u8) -> Result<(), String> {
        let value = match op {
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Int(self.byte()?.into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            b'G' => Value::Float(f64::from_be_bytes(self.array()?)),
            b'I' => match self.line()?.as_str() {
                "00" => Value::Bool(false),
                "01" => Value::Bool(true),
                text => text.parse().map_or(Value::Other, Value::Int),
            },
            b'L' => self.line()?.trim_end_matches('L').parse().map_or(Value::Other, Value::Int),
            b'F' => self.line()?.parse().map_or(Value::Other, Value::Float),
            0x8a => {
                let length = self.byte()?.into();
                self.long(length)?
            }
            0x8b => {
                let length = u32::from_le_bytes(self.array()?).into();
                self.long(length)?
            }
            b'S' => Value::Text(unescaped(self.line()?.trim_matches(['\'', '"'])).into()),
            b'V' => Value::Text(unescaped(&self.line()?).into()),
            b'U' | b'C' | 0x8c => {
                let length = self.byte()?.into();
                self.text(length)?
            }
            b'T' | b'X' | b'B' => {
                let length = u32::from_le_bytes(self.array()?).into();
                self.text(length)?
            }
            0x8d | 0x8e | 0x96 => {
                let length = u64::from_le_bytes(self.array()?);
                self.text(length)?
            }
            // Registered classes, and buffers that are elsewhere.
            0x82 => self.skip(1).map(|()| Value::Other)?,
            0x83 => self.skip(2).map(|()| Value::Other)?,
            0x84 => self.skip(4).map(|()| Value::Other)?,
            0x97 => Value::Other,
            _ => return Err(format!("its pickle has an instruction {op:#04x}, which there is not")),
        };
        self.push(value)
    }

    /// What is kept for later, and taken from there.
    fn remember(&mut self, op: u8) -> Result<(), String> {
        let key = match op {
            b'p' | b'g' => self.line()?.parse().map_err(|_| "its pickle numbers a value wrongly")?,
            b'q' | b'h' => self.byte()?.into(),
            b'r' | b'j' => u32::from_le_bytes(self.array()?).into(),
            _ => self.memo.len() as u64,
        };
        if matches!(op, b'g' | b'h' | b'j') {
            let found = self.memo.get(&key).copied();
            return self.push_ref(found.ok_or("its pickle asks for a value that it never kept")?);
        }
        let top = self.top()?;
        self.spend(48)?;
        self.memo.insert(key, top);
        Ok(())
    }

    /// New lists, tuples, sets and dictionaries.
    fn container(&mut self, op: u8) -> Result<(), String> {
        let value = match op {
            b')' => Value::Tuple(Vec::new()),
            b']' | 0x8f => Value::List(Vec::new()),
            b'}' => Value::Dict(Vec::new()),
            b'l' | 0x91 => Value::List(self.pop_mark()?),
            b't' => Value::Tuple(self.pop_mark()?),
            b'd' => Value::Dict(pairs(self.pop_mark()?)?),
            _ => {
                let length = usize::from(op - 0x84);
                let mut items = (0..length).map(|_| self.pop()).collect::<Result<Vec<Ref>, String>>()?;
                items.reverse();
                Value::Tuple(items)
            }
        };
        self.push(value)
    }

    /// More items or entries of what is there.
    fn fill(&mut self, op: u8) -> Result<(), String> {
        let items = match op {
            b'a' => vec![self.pop()?],
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_mark()?,
        };
        let target = self.top()? as usize;
        self.spend(2 * items.len() * size_of::<Ref>())?;
        if matches!(op, b's' | b'u') {
            let new = pairs(items)?;
            match &mut self.values[target] {
                Value::Dict(entries) => entries.extend(new),
                Value::Object(object) => object.entries.extend(new),
                _ => {}
            }
            return Ok(());
        }
        match &mut self.values[target] {
            Value::List(list) => list.extend(items),
            Value::Object(object) => object.items.extend(items),
            _ => {}
        }
        Ok(())
    }

    /// Classes, what is made of them, and what stands outside of the pickle.
    fn call(&mut self, op: u8) -> Result<(), String> {
        match op {
            b'c' | b'i' => {
                let class = Value::Class(Box::new((self.line()?, self.line()?)));
                if op == b'c' {
                    return self.push(class);
                }
                let (class, arguments) = (self.make(class)?, self.pop_mark()?);
                let arguments = self.make(Value::Tuple(arguments))?;
                self.called(class, arguments)
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let text = |at| if let Value::Text(text) = self.value(at) { text.to_string() } else { String::new() };
                let class = (text(module), text(name));
                self.push(Value::Class(Box::new(class)))
            }
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.called(callable, arguments)
            }
            0x92 => {
                let (named, arguments, callable) = (self.pop()?, self.pop()?, self.pop()?);
                let both = self.make(Value::Tuple(vec![arguments, named]))?;
                self.called(callable, both)
            }
            b'o' => {
                let mut items = self.pop_mark()?;
                if items.is_empty() {
                    return Err("its pickle makes an object of no class".into());
                }
                let callable = items.remove(0);
                let arguments = self.make(Value::Tuple(items))?;
                self.called(callable, arguments)
            }
            b'b' => {
                let (state, target) = (self.pop()?, self.top()?);
                if let Value::Object(object) = &mut self.values[target as usize] {
                    object.state = Some(state);
                }
                Ok(())
            }
            b'P' => {
                let name = self.line()?;
                let id = self.make(Value::Text(name.into()))?;
                self.outside(id)
            }
            _ => self.pop().and_then(|id| self.outside(id)),
        }
    }

    fn called(&mut self, callable: Ref, arguments: Ref) -> Result<(), String> {
        let made = rebuild::call(self, callable, arguments)?;
        self.push_ref(made)
    }

    fn outside(&mut self, id: Ref) -> Result<(), String> {
        let value = match self.ids {
            Ids::Unknown => Value::Other,
            Ids::Storages => rebuild::storage(self, id)?.map_or(Value::Other, |storage| Value::Storage(storage.into())),
            Ids::Tensors(table) => {
                let key = rebuild::key(self.value(id)).ok_or("its pickle refers to a tensor by no name")?;
                let tensor = table.get(&key).ok_or("its pickle refers to a tensor that is not in the file")?;
                Value::Tensor(tensor.clone())
            }
        };
        self.push(value)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(cut)?;
        Ok(bytes)
    }

    fn skip(&mut self, length: u64) -> Result<(), String> {
        let found = std::io::copy(&mut (&mut *self.input).take(length), &mut std::io::sink()).map_err(cut)?;
        if found == length { Ok(()) } else { Err(CUT.into()) }
    }

    /// A whole number of any length; only those of 64 bits mean anything here.
    fn long(&mut self, length: u64) -> Result<Value, String> {
        if length > 8 {
            return self.skip(length).map(|()| Value::Other);
        }
        let mut bytes = [0u8; 8];
        let length = length as usize;
        self.input.read_exact(&mut bytes[..length]).map_err(cut)?;
        if length > 0 && bytes[length - 1] & 0x80 != 0 {
            bytes[length..].fill(0xff);
        }
        Ok(Value::Int(i64::from_le_bytes(bytes)))
    }

    /// A text that may be a key; a longer one is passed over.
    fn text(&mut self, length: u64) -> Result<Value, String> {
        if length > self.size {
            return Err(format!("{CUT}: a text of {length} bytes is announced"));
        }
        if length > LONGEST_KEY as u64 {
            return self.skip(length).map(|()| Value::Other);
        }
        let mut bytes = vec![0; length as usize];
        self.input.read_exact(&mut bytes).map_err(cut)?;
        Ok(Value::Text(String::from_utf8_lossy(&bytes).into()))
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = Vec::new();
        (&mut *self.input).take(LONGEST_KEY as u64).read_until(b'\n', &mut line).map_err(cut)?;
        match line.pop() {
            Some(b'\n') => Ok(String::from_utf8_lossy(&line).trim_end_matches('\r').to_string()),
            _ => Err(CUT.into()),
        }
    }
}

const CUT: &str = "its pickle is cut short";

fn cut(error: std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => CUT.into(),
        _ => error.to_string(),
    }
}

fn pairs(items: Vec<Ref>) -> Result<Vec<(Ref, Ref)>, String> {
    match items.as_chunks::<2>() {
        (pairs, []) => Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect()),
        _ => Err("its pickle has a key without a value".into()),
    }
}

/// The texts of the oldest protocols, with what stands behind a backslash.
fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(next) = rest.next() {
        let escaped = if next == '\\' { rest.next() } else { None };
        let digits = match escaped {
            None => {
                out.push(next);
                continue;
            }
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(other) => {
                out.push(if other == 'n' { '\n' } else { other });
                continue;
            }
        };
        let code = u32::from_str_radix(&rest.by_ref().take(digits).collect::<String>(), 16);
        out.push(code.ok().and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER));
    }
    out
}
