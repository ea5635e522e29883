//! The oldest form of `torch.save`: a tar with tables of storages and tensors.

use super::container::{Counted, Shared, Storages, must_be_little};
use super::pickle::{Ids, Value, Values, read};
use super::rebuild::{key, shown, size};
use super::tensor::{Element, Storage, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// The first form: a tar of the storages, the tensors and a pickle.
/// # Errors
/// What is wrong with it.
pub(super) fn tarred(file: Shared) -> Result<(Values, Storages), String> {
    let mut parts: HashMap<String, (u64, u64)> = HashMap::new();
    let failed = |error: std::io::Error| format!("its tar cannot be read: {error}");
    let mut archive = tar::Archive::new(file.clone());
    for found in archive.entries_with_seek().map_err(failed)? {
        let found = found.map_err(failed)?;
        let name = found.path().map_err(failed)?.to_string_lossy().trim_start_matches("./").to_string();
        if !["sys_info", "storages", "tensors", "pickle"].contains(&name.as_str()) {
            continue;
        }
        let (at, length) = (found.raw_file_position(), found.size());
        let end = at.checked_add(length).filter(|end| *end <= file.length);
        if !found.header().entry_type().is_file() || end.is_none() {
            return Err(format!("its entry `{name}` is no plain file of bytes that are there"));
        }
        parts.insert(name, (at, length));
    }
    let part = |name: &str| {
        let found = parts.get(name).copied();
        found.ok_or_else(|| format!("it is a tar without `{name}`, so not one of torch.save, or cut short"))
    };
    if let Ok((at, length)) = part("sys_info") {
        must_be_little(&read(&mut file.section(at, length), length, &Ids::Unknown)?)?;
    }
    let (places, kinds) = tar_storages(&file, part("storages")?)?;
    let tensors = tar_tensors(&file, part("tensors")?, &kinds)?;
    let (at, length) = part("pickle")?;
    let values = read(&mut file.section(at, length), length, &Ids::Tensors(&tensors))?;
    Ok((values, Storages::Places { file, places }))
}

/// A reader of tables of pickles and numbers.
struct Table<'a> {
    file: &'a Shared,
    at: u64,
    end: u64,
}

impl Table<'_> {
    fn pickle(&mut self) -> Result<Values, String> {
        let mut reader = self.file.section(self.at, self.end - self.at);
        read(&mut Counted { inner: &mut reader, read: &mut self.at }, self.end, &Ids::Unknown)
    }

    fn count(&mut self) -> Result<usize, String> {
        let count = size(self.pickle()?.root());
        count.filter(|count| *count as u64 <= self.end).ok_or_else(|| "a table in its tar has no length".into())
    }

    /// A tuple's fields.
    fn fields(&mut self, least: usize) -> Result<Vec<Value>, String> {
        let values = self.pickle()?;
        match values.root() {
            Value::Tuple(fields) if fields.len() >= least => {
                Ok(fields.iter().map(|field| values.all[*field as usize].clone()).collect())
            }
            _ => Err("a table in its tar has a row without fields".into()),
        }
    }

    fn number(&mut self) -> Result<usize, String> {
        let bytes = self.file.piece(self.at, 8)?;
        self.at += 8;
        let number = bytes.try_into().ok().map(i64::from_le_bytes).and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| "a table in its tar has a negative size".into())
    }
}

type Places = HashMap<String, (u64, usize)>;
type Kinds = HashMap<String, (Element, usize)>;

/// A count; for each storage its name, place and class, its elements' number and bytes; then parts of storages.
fn tar_storages(file: &Shared, (at, length): (u64, u64)) -> Result<(Places, Kinds), String> {
    let mut table = Table { file, at, end: at + length };
    let (mut places, mut kinds) = (Places::new(), Kinds::new());
    const NAMELESS: &str = "a storage in its tar has no name";
    for _ in 0..table.count()? {
        let fields = table.fields(3)?;
        let name = key(&fields[0]).ok_or(NAMELESS)?;
        let class = if let Value::Class(class) = &fields[2] { class.1.as_str() } else { "" };
        let element = Element::named(class).ok_or_else(|| format!("its storage {} is of no type", shown(&name)))?;
        let elements = table.number()?;
        let bytes = elements.checked_mul(element.size);
        let end = bytes.and_then(|bytes| table.at.checked_add(bytes as u64)).filter(|end| *end <= table.end);
        let (Some(bytes), Some(end)) = (bytes, end) else {
            return Err(format!("it is cut short: its storage {} is not there", shown(&name)));
        };
        places.insert(name.clone(), (table.at, bytes));
        kinds.insert(name, (element, elements));
        table.at = end;
    }
    let views = table.pickle()?;
    let Value::List(rows) = views.root() else { return Err("its tar has no list of parts of storages".into()) };
    for row in rows {
        let Value::Tuple(fields) = &views.all[*row as usize] else {
            return Err("a part in its tar has no fields".into());
        };
        let field = |at: usize| fields.get(at).map(|field| &views.all[*field as usize]);
        let (name, root) = (field(0).and_then(key).ok_or(NAMELESS)?, field(1).and_then(key).ok_or(NAMELESS)?);
        let found = places.get(&root).copied().zip(kinds.get(&root).cloned());
        let numbers = field(2).and_then(size).zip(field(3).and_then(size));
        let (Some(((start, _), (element, all))), Some((first, elements))) = (found, numbers) else {
            return Err(format!("a part {} in its tar belongs to no storage", shown(&name)));
        };
        if first.checked_add(elements).is_none_or(|end| end > all) {
            return Err(format!("a part {} in its tar lies outside of its storage", shown(&name)));
        }
        places.insert(name.clone(), (start + (first * element.size) as u64, elements * element.size));
        kinds.insert(name, (element, elements));
    }
    Ok((places, kinds))
}

/// A count; for each tensor its name, its storage's and its class, the number of axes, sizes, strides and where it begins.
fn tar_tensors(file: &Shared, (at, length): (u64, u64), kinds: &Kinds) -> Result<HashMap<String, Arc<Tensor>>, String> {
    let mut table = Table { file, at, end: at + length };
    let mut tensors = HashMap::new();
    for _ in 0..table.count()? {
        let fields = table.fields(2)?;
        let (name, of) = key(&fields[0]).zip(key(&fields[1])).ok_or("a tensor in its tar has no name")?;
        // Four bytes, and four that mean nothing.
        let axes = file.piece(table.at, 4)?.try_into().map_or(u32::MAX, u32::from_le_bytes);
        table.at += 8;
        if axes > 64 {
            return Err(format!("its tensor {} has {axes} axes", shown(&name)));
        }
        let mut sizes = || (0..axes).map(|_| table.number()).collect::<Result<Vec<usize>, String>>();
        let (shape, stride) = (sizes()?, sizes()?);
        let offset = table.number()?;
        let (element, elements) =
            kinds.get(&of).ok_or_else(|| format!("its tensor {} has no storage", shown(&name)))?;
        let storage = Storage { key: of, element: element.clone(), elements: *elements, part: (0, *elements) };
        tensors.insert(name, Arc::new(Tensor::new(&storage, element.clone(), offset, shape, stride)?));
    }
    Ok(tensors)
}
