//! What a pickle says about a tensor, and its values from the bytes of a storage.

use safetensors::tensor::Dtype;

/// Most bytes of a tensor that repeats the values of a smaller storage.
const MOST_REPEATED: usize = 256 << 20;

/// What the elements of a storage are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Element {
    /// As PyTorch calls it.
    pub name: String,
    /// Bytes of one.
    pub size: usize,
    /// `None` if they are of a type that is not read, such as complex numbers.
    pub dtype: Option<Dtype>,
}

impl Element {
    /// By the name of a storage's class, `FloatStorage`, or of a type, `float32`. Untyped storages have elements of one byte.
    pub fn named(name: &str) -> Option<Self> {
        let (size, dtype) = match name.strip_suffix("Storage").unwrap_or(name) {
            "Float" | "float32" | "float" => (4, Some(Dtype::F32)),
            "Double" | "float64" | "double" => (8, Some(Dtype::F64)),
            "Half" | "float16" | "half" => (2, Some(Dtype::F16)),
            "BFloat16" | "bfloat16" => (2, Some(Dtype::BF16)),
            "Long" | "int64" | "long" => (8, Some(Dtype::I64)),
            "Int" | "int32" | "int" => (4, Some(Dtype::I32)),
            "Short" | "int16" | "short" => (2, Some(Dtype::I16)),
            "Char" | "int8" => (1, Some(Dtype::I8)),
            "Byte" | "uint8" => (1, Some(Dtype::U8)),
            "uint16" => (2, Some(Dtype::U16)),
            "uint32" => (4, Some(Dtype::U32)),
            "Bool" | "bool" => (1, Some(Dtype::BOOL)),
            "Untyped" | "QInt8" | "QUInt8" | "QUInt4x2" | "QUInt2x4" => (1, None),
            "QInt32" => (4, None),
            "uint64" | "ComplexFloat" | "complex64" => (8, None),
            "ComplexDouble" | "complex128" => (16, None),
            other if other.starts_with("float8") => (1, None),
            _ => return None,
        };
        Some(Self { name: name.to_string(), size, dtype })
    }
}

/// A storage, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Storage {
    /// Its name in the file.
    pub key: String,
    pub element: Element,
    /// Number of elements of the whole storage.
    pub elements: usize,
    /// Where the part begins and ends.
    pub part: (usize, usize),
}

/// A tensor that was not read yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    pub key: String,
    pub element: Element,
    pub shape: Vec<usize>,
    stride: Vec<usize>,
    /// Its first element in the storage, and one behind its last.
    reach: (usize, usize),
}

impl Tensor {
    /// # Errors
    /// If it does not lie within the storage.
    pub fn new(
        storage: &Storage,
        element: Element,
        offset: usize,
        shape: Vec<usize>,
        stride: Vec<usize>,
    ) -> Result<Self, String> {
        let there = (storage.part.1 * storage.element.size) / element.size.max(1);
        let elements = shape.iter().try_fold(1usize, |all, length| all.checked_mul(*length));
        let far =
            || shape.iter().zip(&stride).try_fold(1usize, |end, (n, by)| end.checked_add((n - 1).checked_mul(*by)?));
        let length = match elements {
            Some(0) => Some(0),
            Some(_) => far(),
            None => None,
        };
        let start = offset.checked_add(storage.part.0);
        let end = start.zip(length).and_then(|(start, length)| start.checked_add(length));
        let (Some(start), Some(end)) = (start, end.filter(|end| *end <= there && shape.len() == stride.len())) else {
            return Err(format!(
                "a tensor of shape {shape:?} and strides {stride:?} lies outside of its storage of {there} elements"
            ));
        };
        let bytes = elements.and_then(|elements| elements.checked_mul(element.size));
        if bytes.is_none_or(|bytes| bytes > MOST_REPEATED.max(there * element.size)) {
            return Err(format!("a tensor of shape {shape:?} repeats the {there} elements of its storage too often"));
        }
        Ok(Self { key: storage.key.clone(), element, shape, stride, reach: (start, end) })
    }

    /// First byte and number of bytes of the storage that it needs.
    pub fn window(&self) -> (usize, usize) {
        let (start, end) = self.reach;
        (start * self.element.size, (end - start) * self.element.size)
    }

    /// Its bytes in row-major order, from those of its window.
    pub fn gather(&self, window: Vec<u8>) -> Vec<u8> {
        let (elements, size) = (self.shape.iter().product::<usize>(), self.element.size);
        let mut whole = 1;
        let in_order = self.shape.iter().zip(&self.stride).rev().all(|(length, stride)| {
            let fits = *length <= 1 || *stride == whole;
            whole *= (*length).max(1);
            fits
        });
        if in_order || elements == 0 {
            return window;
        }
        let mut bytes = Vec::with_capacity(elements * size);
        let (mut place, mut at) = (vec![0usize; self.shape.len()], 0usize);
        for _ in 0..elements {
            bytes.extend_from_slice(&window[at * size..(at + 1) * size]);
            for axis in (0..place.len()).rev() {
                place[axis] += 1;
                at += self.stride[axis];
                if place[axis] < self.shape[axis] {
                    break;
                }
                at -= self.stride[axis] * self.shape[axis];
                place[axis] = 0;
            }
        }
        bytes
    }
}
