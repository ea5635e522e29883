//! Key rules: how the tensors of an official checkpoint become ours, as data.
//!
//! A system's file in `checkpoints/` holds an ordered list of rules for each part. Each tensor passes all rules from the top;
//! each rule whose pattern is found in the tensor's name, as the rules above left it, is applied. Nothing is read while rules
//! are planned: values are changed when the module asks for them.

use super::axes::{Change, concatenated};
use super::tensors::{Source, Stored};
use super::weights::{Entry, Report, load_from, parameter_map};
use burn::module::Module;
use regex::Regex;
use serde::Deserialize;
use smalti_base::{Error, Result, config};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The rules files of the repository by system, as the build script found them.
const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/rules.rs"));

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    #[serde(rename = "source")]
    _source: String,
    parts: BTreeMap<String, RawRules>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRules {
    #[serde(default)]
    optional: Vec<String>,
    /// Optional floats that checkpoints lack, and what they are then.
    #[serde(default)]
    fill: BTreeMap<String, f32>,
    rules: Vec<RawRule>,
    /// From our names to the official ones.
    #[serde(default)]
    export: Vec<RawRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    find: String,
    when: Option<String>,
    unless: Option<String>,
    unless_model: Option<String>,
    rank: Option<usize>,
    rename: Option<String>,
    copies: Option<String>,
    #[serde(default)]
    drop: bool,
    permute: Option<Vec<usize>>,
    squeeze: Option<usize>,
    merge: Option<usize>,
    divide: Option<RawDivide>,
    insert: Option<usize>,
    axes: Option<usize>,
    join: Option<RawJoin>,
    reverse: Option<usize>,
    split: Option<RawSplit>,
    cut: Option<RawPlaces>,
    pad: Option<RawPlaces>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlaces {
    axis: usize,
    places: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSplit {
    axis: usize,
    into: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDivide {
    axis: usize,
    parts: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawJoin {
    axis: usize,
    order: Vec<String>,
}

/// The rules of one part of a system.
#[derive(Clone, Debug)]
pub struct Rules {
    place: String,
    optional: Vec<Regex>,
    fill: Vec<(Regex, f32)>,
    rules: Vec<Rule>,
    /// Numbers of the configuration that rules may ask for.
    numbers: BTreeMap<String, usize>,
}

#[derive(Clone, Debug)]
struct Rule {
    find: Regex,
    /// Only for sources with, or without, a tensor of such a name.
    when: Option<Regex>,
    unless: Option<Regex>,
    /// Only for models without a parameter of such a name.
    unless_model: Option<Regex>,
    /// Only for tensors with so many axes.
    rank: Option<usize>,
    rename: Option<String>,
    /// The number that says how many copies there are; in their names `#` is replaced by 0, 1, ...
    copies: Option<String>,
    drop: bool,
    changes: Vec<Change>,
    /// The group that captures a number to be counted from the other end: the largest such number becomes 0.
    reverse: Option<usize>,
    /// Axis and the replacements that name the equal pieces.
    split: Option<(usize, Vec<String>)>,
    /// Axis and the first group's texts in order: tensors that get one name are joined.
    join: Option<(usize, Vec<String>)>,
}

impl Rules {
    /// The rules that come with this build, for example `("vqgan", "tokenizer")`.
    ///
    /// # Errors
    /// [`Error::Unknown`] for another system or part.
    pub fn builtin(system: &str, part: &str) -> Result<Self> {
        let (text, place) = Self::file(system)?;
        Self::parse(text, &place, part)
    }

    /// The rules that turn our names into the official ones.
    ///
    /// # Errors
    /// [`Error::Unknown`] for another system or part; [`Error::Unsupported`] for one that can only be imported.
    pub fn export(system: &str, part: &str) -> Result<Self> {
        let (text, place) = Self::file(system)?;
        let raw = Self::part(text, &place, part)?;
        if raw.export.is_empty() {
            return Err(Error::unsupported(
                format!("export of a {part} in the layout of `{system}`"),
                "its weights can only be imported",
            ));
        }
        Self::build(&place, &raw, &raw.export)
    }

    fn file(system: &str) -> Result<(&'static str, String)> {
        let Some((_, text)) = FILES.iter().find(|(name, _)| *name == system) else {
            return Err(Error::unknown("checkpoint rules", "system", system, FILES.iter().map(|(name, _)| *name)));
        };
        Ok((text, format!("checkpoints/{system}.toml")))
    }

    /// Reads one part's rules from the text of a rule file; `place` names it in errors.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unknown`] if the text is not a rules file or has no such part.
    pub fn parse(text: &str, place: &str, part: &str) -> Result<Self> {
        let raw = Self::part(text, place, part)?;
        Self::build(place, &raw, &raw.rules)
    }

    fn part(text: &str, place: &str, part: &str) -> Result<RawRules> {
        let file: RuleFile = config::parse_toml(text, place, &[])?;
        let known: Vec<String> = file.parts.keys().cloned().collect();
        let found = file.parts.into_iter().find_map(|(name, raw)| (name == part).then_some(raw));
        found.ok_or_else(|| Error::unknown(place, "part", part, known))
    }

    fn build(place: &str, raw: &RawRules, rules: &[RawRule]) -> Result<Self> {
        let regex = |pattern: &String| Regex::new(pattern).map_err(|e| Error::invalid(place, e.to_string()));
        let maybe = |pattern: &Option<String>| pattern.as_ref().map(regex).transpose();
        let rules = rules.iter().map(|raw| {
            Ok(Rule {
                find: regex(&raw.find)?,
                when: maybe(&raw.when)?,
                unless: maybe(&raw.unless)?,
                unless_model: maybe(&raw.unless_model)?,
                rank: raw.rank,
                rename: raw.rename.clone(),
                copies: raw.copies.clone(),
                drop: raw.drop,
                changes: [
                    raw.permute.clone().map(Change::Permute),
                    raw.squeeze.map(Change::Squeeze),
                    raw.merge.map(Change::Merge),
                    raw.divide.as_ref().map(|divide| Change::Divide(divide.axis, divide.parts)),
                    raw.insert.map(Change::Insert),
                    raw.axes.map(Change::Axes),
                    raw.cut.as_ref().map(|cut| Change::Cut(cut.axis, cut.places)),
                    raw.pad.as_ref().map(|pad| Change::Pad(pad.axis, pad.places)),
                ]
                .into_iter()
                .flatten()
                .collect(),
                reverse: raw.reverse,
                split: raw.split.as_ref().map(|split| (split.axis, split.into.clone())),
                join: raw.join.as_ref().map(|join| (join.axis, join.order.clone())),
            })
        });
        Ok(Self {
            place: place.to_string(),
            optional: raw.optional.iter().chain(raw.fill.keys()).map(regex).collect::<Result<_>>()?,
            fill: raw.fill.iter().map(|(name, value)| Ok((regex(name)?, *value))).collect::<Result<_>>()?,
            rules: rules.collect::<Result<_>>()?,
            numbers: BTreeMap::new(),
        })
    }

    /// The same rules with numbers of the configuration that they may ask for.
    pub fn with_numbers(self, numbers: impl IntoIterator<Item = (&'static str, usize)>) -> Self {
        Self { numbers: numbers.into_iter().map(|(name, number)| (name.to_string(), number)).collect(), ..self }
    }

    /// Loads an official checkpoint into a module. Everything must fit: only tensors that a rule drops may be left over, and
    /// only parameters that the rules call optional may keep their values.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the tensors that are missing, unused or of another shape, with the nearest names.
    pub fn import<M: Module>(&self, module: M, source: &dyn Source) -> Result<(M, Report)> {
        let plan = self.plan_for(source, &parameter_map(&module))?;
        load_from(module, &plan, &|name| self.is_optional(name))
    }

    /// Whether a part has rules of this system.
    ///
    /// # Errors
    /// [`Error::Unknown`] for another system.
    pub fn has(system: &str, part: &str) -> Result<bool> {
        match Self::builtin(system, part) {
            Ok(_) => Ok(true),
            Err(Error::Unknown { kind, .. }) if kind == "part" => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether a module's parameter may be missing in a checkpoint.
    pub fn is_optional(&self, name: &str) -> bool {
        self.optional.iter().any(|pattern| pattern.is_match(name))
    }

    /// The value that a missing parameter gets instead of its initial ones.
    pub fn filled(&self, name: &str) -> Option<f32> {
        self.fill.iter().find(|(pattern, _)| pattern.is_match(name)).map(|(_, value)| *value)
    }

    /// Applies the rules to a source's names and shapes.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a rule does not suit a tensor's shape, or two tensors get one name.
    pub fn plan<'a>(&self, source: &'a dyn Source) -> Result<Plan<'a>> {
        self.plan_for(source, &BTreeMap::new())
    }

    /// [`Self::plan`] for a model with these parameters, on which some rules depend.
    ///
    /// # Errors
    /// As [`Self::plan`].
    pub fn plan_for<'a>(&self, source: &'a dyn Source, model: &BTreeMap<String, Entry>) -> Result<Plan<'a>> {
        let shapes = source.shapes();
        let active: Vec<&Rule> = self
            .rules
            .iter()
            .filter(|rule| {
                let found = |pattern: &Regex| shapes.keys().any(|name| pattern.is_match(name));
                let has = |pattern: &Regex| model.keys().any(|name| pattern.is_match(name));
                rule.when.as_ref().is_none_or(found)
                    && !rule.unless.as_ref().is_some_and(found)
                    && !rule.unless_model.as_ref().is_some_and(has)
            })
            .collect();
        let whole = |(name, shape): (&String, &Vec<usize>)| {
            Step { from: name.clone(), shape: shape.clone(), changes: Vec::new(), place: None }.named(name)
        };
        let mut pieces: Vec<(String, Step)> = shapes.iter().map(whole).collect();
        for rule in active {
            let last = pieces.iter().filter_map(|(name, _)| rule.number(name)).map(|(number, _)| number).max();
            let applied = pieces.into_iter().map(|piece| self.apply(rule, last, piece));
            pieces = applied.collect::<Result<Vec<_>>>()?.concat();
        }
        let mut plan = Plan { source, steps: BTreeMap::new(), dropped: Vec::new() };
        for (target, step) in pieces {
            plan.steps.entry(target).or_default().push(step);
        }
        for (target, steps) in &mut plan.steps {
            steps.sort_by_key(|step| step.place.map(|(_, index, _)| index));
            let whole = steps
                .iter()
                .enumerate()
                .all(|(i, step)| step.place.is_some_and(|(_, index, of)| index == i && of == steps.len()));
            let alone = steps.len() == 1 && steps[0].place.is_none();
            if !(alone || whole && joined(steps).is_some()) {
                let names: Vec<&str> = steps.iter().map(|step| step.from.as_str()).collect();
                let problem = format!("`{}` of {} become `{target}`", names.join("`, `"), source.place());
                return Err(Error::invalid(&self.place, problem));
            }
        }
        let used: BTreeSet<&String> = plan.steps.values().flatten().map(|step| &step.from).collect();
        plan.dropped = shapes.keys().filter(|name| !used.contains(name)).cloned().collect();
        Ok(plan)
    }

    /// One rule on one tensor: none, one or several come out. `last` is the largest number that the rule reverses.
    fn apply(
        &self,
        rule: &Rule,
        last: Option<usize>,
        (mut name, mut step): (String, Step),
    ) -> Result<Vec<(String, Step)>> {
        if !rule.find.is_match(&name) || rule.rank.is_some_and(|axes| axes != step.shape.len()) {
            return Ok(vec![(name, step)]);
        }
        if rule.drop {
            return Ok(Vec::new());
        }
        if rule.reverse.is_some() {
            let (Some((number, place)), Some(last)) = (rule.number(&name), last) else {
                return Err(self.unsuited(&name, rule, "there is no number to reverse"));
            };
            name.replace_range(place, &(last - number).to_string());
        }
        for change in &rule.changes {
            step.change(change.clone()).map_err(|problem| self.unsuited(&name, rule, &problem))?;
        }
        if let Some((axis, order)) = &rule.join {
            let group = rule.find.captures(&name).and_then(|groups| Some(groups.get(1)?.as_str().to_string()));
            let index = group.and_then(|group| order.iter().position(|text| *text == group));
            let index = index.ok_or_else(|| self.unsuited(&name, rule, "its first group is not in `order`"))?;
            step.place = Some((*axis, index, order.len()));
        }
        let Some((axis, names)) = &rule.split else {
            let name = match &rule.rename {
                Some(new) => rule.find.replace(&name, new.as_str()).into_owned(),
                None => name,
            };
            let Some(number) = &rule.copies else { return Ok(vec![(name, step)]) };
            let copies = self.numbers.get(number);
            let copies =
                copies.ok_or_else(|| self.unsuited(&name, rule, &format!("nobody said what `{number}` is")))?;
            return Ok((0..*copies).map(|i| (name.replace('#', &i.to_string()), step.clone())).collect());
        };
        let pieces = names.iter().enumerate().map(|(i, new)| {
            let mut piece = step.clone();
            let change = Change::Piece(*axis, i, names.len());
            piece.change(change).map_err(|problem| self.unsuited(&name, rule, &problem))?;
            Ok((rule.find.replace(&name, new.as_str()).into_owned(), piece))
        });
        pieces.collect()
    }

    fn unsuited(&self, name: &str, rule: &Rule, problem: &str) -> Error {
        Error::invalid(&self.place, format!("the rule `{}` does not suit tensor `{name}`: {problem}", rule.find))
    }
}

impl Rule {
    /// The number in a name that this rule reverses, and where it is.
    fn number(&self, name: &str) -> Option<(usize, Range<usize>)> {
        let group = self.find.captures(name)?.get(self.reverse?)?;
        Some((group.as_str().parse().ok()?, group.range()))
    }
}

/// A source seen through rules.
pub struct Plan<'a> {
    source: &'a dyn Source,
    /// One for each tensor, or several that are joined.
    steps: BTreeMap<String, Vec<Step>>,
    dropped: Vec<String>,
}

impl Plan<'_> {
    /// The tensors that the rules leave out.
    pub fn dropped(&self) -> &[String] {
        &self.dropped
    }

    /// The tensors of the source that one of ours is made of, in order; none if there is no such tensor.
    pub fn origins(&self, name: &str) -> Vec<&str> {
        self.steps.get(name).into_iter().flatten().map(|step| step.from.as_str()).collect()
    }
}

impl Source for Plan<'_> {
    fn place(&self) -> String {
        self.source.place()
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let shape = |steps: &Vec<Step>| joined(steps).unwrap_or_default();
        self.steps.iter().map(|(name, steps)| (name.clone(), shape(steps))).collect()
    }

    fn read(&self, name: &str) -> Result<Stored> {
        let Some(steps) = self.steps.get(name) else {
            return Err(Error::unknown(self.place(), "tensor", name, self.steps.keys()));
        };
        let read = |step: &Step| {
            let stored = self.source.read(&step.from)?;
            Ok(step.changes.iter().fold(stored, |stored, change| change.values(stored)))
        };
        let mut pieces: Vec<Stored> = steps.iter().map(read).collect::<Result<_>>()?;
        match (pieces.len(), steps.first().and_then(|step| step.place)) {
            (1, _) | (_, None) => Ok(pieces.swap_remove(0)),
            (_, Some((axis, ..))) => concatenated(&pieces, axis, joined(steps).unwrap_or_default())
                .ok_or_else(|| Error::invalid(self.place(), format!("the parts of `{name}` are of different kinds"))),
        }
    }
}

/// The shape of joined tensors; `None` if theirs do not suit each other.
fn joined(steps: &[Step]) -> Option<Vec<usize>> {
    let first = steps.first()?;
    let Some((axis, ..)) = first.place else { return Some(first.shape.clone()) };
    let mut shape = first.shape.clone();
    *shape.get_mut(axis)? = 0;
    for step in steps {
        shape[axis] += step.shape.get(axis)?;
        let other = |i: usize| i == axis || step.shape[i] == shape[i];
        if step.shape.len() != shape.len() || !(0..shape.len()).all(other) {
            return None;
        }
    }
    Some(shape)
}

/// Where a tensor comes from and what happens to it.
#[derive(Clone, Debug)]
struct Step {
    from: String,
    shape: Vec<usize>,
    changes: Vec<Change>,
    /// Along which axis it is joined with others, as which of how many.
    place: Option<(usize, usize, usize)>,
}

impl Step {
    fn named(self, name: &str) -> (String, Self) {
        (name.to_string(), self)
    }

    fn change(&mut self, change: Change) -> Result<(), String> {
        self.shape = change.shape(&self.shape)?;
        self.changes.push(change);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tensors::Values;
    use super::super::weights::Kind;
    use super::*;
    use burn::module::ParamId;

    fn source() -> BTreeMap<String, Stored> {
        let tensor = |shape: &[usize]| Stored {
            shape: shape.to_vec(),
            values: Values::Floats((0..shape.iter().product::<usize>()).map(|i| i as f32).collect()),
        };
        BTreeMap::from([
            ("net.qkv.weight".to_string(), tensor(&[6, 2])),
            ("net.norm.weight".to_string(), tensor(&[2])),
            ("loss.x".to_string(), tensor(&[1])),
            ("heads/kernel".to_string(), tensor(&[2, 3, 4])),
            ("one".to_string(), tensor(&[1, 5])),
            ("up.0.w".to_string(), tensor(&[1])),
            ("up.2.w".to_string(), tensor(&[3, 1])),
            ("up.1.w".to_string(), tensor(&[2])),
        ])
    }

    const TEXT: &str = r#"
        source = "a test"
        [[parts.net.rules]]
        find = '^loss\.'
        drop = true
        [[parts.net.rules]]
        find = 'qkv\.weight$'
        split = { axis = 0, into = ["q.weight", "k.weight", "v.weight"] }
        [[parts.net.rules]]
        find = '\.([qkv])\.weight$'
        rename = '.$1.w'
        permute = [1, 0]
        [[parts.net.rules]]
        find = 'norm\.weight$'
        rename = 'norm.gamma'
        [[parts.net.rules]]
        find = 'norm'
        rank = 2
        drop = true
        [[parts.net.rules]]
        find = '^heads/kernel$'
        merge = 1
        [[parts.net.rules]]
        find = '^one$'
        squeeze = 0
        [[parts.net.rules]]
        find = 'one'
        unless = 'qkv'
        drop = true
        [[parts.net.rules]]
        find = '^up\.'
        rename = 'down.'
        [[parts.net.rules]]
        find = '^down\.(\d+)\.'
        reverse = 1
        rename = 'level.$1.'
        axes = 3
    "#;

    #[test]
    fn rules_rename_and_reshape_in_order() {
        let source = source();
        let plan = Rules::parse(TEXT, "t.toml", "net").unwrap().plan(&source).unwrap();
        assert_eq!(plan.dropped(), ["loss.x"]);
        let names: Vec<String> = plan.shapes().into_keys().collect();
        let levels = ["level.0.w", "level.1.w", "level.2.w"];
        let others = ["net.k.w", "net.norm.gamma", "net.q.w", "net.v.w", "one"];
        assert_eq!(names, ["heads/kernel"].iter().chain(&levels).chain(&others).copied().collect::<Vec<_>>());
        assert_eq!(levels.map(|name| plan.read(name).unwrap().shape), [vec![3, 1, 1], vec![2, 1, 1], vec![1, 1, 1]]);
        let k = plan.read("net.k.w").unwrap();
        assert_eq!((k.shape.as_slice(), k.floats().unwrap()), (&[2, 2][..], &[4.0, 6.0, 5.0, 7.0][..]));
        assert_eq!(plan.read("heads/kernel").unwrap().shape, [2, 12]);
        assert_eq!(plan.read("one").unwrap().shape, [5]);
    }

    #[test]
    fn rules_that_do_not_suit_are_errors() {
        let source = source();
        let rule = |text: &str| {
            let text = format!("source = \"t\"\n[[parts.net.rules]]\n{text}");
            Rules::parse(&text, "t.toml", "net")
                .and_then(|rules| rules.plan(&source).map(|_| ()))
                .unwrap_err()
                .to_string()
        };
        assert!(rule("find = 'norm'\npermute = [1, 0]").contains("does not suit tensor `net.norm.weight`"));
        assert!(rule("find = 'norm'\ncut = { axis = 0, places = 3 }").contains("no 3 places to take away"));
        assert!(rule("find = 'norm'\ncopies = 'depth'").contains("nobody said what `depth` is"));
        assert!(rule("find = 'norm'\nmerge = 0").contains("no axes 0 and 1"));
        assert!(rule("find = '^one'\naxes = 1").contains("more than 1 axes"));
        assert!(rule("find = '^(o)ne'\nreverse = 1").contains("no number to reverse"));
        assert!(rule("find = '^one'\nsqueeze = 1").contains("not of length 1"));
        assert!(rule("find = '.*'\nrename = 'x'").contains("become `x`"));
        assert!(rule("find = '('").contains("regex"));
        assert!(rule("find = 'x'\nrenam = 'y'").contains("did you mean `rename`"));
        assert!(Rules::parse(TEXT, "t.toml", "nte").unwrap_err().to_string().contains("did you mean `net`"));
    }

    #[test]
    fn copies_and_padding_come_and_go() {
        let text = r#"
            source = "a test"
            [[parts.out.rules]]
            find = '^one$'
            rename = 'book.#.weight'
            copies = 'depth'
            pad = { axis = 1, places = 1 }
            [[parts.in.rules]]
            find = '^book\.[1-9]'
            unless_model = '^books\.1$'
            drop = true
            [[parts.in.rules]]
            find = '^book\.(\d)\.weight$'
            rename = 'books.$1'
            cut = { axis = 1, places = 1 }
        "#;
        let source = source();
        let rules = Rules::parse(text, "t.toml", "out").unwrap().with_numbers([("depth", 3)]);
        let plan = rules.plan(&source).unwrap();
        let written: BTreeMap<String, Stored> = plan
            .shapes()
            .into_keys()
            .filter(|name| name.starts_with("book"))
            .map(|name| (name.clone(), plan.read(&name).unwrap()))
            .collect();
        assert_eq!(written.keys().collect::<Vec<_>>(), ["book.0.weight", "book.1.weight", "book.2.weight"]);
        assert_eq!(written["book.2.weight"].floats().unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 0.0]);
        let rules = Rules::parse(text, "t.toml", "in").unwrap();
        let plan = rules.plan(&written).unwrap();
        assert_eq!(plan.shapes(), BTreeMap::from([("books.0".to_string(), vec![1, 5])]));
        assert_eq!(plan.read("books.0").unwrap().floats(), source["one"].floats());
        let entry = |name: &str| (name.to_string(), Entry { shape: vec![], kind: Kind::Float, id: ParamId::new() });
        let model = BTreeMap::from(["books.0", "books.1", "books.2"].map(entry));
        assert_eq!(rules.plan_for(&written, &model).unwrap().shapes().len(), 3);
    }

    #[test]
    fn every_rule_file_of_this_build_parses() {
        for (system, text) in FILES {
            let file: RuleFile = config::parse_toml(text, system, &[]).unwrap();
            for part in file.parts.keys() {
                Rules::builtin(system, part).unwrap();
            }
        }
    }
}
