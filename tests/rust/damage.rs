//! Good files with some damage, made out of choices: inputs for fuzzing that know the structure of what they break.

use crate::fabricate::{Choose, Listed, Padding, cache, file, layers, metadata};
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::schema::CLASSES;
use mlxrs_py::persist::header;
use mlxrs_py::persist::wire::{self, Format};

/// What the damage may hit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Aim {
    /// The header and its bytes.
    Header,
    /// What a format makes of a header that is in order.
    Wire(Format),
}

/// A tensor that knows its bytes; offsets follow when the file is written.
#[derive(Clone)]
struct Piece {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    bytes: Vec<u8>,
}

/// A file as lists, so that keys can stand twice.
struct Parts {
    pieces: Vec<Piece>,
    texts: Vec<(String, String)>,
}

const NUMBERS: [u64; 12] = [0, 1, 2, 3, 4, 7, 8, 255, 256, 0x7fff_ffff, 0x8000_0000, u64::MAX];
const TEXTS: [&str; 14] = ["", "-1", "0", "1", "3", "8", "999", "True", "False", "scalar", "string", "none", "-", "01"];
const DTYPES: [&str; 8] = ["F32", "BF16", "F16", "U32", "I32", "I64", "BOOL", "U8"];

/// A file of one to five caches with up to three faults in it; one in ten has none.
pub fn input(choose: &mut dyn Choose, aim: Aim) -> Vec<u8> {
    let format = match aim {
        Aim::Wire(format) => format,
        Aim::Header => [Format::V031, Format::V032][choose.below(2)],
    };
    let padding = if format == Format::V031 { Padding::Cut } else { Padding::Kept };
    let (user, mut caches) = (metadata(choose), layers(choose, padding));
    caches.push(cache(choose, padding, 0));
    let good = file(&wire::encode(format, caches, &user).expect("good caches"));
    let mut parts = Parts::split(&good);
    if choose.below(10) == 0 {
        return good;
    }
    if aim != Aim::Header {
        for _ in 0..=choose.below(3) {
            parts.damage(choose);
        }
        return parts.write(&parts.entries());
    }
    let mut entries = parts.entries();
    if choose.below(4) > 0 {
        damage_entries(choose, &mut entries);
    }
    let mut bytes = parts.write(&entries);
    if choose.below(3) == 0 {
        damage_bytes(choose, &mut bytes);
    }
    bytes
}

/// The file that arbitrary bytes choose.
pub fn input_of(bytes: &[u8]) -> Vec<u8> {
    let mut choices = bytes.chunks(2).map(|pair| pair.iter().fold(0, |all, &byte| all << 8 | u16::from(byte)));
    let aims = [Aim::Wire(Format::V032), Aim::Wire(Format::V031), Aim::Header];
    let aim = aims[usize::from(choices.next().unwrap_or(0)) % aims.len()];
    input(&mut Listed::new(choices.collect()), aim)
}

impl Parts {
    fn split(file: &[u8]) -> Self {
        let (header, data) = header::parse_file(file).expect("a good file");
        let pieces = header.tensors.into_values().map(|info| Piece {
            dtype: info.dtype.safetensors_name().into(),
            shape: info.shape.iter().map(|&dim| dim as u64).collect(),
            bytes: file[data + info.start as usize..data + info.end as usize].to_vec(),
            name: info.name,
        });
        Self { pieces: pieces.collect(), texts: header.metadata.into_iter().collect() }
    }

    /// One fault that the header does not show: shapes, types and bytes still fit each other.
    fn damage(&mut self, choose: &mut dyn Choose) {
        if choose.flip() && !self.pieces.is_empty() {
            let at = choose.below(self.pieces.len());
            self.damage_piece(choose, at);
        } else if !self.texts.is_empty() {
            let at = choose.below(self.texts.len());
            self.damage_text(choose, at);
        }
    }

    fn damage_piece(&mut self, choose: &mut dyn Choose, at: usize) {
        let other = self.pieces[choose.below(self.pieces.len())].clone();
        let piece = &mut self.pieces[at];
        match choose.below(9) {
            0 => drop(self.pieces.remove(at)),
            1 => {
                let copy = Piece { name: key(choose, &other.name), ..piece.clone() };
                self.pieces.push(copy);
            }
            2 => piece.name = key(choose, &piece.name),
            3 => (piece.dtype, piece.shape, piece.bytes) = (other.dtype, other.shape, other.bytes),
            4 => {
                piece.dtype = DTYPES[choose.below(DTYPES.len())].into();
                piece.fit();
            }
            5 if !piece.shape.is_empty() => {
                let axis = choose.below(piece.shape.len());
                piece.shape[axis] = choose.below(9) as u64;
                piece.fit();
            }
            6 => {
                piece.shape = (0..choose.below(6)).map(|_| choose.below(4) as u64).collect();
                piece.fit();
            }
            // Numbers are the small pieces.
            _ => match self.pieces.iter_mut().filter(|piece| piece.bytes.len() == 4).nth(at % 4) {
                Some(number) => {
                    let value =
                        i32::from_le_bytes([number.bytes[0], number.bytes[1], number.bytes[2], number.bytes[3]]);
                    let value = match choose.below(4) {
                        0 => value.wrapping_add(1),
                        1 => value.wrapping_sub(1),
                        2 => value.wrapping_neg(),
                        _ => NUMBERS[choose.below(NUMBERS.len())] as i32,
                    };
                    number.bytes = value.to_le_bytes().to_vec();
                }
                None => {
                    if let Some(byte) = self.pieces[at].bytes.first_mut() {
                        *byte ^= 1 << choose.below(8);
                    }
                }
            },
        }
    }

    fn damage_text(&mut self, choose: &mut dyn Choose, at: usize) {
        let other = self.texts[choose.below(self.texts.len())].clone();
        let (name, text) = &mut self.texts[at];
        match choose.below(7) {
            0 => drop(self.texts.remove(at)),
            1 => *name = key(choose, name),
            2 => *text = other.1,
            3 => *text = TEXTS[choose.below(TEXTS.len())].into(),
            4 => *text = text.parse::<i64>().map_or_else(|_| "x".into(), |value| (value + 1).to_string()),
            5 => *text = CLASSES[choose.below(CLASSES.len())].name.into(),
            _ => {
                let name = key(choose, &other.0);
                self.texts.push((name, other.1));
            }
        }
    }

    /// The JSON of metadata and tensors: keys and what stands after them.
    fn entries(&self) -> Vec<(String, String)> {
        let mut start = 0;
        let mut entries = Vec::new();
        let texts: Vec<_> = self.texts.iter().map(|(key, text)| format!("{}:{}", quoted(key), quoted(text))).collect();
        entries.push(("__metadata__".into(), format!("{{{}}}", texts.join(","))));
        for Piece { name, dtype, shape, bytes } in &self.pieces {
            let end = start + bytes.len();
            let entry = format!("{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}");
            entries.push((name.clone(), entry));
            start = end;
        }
        entries
    }

    fn write(&self, entries: &[(String, String)]) -> Vec<u8> {
        let json: Vec<_> = entries.iter().map(|(key, entry)| format!("{}:{entry}", quoted(key))).collect();
        let json = format!("{{{}}}", json.join(","));
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.extend(self.pieces.iter().flat_map(|piece| &piece.bytes));
        bytes
    }
}

impl Piece {
    /// Makes the bytes as many as dtype and shape ask for.
    fn fit(&mut self) {
        let size = Dtype::from_safetensors_name(&self.dtype).map_or(1, Dtype::size);
        self.bytes.resize(self.shape.iter().product::<u64>() as usize * size, 0);
    }
}

fn quoted(text: &str) -> String {
    serde_json::json!(text).to_string()
}

/// Another key near this one.
fn key(choose: &mut dyn Choose, old: &str) -> String {
    let mut parts: Vec<String> = old.split('.').map(str::to_owned).collect();
    let at = choose.below(parts.len());
    match choose.below(6) {
        0 => parts[at] = choose.below(6).to_string(),
        1 => parts[at] = parts[at].parse::<u64>().map_or_else(|_| "0".into(), |number| (number + 1).to_string()),
        2 => parts.push(choose.below(3).to_string()),
        3 => drop(parts.remove(at)),
        4 => parts[at] = ["a", "", "-1", "00", "3000000"][choose.below(5)].into(),
        _ => parts.extend(std::iter::repeat_n("0".to_owned(), 20)),
    }
    parts.join(".")
}

/// One fault in the JSON of an entry.
fn damage_entries(choose: &mut dyn Choose, entries: &mut Vec<(String, String)>) {
    let at = choose.below(entries.len());
    let entry = &mut entries[at].1;
    match choose.below(8) {
        0 => {
            let twice = entries[at].clone();
            entries.push(twice);
        }
        1 => *entry = entry.replacen("dtype", ["shape", "type", "dtype\":\"F32\",\"dtype"][choose.below(3)], 1),
        2 => *entry = entry.replacen("{", "{\"extra\":[[]],", 1),
        3 => {
            *entry =
                entry.replacen(['3', '4', '1'], &NUMBERS[choose.below(NUMBERS.len())].to_string(), 1 + choose.below(3))
        }
        4 => *entry = entry.replacen("F32", ["F64", "I32", "F8_E4M3", "BF16"][choose.below(4)], 1),
        5 => *entry = ["null", "{}", "[]", "1", "\"x\"", "[[[[[[1]]]]]]"][choose.below(6)].into(),
        6 => *entry = entry.replacen(',', [", ", ",\n", ",,", ";"][choose.below(4)], 1),
        _ => *entry = entry.replacen("data_offsets\":[", "data_offsets\":[-", 1),
    }
}

/// One fault in the bytes of a file.
fn damage_bytes(choose: &mut dyn Choose, bytes: &mut Vec<u8>) {
    let at = choose.below(bytes.len());
    match choose.below(4) {
        0 => bytes.truncate(at),
        1 => bytes[at] ^= 1 << choose.below(8),
        2 => bytes.extend_from_slice(&[0; 9]),
        _ => bytes[..8].copy_from_slice(&NUMBERS[choose.below(NUMBERS.len())].to_le_bytes()),
    }
}
