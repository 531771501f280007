//! Base64 (RFC 4648, section 4) of little-endian floats.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// The standard alphabet, padded.
pub(super) fn floats(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().enumerate().fold(0u32, |word, (at, &byte)| word | u32::from(byte) << (16 - 8 * at));
        for at in 0..4 {
            let sextet = (word >> (18 - 6 * at)) as usize & 63;
            out.push(if at <= chunk.len() { char::from(ALPHABET[sextet]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of an independent implementation (CPython's `base64` and `struct`).
    #[test]
    fn floats_are_what_other_decoders_expect() {
        assert_eq!(floats(&[]), "");
        assert_eq!(floats(&[1.0]), "AACAPw==");
        assert_eq!(floats(&[1.0, -2.5]), "AACAPwAAIMA=");
        assert_eq!(floats(&[1.0, -2.5, std::f32::consts::PI]), "AACAPwAAIMDbD0lA");
        assert_eq!(floats(&[f32::MAX, f32::MIN_POSITIVE]), "//9/fwAAgAA=");
    }
}
