//! The few calls of a pickle that mean something here: those that make tensors, and those that make containers.
//!
//! Any other call becomes an object with its arguments, items, entries and attributes, in which tensors are found like anywhere else.

use super::pickle::{Machine, Object, Ref, Value};
use super::tensor::{Element, Storage, Tensor};

/// How deep tensors may stand inside of the calls that wrap them.
const WRAPS: usize = 8;

/// What a call makes.
///
/// # Errors
/// If it makes a tensor that cannot be.
pub(super) fn call(machine: &mut Machine<'_>, callable: Ref, arguments: Ref) -> Result<Ref, String> {
    let (mut callable, mut arguments) = (callable, arguments);
    for _ in 0..WRAPS {
        let Value::Class(class) = machine.value(callable) else { break };
        let given: &[Ref] = if let Value::Tuple(given) = machine.value(arguments) { given } else { &[] };
        match ((class.0.as_str(), class.1.as_str()), given) {
            (("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2"), [storage, offset, shape, stride, ..]) => {
                let fields = [*storage, *offset, *shape, *stride];
                return rebuilt(machine, fields, None);
            }
            (("torch._utils", "_rebuild_tensor_v3"), [storage, offset, shape, stride, _, _, dtype, ..]) => {
                let fields = [*storage, *offset, *shape, *stride];
                return rebuilt(machine, fields, Some(*dtype));
            }
            (("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"), [data, ..]) => return Ok(*data),
            (("torch._tensor", "_rebuild_from_type_v2"), [function, _, inner, ..]) => {
                (callable, arguments) = (*function, *inner);
            }
            (("builtins" | "__builtin__", "set" | "frozenset" | "list" | "tuple"), [items]) => {
                return match machine.value(*items) {
                    Value::List(_) | Value::Tuple(_) => Ok(*items),
                    _ => object(machine, callable, arguments, Vec::new()),
                };
            }
            (("collections", "OrderedDict") | ("builtins" | "__builtin__", "dict"), [items]) => {
                let entries = entries(machine, *items);
                return object(machine, callable, arguments, entries);
            }
            _ => break,
        }
    }
    object(machine, callable, arguments, Vec::new())
}

fn object(machine: &mut Machine<'_>, callable: Ref, arguments: Ref, entries: Vec<(Ref, Ref)>) -> Result<Ref, String> {
    // What is already seen as entries is not looked at twice.
    let arguments = if entries.is_empty() { arguments } else { callable };
    let object = Object { callable, arguments, items: Vec::new(), entries, state: None };
    machine.make(Value::Object(object.into()))
}

/// The entries of a list of pairs; none if it is something else.
fn entries(machine: &Machine<'_>, items: Ref) -> Vec<(Ref, Ref)> {
    let (Value::List(items) | Value::Tuple(items)) = machine.value(items) else { return Vec::new() };
    let pair = |item: &Ref| match machine.value(*item) {
        Value::List(pair) | Value::Tuple(pair) => pair.first().copied().zip(pair.get(1).copied()),
        _ => None,
    };
    items.iter().filter_map(pair).collect()
}

fn rebuilt(machine: &mut Machine<'_>, fields: [Ref; 4], dtype: Option<Ref>) -> Result<Ref, String> {
    let [storage, offset, shape, stride] = fields.map(|field| machine.value(field));
    let Value::Storage(storage) = storage else { return Err("its pickle makes a tensor of no storage".into()) };
    let wrong = || String::from("its pickle makes a tensor of a shape that is no list of sizes");
    let offset = size(offset).ok_or_else(wrong)?;
    let [shape, stride] = [shape, stride].map(|value| sizes(machine, value));
    let element = match dtype.map(|dtype| machine.value(dtype)) {
        None => storage.element.clone(),
        Some(Value::Class(class)) => {
            Element::named(&class.1).ok_or_else(|| format!("its elements are of type {}", shown(&class.1)))?
        }
        Some(_) => return Err("its pickle makes a tensor of a type without a name".into()),
    };
    let tensor = Tensor::new(storage, element, offset, shape.ok_or_else(wrong)?, stride.ok_or_else(wrong)?)?;
    machine.make(Value::Tensor(tensor.into()))
}

/// The storage that a persistent id describes: `("storage", class, key, place, elements)` and perhaps a part `(key, first, elements)`.
/// `None` for an id of another kind.
///
/// # Errors
/// If the storage cannot be.
pub(super) fn storage(machine: &Machine<'_>, id: Ref) -> Result<Option<Storage>, String> {
    let Value::Tuple(fields) = machine.value(id) else { return Ok(None) };
    let [tag, class, name, _, elements, part @ ..] = fields.as_slice() else { return Ok(None) };
    if !matches!(machine.value(*tag), Value::Text(text) if **text == *"storage") {
        return Ok(None);
    }
    let class = match machine.value(*class) {
        Value::Class(class) => class.1.clone(),
        Value::Text(text) => text.to_string(),
        _ => return Err("its pickle has a storage of no type".into()),
    };
    let element = Element::named(&class).ok_or_else(|| format!("a storage's type {} is not known", shown(&class)))?;
    let key = key(machine.value(*name)).ok_or("its pickle has a storage without a name")?;
    let elements = size(machine.value(*elements)).filter(|n| n.checked_mul(16).is_some());
    let elements = elements.ok_or_else(|| format!("its storage {} has no number of elements", shown(&key)))?;
    let part = match part.first().map(|part| machine.value(*part)) {
        Some(Value::Tuple(part)) if part.len() == 3 => {
            let [first, length] = [part[1], part[2]].map(|number| size(machine.value(number)));
            let end = first.zip(length).and_then(|(first, length)| first.checked_add(length));
            let part = first.zip(end.filter(|end| *end <= elements));
            part.ok_or_else(|| format!("a part of the storage {} lies outside of it", shown(&key)))?
        }
        _ => (0, elements),
    };
    Ok(Some(Storage { key, element, elements, part }))
}

/// The name of a storage or tensor: a text or a number.
pub(super) fn key(value: &Value) -> Option<String> {
    match value {
        Value::Text(text) => Some(text.to_string()),
        Value::Int(number) => Some(number.to_string()),
        _ => None,
    }
}

pub(super) fn size(value: &Value) -> Option<usize> {
    if let Value::Int(number) = value { usize::try_from(*number).ok() } else { None }
}

/// Most axes of a tensor.
const AXES: usize = 64;

fn sizes(machine: &Machine<'_>, value: &Value) -> Option<Vec<usize>> {
    let items = match value {
        Value::Tuple(items) | Value::List(items) => items,
        // `torch.Size` is called with a tuple.
        Value::Object(object) => match machine.value(object.arguments) {
            Value::Tuple(one) if one.len() == 1 => match machine.value(one[0]) {
                Value::Tuple(items) | Value::List(items) => items,
                _ => return None,
            },
            _ => return None,
        },
        _ => return None,
    };
    if items.len() > AXES {
        return None;
    }
    items.iter().map(|item| size(machine.value(*item))).collect()
}

/// A name as it may stand in a message: not all of a very long one.
pub(super) fn shown(name: &str) -> String {
    const MOST: usize = 100;
    match name.char_indices().nth(MOST) {
        Some((cut, _)) => format!("`{}...`", &name[..cut]),
        None => format!("`{name}`"),
    }
}
