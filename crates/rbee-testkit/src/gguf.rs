//! A writer of GGUF files, sound ones and others.

/// A metadata value.
#[derive(Clone, Debug)]
pub enum Value {
    /// u8
    U8(u8),
    /// u16
    U16(u16),
    /// u32
    U32(u32),
    /// i32
    I32(i32),
    /// f32
    F32(f32),
    /// One byte.
    Bool(bool),
    /// A string, whatever its bytes.
    Text(Vec<u8>),
    /// An array of strings.
    Texts(Vec<String>),
    /// An array of f32.
    F32s(Vec<f32>),
    /// An array of i32.
    I32s(Vec<i32>),
    /// An array of bool.
    Bools(Vec<bool>),
    /// f64
    F64(f64),
    /// Type number and bytes, as they are.
    Raw(u32, Vec<u8>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Self::U32(number)
    }
}

impl From<f32> for Value {
    fn from(number: f32) -> Self {
        Self::F32(number)
    }
}

/// A tensor's info, dimensions in the file's order.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name.
    pub name: Vec<u8>,
    /// Its dimensions, the fastest first.
    pub dims: Vec<u64>,
    /// The number of its kind.
    pub kind: u32,
    /// Where its data begin, after the padding of the header.
    pub offset: u64,
}

/// A file as it is to be written.
#[derive(Clone, Debug)]
pub struct File {
    /// The first four bytes.
    pub magic: [u8; 4],
    /// The version of the format.
    pub version: u32,
    /// Metadata, in order.
    pub keys: Vec<(Vec<u8>, Value)>,
    /// Infos of tensors, in order.
    pub tensors: Vec<Tensor>,
    /// Bytes after the header and its padding.
    pub data: Vec<u8>,
    /// Where tensors may begin: at its multiples.
    pub alignment: u64,
    /// Counts that are not those of the lists.
    pub claims: (Option<u64>, Option<u64>),
}

impl Default for File {
    fn default() -> Self {
        Self::new()
    }
}

impl File {
    /// An empty file of version 3.
    pub fn new() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            keys: Vec::new(),
            tensors: Vec::new(),
            data: Vec::new(),
            alignment: 32,
            claims: (None, None),
        }
    }

    /// With a key after the ones before.
    pub fn key(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.keys.push((key.into(), value.into()));
        self
    }

    /// A tensor of f32 after the ones before, with its values.
    pub fn f32(self, name: &str, dims: &[u64], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, dims, 0, &bytes)
    }

    /// A tensor of a kind after the ones before, with its bytes.
    pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, bytes: &[u8]) -> Self {
        let offset = (self.data.len() as u64).next_multiple_of(self.alignment);
        self.data.resize(offset as usize, 0);
        self.data.extend_from_slice(bytes);
        self.tensors.push(Tensor { name: name.into(), dims: dims.into(), kind, offset });
        self
    }

    /// The file as it stands on a disk.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.magic);
        out.extend(self.version.to_le_bytes());
        out.extend(self.claims.0.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.claims.1.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            text(&mut out, key);
            put(&mut out, value);
        }
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            for dim in &tensor.dims {
                out.extend(dim.to_le_bytes());
            }
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        if !self.data.is_empty() {
            out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
            out.extend_from_slice(&self.data);
        }
        out
    }
}

/// A string, with its length.
pub fn text(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

/// The head of an array.
pub fn array(out: &mut Vec<u8>, kind: u32, items: u64) {
    out.extend(kind.to_le_bytes());
    out.extend(items.to_le_bytes());
}

fn put(out: &mut Vec<u8>, value: &Value) {
    let number = match value {
        Value::U8(_) => 0u32,
        Value::U16(_) => 2,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::Text(_) => 8,
        Value::Texts(_) | Value::F32s(_) | Value::I32s(_) | Value::Bools(_) => 9,
        Value::F64(_) => 12,
        Value::Raw(number, _) => *number,
    };
    out.extend(number.to_le_bytes());
    match value {
        Value::U8(number) => out.push(*number),
        Value::U16(number) => out.extend(number.to_le_bytes()),
        Value::U32(number) => out.extend(number.to_le_bytes()),
        Value::I32(number) => out.extend(number.to_le_bytes()),
        Value::F32(number) => out.extend(number.to_le_bytes()),
        Value::F64(number) => out.extend(number.to_le_bytes()),
        Value::Bool(switch) => out.push(u8::from(*switch)),
        Value::Text(bytes) => text(out, bytes),
        Value::Texts(texts) => {
            array(out, 8, texts.len() as u64);
            texts.iter().for_each(|one| text(out, one.as_bytes()));
        }
        Value::F32s(numbers) => {
            array(out, 6, numbers.len() as u64);
            out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        Value::I32s(numbers) => {
            array(out, 5, numbers.len() as u64);
            out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        Value::Bools(switches) => {
            array(out, 7, switches.len() as u64);
            out.extend(switches.iter().map(|switch| u8::from(*switch)));
        }
        Value::Raw(_, bytes) => out.extend_from_slice(bytes),
    }
}
