//! A module's parameters on disk, named by their paths in the module.
//!
//! A path is the field names joined by dots, with indices for lists; the variants of enums are left out. Float and integer
//! parameters, truth values and running statistics are all included, in the layout that the module has.

pub use super::tensors::Precision;
use super::tensors::{Source, Stored, Values, WeightsFile, write_tensors};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Bool, Int, Tensor, TensorData};
use smalti_base::{Error, Result, error::nearest};
use std::collections::BTreeMap;
use std::path::Path;

/// What a parameter holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Floats: weights, buffers, running statistics.
    Float,
    /// Integers.
    Int,
    /// Truth values.
    Bool,
}

/// A parameter of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Length of each axis.
    pub shape: Vec<usize>,
    /// What it holds.
    pub kind: Kind,
    /// The parameter's identity in this process.
    pub id: burn::module::ParamId,
}

/// The parameters of a module by path. Values are not touched: lazy parameters stay lazy.
pub fn parameter_map<M: Module>(module: &M) -> BTreeMap<String, Entry> {
    let mut walk = Listing::default();
    module.visit(&mut walk);
    walk.entries
}

/// Writes all parameters of a module to a safetensors file, whole or not at all.
///
/// # Errors
/// [`Error::Io`] if the file cannot be written, [`Error::Invalid`] if a tensor cannot be read from its device.
pub fn save_module<M: Module>(
    module: &M,
    path: &Path,
    precision: Precision,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut walk = Collecting::default();
    module.visit(&mut walk);
    match walk.failed {
        Some(error) => Err(error),
        None => write_tensors(path, &walk.tensors, precision, metadata),
    }
}

/// The parameters of these names, brought to the host.
///
/// # Errors
/// [`Error::Invalid`] if one cannot be read from its device.
pub fn parameters<M: Module>(module: &M, names: &[String]) -> Result<BTreeMap<String, Stored>> {
    let mut walk = Collecting { only: Some(names), ..Default::default() };
    module.visit(&mut walk);
    match walk.failed {
        Some(error) => Err(error),
        None => Ok(walk.tensors),
    }
}

/// Loads a file that [`save_module`] wrote into a module of the same shape, on the module's own device. Floats become `f32`.
///
/// # Errors
/// [`Error::Io`], or [`Error::Invalid`] that names the tensors that are missing, unused or of another shape; then nothing is loaded.
pub fn load_module<M: Module>(module: M, path: &Path) -> Result<M> {
    load_from(module, &WeightsFile::open(path)?, &|_| false).map(|(module, _)| module)
}

/// [`load_module`] without the parameters that `left_out` names: the file must have them, but they stay unread. They have no values
/// and take no memory until something asks for them, and then they are random.
///
/// # Errors
/// As [`load_module`].
pub fn load_without<M: Module>(module: M, path: &Path, left_out: &dyn Fn(&str) -> bool) -> Result<M> {
    load_without_from(module, &WeightsFile::open(path)?, left_out)
}

pub(super) fn load_without_from<M: Module>(
    module: M,
    source: &dyn Source,
    left_out: &dyn Fn(&str) -> bool,
) -> Result<M> {
    Report::compare(&parameter_map(&module), &source.shapes(), &|_| false).must_fit(&source.place())?;
    load_from(module, &Without { source, left_out }, left_out).map(|(module, _)| module)
}

/// A source without some of its tensors.
pub(super) struct Without<'a> {
    pub source: &'a dyn Source,
    /// Whether the tensor of this name is left out.
    pub left_out: &'a dyn Fn(&str) -> bool,
}

impl Source for Without<'_> {
    fn place(&self) -> String {
        self.source.place()
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let mut shapes = self.source.shapes();
        shapes.retain(|name, _| !(self.left_out)(name));
        shapes
    }

    fn read(&self, name: &str) -> Result<Stored> {
        self.source.read(name)
    }
}

/// What loading found, before anything is changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Parameters that were found.
    pub loaded: Vec<String>,
    /// Parameters that the source does not have, and that may not be left out.
    pub missing: Vec<String>,
    /// Parameters that the source does not have, and that keep their initial values.
    pub kept: Vec<String>,
    /// Tensors of the source that the module does not have.
    pub unused: Vec<String>,
    /// Tensors of another shape, with expected and found.
    pub misfits: Vec<String>,
}

impl Report {
    /// Compares a module's parameters with a source's tensors.
    pub fn compare(
        entries: &BTreeMap<String, Entry>,
        shapes: &BTreeMap<String, Vec<usize>>,
        optional: &dyn Fn(&str) -> bool,
    ) -> Self {
        let mut report = Self::default();
        for (name, entry) in entries {
            match shapes.get(name) {
                Some(found) if same_shape(&entry.shape, found) => report.loaded.push(name.clone()),
                Some(found) => {
                    let turned = found.iter().rev().eq(&entry.shape) && found.len() > 1;
                    let note = if turned { " (transposed?)" } else { "" };
                    report.misfits.push(format!("`{name}` is {found:?}, expected {:?}{note}", entry.shape));
                }
                None if optional(name) => report.kept.push(name.clone()),
                None => report.missing.push(name.clone()),
            }
        }
        report.unused = shapes.keys().filter(|name| !entries.contains_key(*name)).cloned().collect();
        report
    }

    /// How many parameters and tensors do not fit.
    pub fn problems(&self) -> usize {
        self.missing.len() + self.unused.len() + self.misfits.len()
    }

    /// An error that names what does not fit, with the nearest names, unless all fits.
    ///
    /// # Errors
    /// [`Error::Invalid`] about `place`.
    pub fn must_fit(&self, place: &str) -> Result<()> {
        const SHOWN: usize = 5;
        let mut problems = Vec::new();
        let mut list = |title: &str, names: &[String], line: &dyn Fn(&String) -> String| {
            if !names.is_empty() {
                let shown: Vec<String> = names.iter().take(SHOWN).map(line).collect();
                let more = names.len().saturating_sub(SHOWN);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                problems.push(format!("{} {title}: {}{more}", names.len(), shown.join(", ")));
            }
        };
        let near = |name: &String, others: &[String]| match nearest(name, others) {
            Some(near) => format!("`{name}` (nearest: `{near}`)"),
            None => format!("`{name}`"),
        };
        list("of another shape", &self.misfits, &String::clone);
        list("missing", &self.missing, &|name| near(name, &self.unused));
        list("not known to the model", &self.unused, &|name| near(name, &self.missing));
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::invalid(place, format!("the weights do not fit the model; {}", problems.join("; ")))),
        }
    }
}

/// Loads a module from any source; a parameter may be missing if `optional` says so of its path.
///
/// # Errors
/// As [`load_module`].
pub fn load_from<M: Module>(module: M, source: &dyn Source, optional: &dyn Fn(&str) -> bool) -> Result<(M, Report)> {
    let report = Report::compare(&parameter_map(&module), &source.shapes(), optional);
    report.must_fit(&source.place())?;
    let mut walk = Loading { path: ModulePath::default(), source, kept: &report.kept, failed: None };
    let module = module.map(&mut walk);
    match walk.failed {
        Some(error) => Err(error),
        None => Ok((module, report)),
    }
}

/// Burn has no tensors without axes: a single value has shape `[1]` there.
fn same_shape(expected: &[usize], found: &[usize]) -> bool {
    expected == found || (found.is_empty() && expected == [1])
}

/// The path of the parameter being visited.
#[derive(Default)]
struct ModulePath(Vec<String>);

impl ModulePath {
    fn enter(&mut self, name: &str, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.push(name.to_string());
        }
    }

    fn exit(&mut self, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.pop();
        }
    }

    fn name(&self) -> String {
        self.0.join(".")
    }
}

#[derive(Default)]
struct Listing {
    path: ModulePath,
    entries: BTreeMap<String, Entry>,
}

impl Listing {
    fn add(&mut self, shape: burn::tensor::Shape, kind: Kind, id: burn::module::ParamId) {
        self.entries.insert(self.path.name(), Entry { shape: shape.to_vec(), kind, id });
    }
}

impl ModuleVisitor for Listing {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.add(param.lazy_shape(), Kind::Float, param.id);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.add(param.lazy_shape(), Kind::Int, param.id);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.add(param.lazy_shape(), Kind::Bool, param.id);
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }
}

#[derive(Default)]
struct Collecting<'a> {
    path: ModulePath,
    /// The wanted names; all if there are none.
    only: Option<&'a [String]>,
    tensors: BTreeMap<String, Stored>,
    failed: Option<Error>,
}

impl Collecting<'_> {
    fn skips(&self) -> bool {
        self.only.is_some_and(|names| !names.contains(&self.path.name()))
    }

    fn add(&mut self, data: TensorData, values: impl Fn(TensorData) -> Option<Values>) {
        let (name, shape) = (self.path.name(), data.shape().to_vec());
        match values(data) {
            Some(values) => drop(self.tensors.insert(name, Stored { shape, values })),
            None => self.failed = Some(Error::invalid(name, "the device returned values of another type")),
        }
    }
}

impl ModuleVisitor for Collecting<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.skips() {
            return;
        }
        self.add(param.val().to_data(), |data| data.convert::<f32>().try_into_vec().ok().map(Values::Floats));
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        if self.skips() {
            return;
        }
        self.add(param.val().to_data(), |data| data.convert::<i64>().try_into_vec().ok().map(Values::Ints));
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        if self.skips() {
            return;
        }
        self.add(param.val().to_data(), |data| Some(Values::Bools(data.iter::<bool>().collect())));
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }
}

struct Loading<'a> {
    path: ModulePath,
    source: &'a dyn Source,
    kept: &'a [String],
    failed: Option<Error>,
}

impl Loading<'_> {
    /// The tensor for the parameter being mapped, unless it keeps its value or an earlier one failed.
    fn next(
        &mut self,
        shape: Vec<usize>,
        data: impl Fn(Values, Vec<usize>) -> Result<TensorData, String>,
    ) -> Option<TensorData> {
        let name = self.path.name();
        if self.failed.is_some() || self.kept.contains(&name) {
            return None;
        }
        let read = self.source.read(&name).and_then(|stored| {
            data(stored.values, shape)
                .map_err(|problem| Error::invalid(self.source.place(), format!("tensor `{name}` {problem}")))
        });
        read.map_err(|error| self.failed = Some(error)).ok()
    }
}

impl ModuleMapper for Loading<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let data = self.next(param.lazy_shape().to_vec(), |values, shape| match values {
            Values::Floats(v) => Ok(TensorData::new(v, shape)),
            other => Err(format!("holds {}, expected floats", other.kind())),
        });
        match data {
            Some(data) => {
                let (tensor, id) = (Tensor::from_data(data, &param.lazy_device()), param.id);
                param.transform_for_load(tensor, id)
            }
            None => param,
        }
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let data = self.next(param.lazy_shape().to_vec(), |values, shape| match values {
            Values::Ints(v) if v.iter().any(|x| i32::try_from(*x).is_err()) => {
                Err("holds an integer of more than 32 bits".into())
            }
            Values::Ints(v) => Ok(TensorData::new(v, shape)),
            other => Err(format!("holds {}, expected integers", other.kind())),
        });
        match data {
            Some(data) => {
                let (tensor, id) = (Tensor::from_data(data, &param.lazy_device()), param.id);
                param.transform_for_load(tensor, id)
            }
            None => param,
        }
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        let data = self.next(param.lazy_shape().to_vec(), |values, shape| match values {
            Values::Bools(v) => Ok(TensorData::new(v, shape)),
            other => Err(format!("holds {}, expected booleans", other.kind())),
        });
        match data {
            Some(data) => {
                let (tensor, id) = (Tensor::from_data(data, &param.lazy_device()), param.id);
                param.transform_for_load(tensor, id)
            }
            None => param,
        }
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }
}
