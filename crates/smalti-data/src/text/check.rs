//! A `tokenizer.json` before the `tokenizers` library sees it: what would make the library panic, or need any amount of memory, is refused.

use serde_json::Value;

/// Most bytes of a file; the largest in use have half of it.
pub(super) const MOST_BYTES: u64 = 64 << 20;
/// Most entries of all lists and objects.
const MOST_ENTRIES: usize = 8 << 20;
/// Most steps of a normalizer, pre-tokenizer or decoder.
const MOST_STEPS: usize = 64;
/// Most bytes of a text after normalizing.
const MOST_NORMALIZED: u64 = 16 << 20;
/// Most bytes of a text before.
pub(super) const MOST_TEXT: u64 = 1 << 20;
/// Longest entry of a vocabulary that is searched at each place of a text.
const LONGEST_PIECE: usize = 1024;

/// Checks the file's text. Returns how many bytes a text may have that is to be encoded.
///
/// # Errors
/// What is wrong.
pub(super) fn check(json: &str) -> Result<usize, String> {
    if json.len() as u64 > MOST_BYTES {
        return Err(format!("{} bytes; the largest there are have half of {MOST_BYTES}", json.len()));
    }
    let entries = json.bytes().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
    if entries > MOST_ENTRIES {
        return Err(format!("{entries} entries; expected at most {MOST_ENTRIES}"));
    }
    let file: Value = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let mut growth = Growth { unicode: 1, other: 1 };
    for part in ["normalizer", "pre_tokenizer", "decoder", "post_processor"] {
        let mut steps = 0;
        each_step(&file[part], &mut |step| {
            steps += 1;
            if steps > MOST_STEPS {
                return Err(format!("its {part} has more than {MOST_STEPS} steps"));
            }
            sound(step)?;
            if part == "normalizer" { growth.add(step) } else { Ok(()) }
        })?;
    }
    model(&file["model"])?;
    let growth = growth.unicode.saturating_mul(growth.other);
    let added = file["added_tokens"].as_array().map_or(0, |tokens| {
        tokens.iter().filter_map(|token| token["content"].as_str()).map(|content| content.len() as u64).sum()
    });
    let most = (MOST_NORMALIZED / growth.max(1)).min(MOST_TEXT);
    if most < 256 || added.saturating_mul(growth) > 4 * MOST_NORMALIZED {
        return Err(format!("its normalizer may make a text {growth} times as long"));
    }
    Ok(most as usize)
}

/// Calls `visit` with each step of a normalizer or the like, those of sequences included.
fn each_step(part: &Value, visit: &mut dyn FnMut(&Value) -> Result<(), String>) -> Result<(), String> {
    if part.is_null() {
        return Ok(());
    }
    visit(part)?;
    let lists =
        ["normalizers", "pretokenizers", "decoders", "processors"].into_iter().filter_map(|key| part[key].as_array());
    lists.flatten().try_for_each(|step| each_step(step, visit))
}

/// A step that the library can take.
fn sound(step: &Value) -> Result<(), String> {
    let pattern = &step["pattern"];
    if pattern["String"] == "" || pattern["Regex"] == "" {
        return Err(format!("its step {} has an empty pattern", step["type"]));
    }
    if step["length"] == 0 {
        return Err(format!("its step {} cuts pieces of no length", step["type"]));
    }
    // What a template names must be told, too: the library takes it for granted.
    for piece in ["single", "pair"].into_iter().filter_map(|template| step[template].as_array()).flatten() {
        if let Some(name) =
            piece["SpecialToken"]["id"].as_str().filter(|name| step["special_tokens"].get(*name).is_none())
        {
            return Err(format!("its template names the token `{}`, which is not in special_tokens", super::cut(name)));
        }
    }
    let Some(map) = step.get("precompiled_charsmap") else { return Ok(()) };
    let bytes = map.as_str().and_then(base64).ok_or("its table of characters is not base64")?;
    table(&bytes).ok_or_else(|| "its table of characters is damaged".into())
}

/// How many times longer texts may become.
struct Growth {
    /// By forms of Unicode, which do nothing when they are repeated.
    unicode: u64,
    other: u64,
}

impl Growth {
    fn add(&mut self, step: &Value) -> Result<(), String> {
        let length = |value: &Value| value.as_str().map_or(0, str::len) as u64;
        let times = match step["type"].as_str().unwrap_or_default() {
            "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "BertNormalizer" | "Bert" => {
                // The longest form is of U+FDFA: 18 characters of 3 bytes.
                self.unicode = 18;
                1
            }
            "ByteLevel" => 2,
            "Prepend" => 1 + length(&step["prepend"]),
            "Replace" => match length(&step["pattern"]["String"]) {
                // An expression may match nothing at each place.
                0 => 1 + length(&step["content"]),
                pattern => length(&step["content"]).div_ceil(pattern).max(1),
            },
            "Precompiled" => longest_entry(step),
            _ => 1,
        };
        self.other = self.other.saturating_mul(times);
        Ok(())
    }
}

/// A model whose search takes time in proportion to the text.
fn model(model: &Value) -> Result<(), String> {
    if model["max_input_chars_per_word"].as_u64().is_some_and(|most| most > LONGEST_PIECE as u64) {
        return Err(format!("its words may have more than {LONGEST_PIECE} characters"));
    }
    let pieces = model["vocab"].as_array().into_iter().flatten();
    match pieces.filter_map(|piece| piece[0].as_str()).any(|piece| piece.len() > LONGEST_PIECE) {
        true => Err(format!("its vocabulary has an entry of more than {LONGEST_PIECE} bytes")),
        false => Ok(()),
    }
}

fn longest_entry(step: &Value) -> u64 {
    let bytes = step["precompiled_charsmap"].as_str().and_then(base64).unwrap_or_default();
    let texts = bytes.get(4..).unwrap_or_default().get(number(&bytes, 0).unwrap_or_default()..).unwrap_or_default();
    texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or_default().max(1) as u64
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
}

/// SentencePiece's table: the length of a double array, its units, and texts with zeros between them. `None` unless every way through the
/// array stays inside of it, and every leaf is the place of a text.
fn table(bytes: &[u8]) -> Option<()> {
    let length = number(bytes, 0)?;
    let units = bytes.get(4..)?.get(..length)?;
    let texts = std::str::from_utf8(&bytes[4 + length..]).ok()?;
    let unit = |at: usize| number(units, 4 * at);
    let count = length / 4;
    let offset = |unit: usize| (unit >> 10) << ((unit & (1 << 9)) >> 6);
    let mut seen = vec![false; count];
    let mut open = vec![offset(unit(0)?)];
    while let Some(base) = open.pop() {
        // Any byte may follow.
        if base | 0xff >= count {
            return None;
        }
        for byte in 1..=255 {
            let (at, next) = (base ^ byte, unit(base ^ byte)?);
            if next & ((1 << 31) | 0xff) != byte || std::mem::replace(&mut seen[at], true) {
                continue;
            }
            let inside = at ^ offset(next);
            if next >> 8 & 1 == 1 {
                let text = unit(inside)? & ((1 << 31) - 1);
                if !texts.is_char_boundary(text) {
                    return None;
                }
            }
            open.push(inside);
        }
    }
    Some(())
}

fn base64(text: &str) -> Option<Vec<u8>> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 3);
    for group in digits.chunks(4) {
        let mut bits = 0u32;
        for byte in group {
            bits = bits << 6 | u32::from(value(*byte)?);
        }
        bits <<= 6 * (4 - group.len());
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_may_be_as_long_as_they_can_grow() {
        let most = |normalizer: &str| check(&format!(r#"{{"normalizer": {normalizer}, "model": {{}}}}"#));
        let replace = r#"{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}"#;
        let chain =
            |steps: usize| format!(r#"{{"type": "Sequence", "normalizers": [{}]}}"#, vec![replace; steps].join(","));
        assert_eq!(most("null").unwrap(), 1 << 20);
        assert_eq!(most(&chain(1)).unwrap(), 1 << 20);
        assert_eq!(most(&chain(3)).unwrap(), (16 << 20) / 512);
        assert!(most(&chain(9)).unwrap_err().contains("times as long"));
        assert!(
            most(r#"{"type": "Replace", "pattern": {"String": ""}, "content": "x"}"#)
                .unwrap_err()
                .contains("empty pattern")
        );
        for junk in ["", "AAAA", "BAAAAAAAAAA=", "/////w=="] {
            let step = format!(r#"{{"type": "Precompiled", "precompiled_charsmap": "{junk}"}}"#);
            assert!(most(&step).unwrap_err().contains("table of characters"), "{junk}");
        }
        assert_eq!(base64("aGFsbG8="), Some(b"hallo".to_vec()));
        assert_eq!(base64("aGFsbG8h"), Some(b"hallo!".to_vec()));
    }

    #[test]
    fn templates_name_tokens_that_are_told() {
        let told = |tokens: &str| {
            let step = format!(
                r#"{{"type": "TemplateProcessing", "single": [{{"SpecialToken": {{"id": "[CLS]"}}}}], "special_tokens": {tokens}}}"#
            );
            sound(&serde_json::from_str(&step).unwrap())
        };
        assert!(told("{}").unwrap_err().contains("`[CLS]`"));
        assert!(told(r#"{"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}}"#).is_ok());
    }

    #[test]
    fn a_sound_table_passes() {
        // One entry, `a` becomes the text at 0: the root, `a`'s unit with a leaf, and the leaf.
        let mut units = vec![0u32; 512];
        units[0] = 256 << 10;
        units[256 ^ 97] = 97 | 1 << 8 | (97 << 10);
        units[256] = 0;
        let table_of = |units: &[u32], texts: &str| {
            let mut bytes = (4 * units.len() as u32).to_le_bytes().to_vec();
            bytes.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
            bytes.extend(texts.as_bytes());
            bytes
        };
        assert!(table(&table_of(&units, "b\0")).is_some());
        units[256] = 3;
        assert!(table(&table_of(&units, "b\0")).is_none());
        units[256] = 0;
        assert!(table(&table_of(&units[..400], "b\0")).is_none());
    }
}
