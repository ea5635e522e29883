//! The names of a pickle's tensors: the keys, indices and attributes that lead to them, joined by dots.

use super::pickle::{Object, Ref, Value, Values};
use super::rebuild::shown;
use super::tensor::Tensor;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Most tensors of a file, and the looks at values that finding them may take.
const MOST: usize = 1 << 20;
const LOOKS: usize = 1 << 26;
/// How many containers deep tensors may be.
const DEEPEST: usize = 256;

/// A tensor by its name.
#[derive(Clone, Debug)]
pub(super) struct Named {
    pub tensor: Arc<Tensor>,
    /// Whether another tensor has the same name.
    pub twice: bool,
}

/// All tensors that can be reached from the pickle's root.
///
/// # Errors
/// If they are too many, or too deep inside.
pub(super) fn named(values: &Values) -> Result<BTreeMap<String, Named>, String> {
    let mut walk = Walk {
        all: &values.all,
        holds: holds_tensors(values),
        inside: HashSet::new(),
        found: BTreeMap::new(),
        steps: 0,
        looks: 0,
    };
    walk.enter(values.root, "")?;
    Ok(walk.found)
}

/// Whether each value is a tensor or leads to one.
fn holds_tensors(values: &Values) -> Vec<bool> {
    // Which values hold each value, as places in one list.
    let mut starts = vec![0u32; values.all.len() + 1];
    let each_edge = |visit: &mut dyn FnMut(usize, Ref)| {
        for (at, value) in values.all.iter().enumerate() {
            children(value, &mut |child| visit(at, child));
        }
    };
    each_edge(&mut |_, child| starts[child as usize + 1] += 1);
    for at in 1..starts.len() {
        starts[at] += starts[at - 1];
    }
    let mut holders = vec![0u32; starts.last().copied().unwrap_or_default() as usize];
    let mut next = starts.clone();
    each_edge(&mut |holder, child| {
        holders[next[child as usize] as usize] = holder as u32;
        next[child as usize] += 1;
    });
    let mut holds: Vec<bool> = values.all.iter().map(|value| matches!(value, Value::Tensor(_))).collect();
    let mut open: Vec<usize> = (0..holds.len()).filter(|at| holds[*at]).collect();
    while let Some(at) = open.pop() {
        for holder in &holders[starts[at] as usize..starts[at + 1] as usize] {
            let holder = *holder as usize;
            if !std::mem::replace(&mut holds[holder], true) {
                open.push(holder);
            }
        }
    }
    holds
}

fn children(value: &Value, visit: &mut dyn FnMut(Ref)) {
    match value {
        Value::List(items) | Value::Tuple(items) => items.iter().for_each(|item| visit(*item)),
        Value::Dict(entries) => entries.iter().for_each(|(_, value)| visit(*value)),
        Value::Object(object) => {
            object.items.iter().for_each(|item| visit(*item));
            object.entries.iter().for_each(|(_, value)| visit(*value));
            object.state.iter().for_each(|state| visit(*state));
            visit(object.arguments);
        }
        _ => {}
    }
}

struct Walk<'a> {
    all: &'a [Value],
    holds: Vec<bool>,
    /// The values on the way from the root: one inside of itself is not entered again.
    inside: HashSet<Ref>,
    found: BTreeMap<String, Named>,
    steps: usize,
    looks: usize,
}

impl<'a> Walk<'a> {
    fn value(&self, at: Ref) -> &'a Value {
        &self.all[at as usize]
    }

    fn enter(&mut self, at: Ref, name: &str) -> Result<(), String> {
        if !self.holds[at as usize] || self.inside.contains(&at) {
            return Ok(());
        }
        self.steps += 1 + name.len() / 64;
        if self.steps > MOST {
            return Err(format!("holds more than {MOST} tensors"));
        }
        if self.inside.len() == DEEPEST {
            return Err(format!("holds tensors more than {DEEPEST} containers deep, below {}", shown(name)));
        }
        self.inside.insert(at);
        match self.value(at) {
            Value::Tensor(tensor) => self.add(name, tensor),
            Value::List(items) | Value::Tuple(items) => self.items(items, name)?,
            Value::Dict(entries) => self.entries(entries, name, &|_| true)?,
            Value::Object(object) => self.object(object, name)?,
            _ => {}
        }
        self.inside.remove(&at);
        Ok(())
    }

    fn add(&mut self, name: &str, tensor: &Arc<Tensor>) {
        let name = if name.is_empty() { "tensor" } else { name };
        match self.found.get_mut(name) {
            Some(there) => there.twice |= there.tensor != *tensor,
            None => drop(self.found.insert(name.into(), Named { tensor: tensor.clone(), twice: false })),
        }
    }

    /// # Errors
    /// If the same values are met again and again.
    fn look(&mut self, values: usize) -> Result<(), String> {
        self.looks += values;
        if self.looks > LOOKS { Err("holds the same values under too many names".into()) } else { Ok(()) }
    }

    fn items(&mut self, items: &[Ref], name: &str) -> Result<(), String> {
        self.look(items.len())?;
        for (at, item) in items.iter().enumerate() {
            if self.holds[*item as usize] {
                self.enter(*item, &below(name, &at.to_string()))?;
            }
        }
        Ok(())
    }

    /// The entries whose key is wanted. Of equal keys the last one counts.
    fn entries(&mut self, entries: &[(Ref, Ref)], name: &str, wanted: &dyn Fn(&str) -> bool) -> Result<(), String> {
        self.look(entries.len())?;
        let mut last = HashMap::new();
        for (at, (key, _)) in entries.iter().enumerate() {
            last.insert((std::mem::discriminant(self.value(*key)), key_text(self.all, *key, 0)), at);
        }
        for (at, (key, value)) in entries.iter().enumerate() {
            if !self.holds[*value as usize] {
                continue;
            }
            let text = key_text(self.all, *key, 0);
            let counts = last.get(&(std::mem::discriminant(self.value(*key)), text.clone())) == Some(&at);
            if counts && wanted(&text) {
                self.enter(*value, &below(name, &text))?;
            }
        }
        Ok(())
    }

    fn object(&mut self, object: &Object, name: &str) -> Result<(), String> {
        if let Some(Value::Dict(attributes)) = object.state.map(|state| self.value(state))
            && let Some(tables) = self.module(attributes)?
        {
            return self.tables(tables, attributes, name);
        }
        self.entries(&object.entries, name, &|_| true)?;
        self.items(&object.items, name)?;
        match object.state.map(|state| self.value(state)) {
            // Attributes, and those that have slots.
            Some(Value::Tuple(both)) if both.len() == 2 => {
                both.iter().try_for_each(|attributes| self.enter(*attributes, name))?;
            }
            Some(_) => object.state.iter().try_for_each(|state| self.enter(*state, name))?,
            None => {}
        }
        match self.value(object.arguments) {
            Value::Tuple(_) => self.enter(object.arguments, &below(name, "arguments")),
            _ => Ok(()),
        }
    }

    /// The parameters, buffers and parts of a whole `torch.nn.Module`.
    fn module(&mut self, attributes: &[(Ref, Ref)]) -> Result<Option<[Ref; 3]>, String> {
        self.look(3 * attributes.len())?;
        let table = |name: &str| {
            let found = attributes.iter().rev().find(|(key, _)| key_text(self.all, *key, 0) == name)?;
            matches!(self.value(found.1), Value::Dict(_) | Value::Object(_)).then_some(found.1)
        };
        let tables = [table("_parameters"), table("_buffers"), table("_modules")];
        Ok(if let [Some(parameters), Some(buffers), Some(parts)] = tables {
            Some([parameters, buffers, parts])
        } else {
            None
        })
    }

    /// As its `state_dict()` has them: without buffers that are not to be saved.
    fn tables(&mut self, tables: [Ref; 3], attributes: &[(Ref, Ref)], name: &str) -> Result<(), String> {
        let mut passing = HashSet::new();
        for (key, value) in attributes {
            if let Value::List(items) = self.value(*value)
                && key_text(self.all, *key, 0) == "_non_persistent_buffers_set"
            {
                self.look(items.len())?;
                passing.extend(items.iter().map(|item| key_text(self.all, *item, 0)));
            }
        }
        for (number, table) in tables.into_iter().enumerate() {
            if let Value::Dict(entries) = self.value(table) {
                self.entries(entries, name, &|key| number != 1 || !passing.contains(&Cow::Borrowed(key)))?;
            } else if let Value::Object(object) = self.value(table) {
                self.entries(&object.entries, name, &|key| number != 1 || !passing.contains(&Cow::Borrowed(key)))?;
            }
        }
        Ok(())
    }
}

/// Most characters of a key that is no text.
const LONGEST: usize = 256;

/// A key as a part of a name.
fn key_text(all: &[Value], at: Ref, depth: usize) -> Cow<'_, str> {
    let part = |at: Ref| key_text(all, at, depth + 1).chars().take(LONGEST).collect::<String>();
    Cow::Owned(match &all[at as usize] {
        Value::Text(text) => return Cow::Borrowed(text),
        Value::Int(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::None => "None".into(),
        Value::Class(class) => [&class.0, ".", &class.1].concat().chars().take(LONGEST).collect(),
        Value::Tuple(items) if depth < 2 => {
            format!("({})", items.iter().take(8).map(|item| part(*item)).collect::<Vec<_>>().join(","))
        }
        Value::Object(object) if depth < 2 => part(object.callable) + &part(object.arguments),
        _ => format!("<{at}>"),
    })
}

fn below(name: &str, key: &str) -> String {
    if name.is_empty() { key.to_string() } else { format!("{name}.{key}") }
}
